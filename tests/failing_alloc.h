/* failing_alloc.h - every allocation of some work made to fail in turn: an error in the context, no leak, no crash.
   Include it after dpo_test.h. */
#ifndef FAILING_ALLOC_H
#define FAILING_ALLOC_H

static long allocations, failing, living;
static long failing_from;                 /* set by the work itself: allocations up to here are not made to fail */

static void *failing_alloc(void *user, void *old, size_t old_size, size_t size)
{
    void *p;
    (void)user; (void)old_size;
    if (!size) { living -= old != NULL; free(old); return NULL; }
    if (++allocations == failing) return NULL;
    p = realloc(old, size);
    living += p && !old;
    return p;
}

/* Each allocation made to fail with `every`, else about `probes` of those after failing_from. */
static void test_failing(void (*work)(dpo_ctx *c), int every, int probes)
{
    long total = 0, step = 1, bad = 0, first = 0;
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    d.alloc = failing_alloc;
    failing_from = 0;
    for (failing = 0; failing <= total; failing = failing ? failing + step : first) {
        dpo_ctx *c;
        const char *error;
        allocations = 0;
        c = dpo_open(&d);
        if (c) work(c);
        error = c ? dpo_error(c) : NULL;
        if (!failing) {
            CHECK(c && !error, "%s", error ? error : "no context");
            total = allocations;
            first = every ? 1 : failing_from + 1;
            step = every ? 1 : (total - first) / probes + 1;
        } else if (error && dpo_status(c) != DPO_OUT_OF_MEMORY && bad++ < 3)
            CHECK(0, "allocation %ld of %ld: %s", failing, total, error);
        dpo_close(c);
        if (living) { CHECK(0, "allocation %ld of %ld: %ld blocks leak", failing, total, living); living = 0; }
    }
    CHECK(total - first > 100 && !bad, "%ld allocations failed in turn", total - first);
}
#endif
