/* use.c - a program in several files: the implementation is in another.  Compiled as C and as C++. */
#include <stdio.h>
#include "../../diffdpo.h"

int main(void)
{
    dpo_ctx *c = dpo_open(NULL);
    int64_t shape[2] = { 2, 3 };
    float x[6] = { 1, 2, 3, 4, 5, 6 }, sum = 0;
    dpo_read(dpo_sum(c, dpo_tensor_from(c, DPO_F32, 2, shape, x), -1), &sum);
    if (dpo_error(c)) fprintf(stderr, "%s\n", dpo_error(c));
    dpo_close(c);
    return sum == 21 && dpo_version() == DIFFDPO_VERSION ? 0 : 1;
}
