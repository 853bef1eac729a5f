/* dpo_test.h - what the tests share: checks that count and go on, skips that say so, random numbers.
   Include it after diffdpo.h.  A program ends with `return test_report();`, which prints `N passed, N failed, N skipped`. */
#ifndef DPO_TEST_H
#define DPO_TEST_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int passed, failed, skipped; } test_counts;
static test_counts test_totals;

/* A check that failed says where and why; the rest still runs. */
#define CHECK(ok, ...) do { \
    if (ok) test_totals.passed++; \
    else { test_totals.failed++; printf("FAIL %s:%d: ", __FILE__, __LINE__); printf(__VA_ARGS__); printf("\n"); } } while (0)

#define CHECK_CLOSE(a, b, tolerance) do { \
    double ta = (a), tb = (b); \
    CHECK(fabs(ta - tb) <= (tolerance) * (fabs(tb) > 1 ? fabs(tb) : 1), "%s = %.9g, not %.9g", #a, ta, tb); } while (0)

#define SKIP(...) do { test_totals.skipped++; printf("SKIPPED "); printf(__VA_ARGS__); printf("\n"); } while (0)

static inline int test_report(void)
{
    printf("%d passed, %d failed, %d skipped\n", test_totals.passed, test_totals.failed, test_totals.skipped);
    return test_totals.failed != 0;
}

/* splitmix64: any seed will do. */
static inline uint64_t test_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline double test_uniform(uint64_t *state) { return ((double)(test_random(state) >> 11) + 0.5) / 9007199254740992.0; }

static inline double test_normal(uint64_t *state)
{
    double r = sqrt(-2 * log(test_uniform(state)));
    return r * cos(6.283185307179586 * test_uniform(state));
}

/* 1 if the machine runs DPO_ISA_AVX2, DPO_ISA_AVX512 ... */
static inline int test_has_isa(int isa)
{
#if defined(__x86_64__) && defined(__GNUC__) && !defined(DIFFDPO_NO_SIMD)
    if (isa == DPO_ISA_AVX2)   return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == DPO_ISA_AVX512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#elif defined(__aarch64__) && !defined(DIFFDPO_NO_SIMD)
    if (isa == DPO_ISA_NEON)   return 1;
#endif
    return isa == DPO_ISA_PLAIN;
}
#endif
