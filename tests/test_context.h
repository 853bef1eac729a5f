/* test_context.h - contexts that keep what they log, and tensors as floats.  Include it after dpo_test.h. */
#ifndef TEST_CONTEXT_H
#define TEST_CONTEXT_H

static char logged[8192];                 /* all that the contexts of open_with logged, the newest one's */

static void keep_log(void *user, int level, const char *text)
{
    size_t n = strlen(logged);
    (void)user; (void)level;
    snprintf(logged + n, sizeof logged - n, "%s\n", text);
}

static dpo_ctx *open_with(int threads)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.threads = threads;
    d.log = keep_log;
    logged[0] = 0;
    return dpo_open(&d);
}

static dpo_ctx *open_plain(void) { return open_with(1); }

static const char *why(dpo_ctx *c) { return dpo_error(c) ? dpo_error(c) : "no error"; }

static float *floats_of(dpo_tensor *x)
{
    float *v = (float *)calloc((size_t)dpo_count(x) + 1, sizeof *v);
    if (x && !dpo_read(x, v)) v[0] = (float)NAN;
    return v;
}

/* max|a-b| / max|b| of n numbers; frees both. */
static double difference_of(float *a, float *b, int64_t n)
{
    double worst = 0, most = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!(fabs((double)a[i] - b[i]) <= worst)) worst = fabs((double)a[i] - b[i]);
        if (fabs((double)b[i]) > most) most = fabs((double)b[i]);
    }
    free(a);
    free(b);
    return most > 0 ? worst / most : worst;
}

/* NaN if shapes differ. */
static double difference(dpo_tensor *a, dpo_tensor *b)
{
    if (!a || !b || a->rank != b->rank || memcmp(a->shape, b->shape, sizeof a->shape) != 0) return NAN;
    return difference_of(floats_of(a), floats_of(b), dpo_count(a));
}
#endif
