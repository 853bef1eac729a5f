/* test_kernels.c - every kernel of the CPU backend, called as the library calls it.

   build   cc -O2 tests/test_kernels.c -o build/test_kernels -lm -lpthread
   checks  each instruction set against plain C; one thread against three, bit for bit; a sample alone against the same
           sample in a batch, bit for bit; plain C's gradients against differences of its forward; gradients that are
           added to; inputs and gradients left out; BF16 and F16; products that round their factors.  Shapes are
           random and odd.                                                                                           */
#include <stdint.h>
#define DIFFDPO_IMPLEMENTATION
#define DIFFDPO_NO_STB
#include "../diffdpo.h"
#include "dpo_test.h"

enum { ISAS = 3, WAYS = 2*ISAS };          /* AMX differs from AVX-512 in products of BF16 alone */
static const char *const isa_names[ISAS] = { "plain", "avx2", "avx512" };
static dpo_backend *ways[WAYS];           /* [isa][1 or 3 threads]; NULL: the machine lacks it */

static int   test_int(uint64_t *seed, int least, int most) { return least + (int)(test_random(seed) % (uint64_t)(most - least + 1)); }
static float test_float(uint64_t *seed)                    { return (float)test_normal(seed); }

/* max |a-b| / max |b|; infinite where one is not a number and the other is. */
static double test_distance(const float *a, const float *b, size_t n)
{
    double most = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (d != d) d = a[i] != a[i] && b[i] != b[i] ? 0 : HUGE_VAL;
        if (d > most) most = d;
        if (fabs((double)b[i]) > scale) scale = fabs((double)b[i]);
    }
    return scale > 0 ? most/scale : most;
}

/* ------------------------------------------------------------------------------------------ a call to test */

typedef struct test_case {
    char     name[128];
    dpo_args a;                           /* data are this struct's own blocks */
    dpo_view stat;                        /* its shape; rank 0: none */
    int      in_out;                      /* out (and ADAMW's in[1], in[2]) are read, too */
    double   tolerance;
    int      smooth;                      /* differences make sense */
    unsigned ids;                         /* inputs that are I32 */
} test_case;

static const char *const op_names[] = {
#define OP_NAME(name, inputs, grads, keeps) #name,
    DPO_OPS(OP_NAME)
};
static const int op_grads[] = {
#define OP_GRADS(name, inputs, grads, keeps) (grads) & ~(DPO_OP_##name == DPO_OP_CONV ? 1 << 4 : 0),
    DPO_OPS(OP_GRADS)                     /* the residual's gradient is dout itself, which the tape hands on */
};
static const int op_keeps[] = {
#define OP_KEEPS(name, inputs, grads, keeps) keeps,
    DPO_OPS(OP_KEEPS)
};

static size_t stored(const dpo_view *v)
{
    size_t O = (size_t)v->shape[0];
    if (!v->rank) return 0;
    if (v->panel) O = (O + (size_t)v->panel - 1)/(size_t)v->panel*(size_t)v->panel;
    return O*(size_t)(v->shape[1]*v->shape[2]*v->shape[3]);
}
static size_t bytes_of(const dpo_view *v)
{
    return stored(v)*(v->dtype == DPO_BF16 || v->dtype == DPO_F16 ? 2 : 4);
}

static dpo_view view(int rank, int64_t a, int64_t b, int64_t c, int64_t d)
{
    dpo_view v;
    memset(&v, 0, sizeof v);
    v.rank = rank;
    v.shape[0] = a;  v.shape[1] = b;  v.shape[2] = c;  v.shape[3] = d;
    return v;
}

/* Exactly as much memory as the view has, so that a sanitizer sees a kernel that reads past it. */
static void fill(dpo_view *v, uint64_t *seed)
{
    float *p = (float *)malloc(stored(v)*4 + 1);
    for (size_t i = 0; i < stored(v); i++) p[i] = test_float(seed);
    if (v->panel && v->shape[0] % v->panel) {             /* the zeros where O ends */
        size_t inner = (size_t)(v->shape[1]*v->shape[2]*v->shape[3]), P = (size_t)v->panel;
        float *last = p + (size_t)v->shape[0]/P*P*inner;
        for (size_t k = 0; k < inner*P; k++) if (k % P >= (size_t)v->shape[0] % P) last[k] = 0;
    }
    v->data = p;
}
static void input(test_case *t, int i, dpo_view v, uint64_t *seed)
{
    t->a.in[i] = v;
    fill(&t->a.in[i], seed);
}
static void input_ids(test_case *t, int i, int64_t n, int least, int most, uint64_t *seed)
{
    t->a.in[i] = view(1, n, 1, 1, 1);
    t->a.in[i].dtype = DPO_I32;
    t->a.in[i].data = malloc((size_t)n*4 + 1);
    for (int64_t k = 0; k < n; k++) ((int32_t *)t->a.in[i].data)[k] = test_int(seed, least, most);
    t->ids |= 1u << i;
}
static void start(test_case *t, int op, const char *more)
{
    memset(t, 0, sizeof *t);
    t->a.op = op;
    t->tolerance = 3e-6;
    t->smooth = 1;
    snprintf(t->name, sizeof t->name, "%s%s%s", op_names[op], more[0] ? " " : "", more);
}

/* ------------------------------------------------------------------------------------------ running it */

typedef struct test_result {
    float *data[DPO_MAX_INPUTS + 2];      /* out, stat, then the inputs' (forward: in-out ones, backward: gradients) */
    size_t count[DPO_MAX_INPUTS + 2];
    int    status;
} test_result;

enum { GUARD = 16 };                      /* floats behind a block that no kernel may write; sanitizers miss masked stores */

/* A block of n floats: a copy, or NaNs that no kernel may leave. */
static float *block(const void *from, size_t n)
{
    float *p = (float *)malloc((n + GUARD)*4);
    if (from) memcpy(p, from, n*4); else memset(p, 0xff, n*4);
    for (int i = 0; i < GUARD; i++) p[n + (size_t)i] = 4711;
    return p;
}

static void free_result(test_result *r)
{
    for (int i = 0; i < DPO_MAX_INPUTS + 2; i++) {
        int kept = 1;
        for (size_t k = 0; r->data[i] && k < GUARD; k++) kept &= r->data[i][r->count[i] + k] == 4711;
        if (!kept) CHECK(kept, "something was written behind result %d", i);
        free(r->data[i]);
    }
}

static int call(dpo_backend *b, dpo_args *a)
{
    int status;
    a->work_size = b->workspace(b->self, a);
    a->work = malloc(a->work_size + 1);
    memset(a->work, 0xff, a->work_size);
    status = b->run(b->self, a);
    free(a->work);
    return status;
}

static test_result forward(dpo_backend *b, const test_case *t)
{
    test_result r;
    dpo_args a = t->a;
    memset(&r, 0, sizeof r);
    r.count[0] = stored(&a.out);
    a.out.data = r.data[0] = block(t->in_out ? t->a.out.data : NULL, r.count[0]);
    if (t->stat.rank) {
        a.stat = t->stat;
        r.count[1] = stored(&t->stat);
        a.stat.data = r.data[1] = block(NULL, r.count[1]);
    }
    for (int i = 1; i < 3 && a.op == DPO_OP_ADAMW; i++) {
        r.count[2 + i] = stored(&a.in[i]);
        a.in[i].data = r.data[2 + i] = block(a.in[i].data, r.count[2 + i]);
    }
    r.status = call(b, &a);
    return r;
}

/* Gradients `want` (bits) of f, a forward result of the same case; those in `add` start from what in[i] holds. */
static test_result backward(dpo_backend *b, const test_case *t, const test_result *f, const float *dout, unsigned want,
                            unsigned add)
{
    test_result r;
    dpo_args a = t->a;
    memset(&r, 0, sizeof r);
    a.backward = 1;
    a.add = add;
    a.dout = a.out;  a.dout.data = (void *)(size_t)dout;  a.dout.dtype = DPO_F32;
    a.out.data = op_keeps[a.op] & DPOI_OUT ? f->data[0] : NULL;
    a.stat = t->stat;
    a.stat.data = f->data[1];
    for (int i = 0; i < DPO_MAX_INPUTS; i++) {
        if ((want & (unsigned)op_grads[a.op]) >> i & 1 && t->a.in[i].data && !(t->ids >> i & 1)) {
            a.din[i] = a.in[i];
            a.din[i].dtype = DPO_F32;
            r.count[2 + i] = stored(&a.in[i]);
            a.din[i].data = r.data[2 + i] = block(add >> i & 1 ? t->a.in[i].data : NULL, r.count[2 + i]);
        }
        if (!(op_keeps[a.op] >> i & 1)) a.in[i].data = NULL;
    }
    r.status = call(b, &a);
    return r;
}

/* tolerance 0: the same bits. */
static void compare(const test_case *t, const char *what, const test_result *a, const test_result *b, double tolerance)
{
    CHECK(a->status == b->status, "%s %s: status %d and %d", t->name, what, a->status, b->status);
    for (int i = 0; i < DPO_MAX_INPUTS + 2; i++) {
        double d;
        if (!a->data[i] || !b->data[i]) continue;
        if (tolerance == 0) {
            CHECK(!memcmp(a->data[i], b->data[i], a->count[i]*4), "%s %s: result %d has other bits", t->name, what, i);
            continue;
        }
        d = test_distance(a->data[i], b->data[i], a->count[i]);
        CHECK(d <= tolerance, "%s %s: result %d differs by %.3g, allowed %.3g", t->name, what, i, d, tolerance);
    }
}

static double dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i]*b[i];
    return sum;
}

/* d/de sum dout . f(in[i] + e v) at e = 0, against sum din[i] . v, for a random direction v. */
static void differences(const test_case *t, const test_result *g, const float *dout, uint64_t *seed)
{
    for (int i = 0; i < DPO_MAX_INPUTS; i++) {
        size_t n = g->count[2 + i];
        double slope[2] = { 0, 0 }, size = 0, got;
        float *v, *x = (float *)t->a.in[i].data;
        if (!g->data[2 + i]) continue;
        v = (float *)malloc(n*4 + 1);
        for (size_t k = 0; k < n; k++) v[k] = x[k] != 0 ? test_float(seed) : 0;      /* a panel's zeros stay */
        for (int step = 0; step < 2; step++) {            /* two steps: their difference tells the error */
            double e = step ? 2e-3 : 4e-3;
            for (int side = -1; side <= 1; side += 2) {
                test_case moved = *t;
                test_result f;
                moved.a.in[i].data = malloc(n*4 + 1);
                for (size_t k = 0; k < n; k++) ((float *)moved.a.in[i].data)[k] = (float)(x[k] + side*e*v[k]);
                f = forward(ways[0], &moved);
                slope[step] += side*dot(f.data[0], dout, f.count[0])/(2*e);
                size = fmax(size, sqrt(dot(f.data[0], f.data[0], f.count[0])*dot(dout, dout, f.count[0])));
                free_result(&f);
                free(moved.a.in[i].data);
            }
        }
        got = dot(g->data[2 + i], v, n);
        CHECK(fabs(got - slope[1]) <= 1e-2*fabs(got) + 2*fabs(slope[0] - slope[1]) + 1e-3*size + 1e-4,
              "%s: gradient %d is %.6g along a direction where the difference is %.6g", t->name, i, got, slope[1]);
        free(v);
    }
}

static test_case narrowed(const test_case *t, int dtype)
{
    test_case n = *t;
    for (int i = 0; i < DPO_MAX_INPUTS; i++) {
        size_t count = stored(&t->a.in[i]);
        if (!t->a.in[i].data || (t->ids >> i & 1)) continue;
        n.a.in[i].dtype = dtype;
        n.a.in[i].data = malloc(count*2 + 1);
        dpoi_narrow(dtype, (int64_t)count, (const float *)t->a.in[i].data, n.a.in[i].data);
        dpoi_widen(dtype, (int64_t)count, n.a.in[i].data, (float *)t->a.in[i].data);
    }
    return n;
}

/* The result of n, whose tensors are in half precision, widened. */
static test_result half_result(dpo_backend *b, const test_case *n, int dtype)
{
    size_t count = stored(&n->a.out);
    void *narrow_out = malloc(count*2 + 1);
    dpo_args a = n->a;
    test_result h;
    memset(&h, 0, sizeof h);
    memset(narrow_out, 0xff, count*2);
    a.out.dtype = dtype;
    a.out.data = narrow_out;
    h.count[0] = count;
    h.data[0] = block(NULL, count);
    h.status = call(b, &a);
    dpoi_widen(dtype, (int64_t)count, narrow_out, h.data[0]);
    free(narrow_out);
    return h;
}

/* One backend: n is t in half precision. */
static void half_on(dpo_backend *b, const test_case *t, const test_case *n, int dtype, const test_result *f,
                    double tolerance)
{
    test_result h = half_result(b, n, dtype);
    compare(t, dtype == DPO_BF16 ? "in bf16" : "in f16", &h, f, tolerance);
    free_result(&h);
}

static void finish_narrowed(const test_case *t, test_case *n)
{
    for (int i = 0; i < DPO_MAX_INPUTS; i++) if (n->a.in[i].data != t->a.in[i].data) free(n->a.in[i].data);
}

/* Inputs, outputs and weights in half precision: what F32 gives for the same numbers, rounded. */
static void half(const test_case *t, int dtype)
{
    test_case n = narrowed(t, dtype);
    for (int w = 0; w < WAYS; w += 2) {
        test_result f;
        if (!ways[w]) continue;
        f = forward(ways[w], t);
        half_on(ways[w], t, &n, dtype, &f, dtype == DPO_BF16 ? 5e-3 : 6e-4);
        free_result(&f);
    }
    finish_narrowed(t, &n);
}

static void run_backward(const test_case *t, const test_result *f, int way, const float *dout, unsigned want, unsigned add,
                         const char *what)
{
    test_result oracle = backward(ways[0], t, f, dout, want, add), r;
    char text[64];
    CHECK(oracle.status == DPO_OK, "%s backward: status %d", t->name, oracle.status);
    for (int w = 0; w < WAYS; w++) {
        if (!ways[w] || (way >= 0 && w != way)) continue;
        r = backward(ways[w], t, f, dout, want, add);
        snprintf(text, sizeof text, "backward %s, %s, %d threads", what, isa_names[w/2], w % 2 ? 3 : 1);
        if (w % 2 == 0) compare(t, text, &r, &oracle, t->tolerance*4);
        else {
            test_result one = backward(ways[w - 1], t, f, dout, want, add);
            compare(t, text, &r, &one, 0);
            free_result(&one);
        }
        free_result(&r);
    }
    free_result(&oracle);
}

static void finish(test_case *t)
{
    for (int i = 0; i < DPO_MAX_INPUTS; i++) free(t->a.in[i].data);
    free(t->a.out.data);
}

/* All that is said at the top, for one case. */
static void check_case(test_case *t, uint64_t *seed)
{
    test_result oracle = forward(ways[0], t);
    size_t n = stored(&t->a.out);
    float *dout = (float *)malloc(n*4 + 1);
    int finite = 1;
    CHECK(oracle.status == DPO_OK, "%s: status %d", t->name, oracle.status);
    for (size_t i = 0; i < n; i++) { dout[i] = test_float(seed);  finite &= isfinite(oracle.data[0][i]) != 0; }
    CHECK(finite, "%s: a result is not finite", t->name);
    for (int w = 1; w < WAYS; w++) {
        test_result r, one;
        char text[64];
        if (!ways[w]) continue;
        snprintf(text, sizeof text, "forward, %s, %d threads", isa_names[w/2], w % 2 ? 3 : 1);
        r = forward(ways[w], t);
        one = w % 2 ? forward(ways[w - 1], t) : oracle;
        compare(t, text, &r, &one, w % 2 ? 0 : t->tolerance);
        free_result(&r);
        if (w % 2) free_result(&one);
    }
    if (op_grads[t->a.op]) {
        test_result g = backward(ways[0], t, &oracle, dout, ~0u, 0);
        run_backward(t, &oracle, -1, dout, ~0u, 0, "written");
        run_backward(t, &oracle, -1, dout, ~0u, ~0u, "added");
        for (int i = 0; i < DPO_MAX_INPUTS; i++)
            if (op_grads[t->a.op] >> i & 1 && t->a.in[i].data) run_backward(t, &oracle, -1, dout, 1u << i, 0, "alone");
        if (t->smooth) differences(t, &g, dout, seed);
        free_result(&g);
    }
    if (!t->in_out && t->a.op != DPO_OP_CLIP && t->a.op != DPO_OP_EMBED && t->smooth) {
        half(t, DPO_BF16);
        half(t, DPO_F16);
    }
    free_result(&oracle);
    free(dout);
    finish(t);
}

/* Sample n of a batch gets the same bits as when it stands alone: `x` lists the inputs with a first axis N. */
static void check_batch(const test_case *t, unsigned x)
{
    int64_t N = t->a.out.shape[0];
    size_t  P = stored(&t->a.out)/(size_t)N;
    for (int w = 0; w < WAYS; w += 2) {
        test_result all, one;
        if (!ways[w]) continue;
        all = forward(ways[w], t);
        for (int64_t n = 0; n < N; n++) {
            test_case single = *t;
            single.a.out.shape[0] = 1;
            if (single.stat.rank) single.stat.shape[0] = 1;
            for (int i = 0; i < DPO_MAX_INPUTS; i++) {
                if (!(x >> i & 1) || !single.a.in[i].data) continue;
                single.a.in[i].data = (float *)single.a.in[i].data + n*(int64_t)(stored(&t->a.in[i])/(size_t)N);
                single.a.in[i].shape[0] = 1;
            }
            one = forward(ways[w], &single);
            CHECK(!memcmp(one.data[0], all.data[0] + (size_t)n*P, P*4), "%s, %s: sample %d of %d differs from itself alone",
                  t->name, isa_names[w/2], (int)n, (int)N);
            free_result(&one);
        }
        free_result(&all);
    }
}

/* ------------------------------------------------------------------------------------------ the cases */

/* A convolution or linear layer: channels up to `most`, kernels 1, 3 and up to `kernel`; kernel 1: a linear layer with an
   adapter of a rank above that of one panel. */
static test_case conv_case(uint64_t *seed, int most, int kernel)
{
    test_case t;
    int64_t N = test_int(seed, 1, 3), H = test_int(seed, 3, 9), W = test_int(seed, 3, 9), I = test_int(seed, 1, most);
    int64_t O = test_int(seed, 1, most > 99 ? 99 : most), k = test_int(seed, 0, 1) ? 3 : 1, stride = test_int(seed, 1, 2);
    int64_t r = test_int(seed, 0, 2) ? test_int(seed, 1, 9) : test_int(seed, 10, 40);
    int pad = k == 3 ? test_int(seed, 0, 1) : 0, linear = k == 1 && stride == 1 && test_int(seed, 0, 1);
    if (kernel > 3 && test_int(seed, 0, 3) == 0) { k = test_int(seed, 2, kernel);  stride = test_int(seed, 1, 3);  pad = (int)k - 1;  linear = 0; }
    if (kernel == 1) { k = stride = linear = 1;  pad = 0;  r = test_int(seed, 17, 40); }
    if (most > 63 && test_int(seed, 0, 2)) I = (I + 31)/32*32;          /* whole tiles go another way than others */
    int64_t Y = (H + 2*pad - k)/stride + 1, X = (W + 2*pad - k)/stride + 1;
    char text[64];
    snprintf(text, sizeof text, "%dx%dx%dx%d -> %d, kernel %d stride %d", (int)N, (int)H, (int)W, (int)I, (int)O, (int)k, (int)stride);
    start(&t, DPO_OP_CONV, text);
    input(&t, 0, view(4, N, H, W, I), seed);
    input(&t, 1, linear ? view(2, O, I, 1, 1) : view(4, O, k, k, I), seed);
    t.a.in[1].panel = 0;
    free(t.a.in[1].data);
    t.a.in[1].panel = ways[0]->panel;
    fill(&t.a.in[1], seed);
    if (test_int(seed, 0, 2)) input(&t, 2, view(1, O, 1, 1, 1), seed);
    if (test_int(seed, 0, 1)) input(&t, 3, view(2, N, O, 1, 1), seed);
    if (test_int(seed, 0, 1)) input(&t, 4, view(4, N, Y, X, O), seed);
    if (kernel == 1 || test_int(seed, 0, 1)) {
        dpo_view down = linear ? view(2, r, I, 1, 1) : view(4, r, k, k, I), up = linear ? view(2, O, r, 1, 1) : view(4, O, 1, 1, r);
        down.panel = up.panel = ways[0]->panel;
        input(&t, 5, down, seed);
        input(&t, 6, up, seed);
        if (test_int(seed, 0, 1)) input(&t, 7, view(1, N, 1, 1, 1), seed);
        t.stat = view(4, N, Y, X, r);
    }
    t.a.p.conv.stride = (int)stride;
    t.a.p.conv.pad_top = t.a.p.conv.pad_left = pad;
    t.a.p.conv.scale = 0.37f;
    t.a.out = view(4, N, Y, X, O);
    return t;
}

static void test_conv(uint64_t *seed)
{
    test_case t = conv_case(seed, 40, 3);
    if (test_int(seed, 0, 3) == 0) {                      /* an activation has no backward of its own here */
        test_result f, o;
        test_case plain = t;
        t.a.p.conv.act = DPO_SILU;
        o = forward(ways[0], &t);
        for (int w = 0; w < WAYS; w++) {
            if (!ways[w]) continue;
            f = forward(ways[w], &t);
            compare(&t, "with silu", &f, &o, 1e-5);
            free_result(&f);
        }
        free_result(&o);
        t = plain;
    }
    t.tolerance = 1e-5;
    check_batch(&t, 0x99);
    check_case(&t, seed);
}

/* A 3x3 convolution of stride 1, s = N, H, W, I, O, with random numbers; an added vector and a residual half of the times. */
static void start_3x3(test_case *t, const char *text, const int *s, int pad, uint64_t *seed)
{
    int64_t N = s[0], H = s[1], W = s[2], I = s[3], O = s[4], Y = H + 2*pad - 2, X = W + 2*pad - 2;
    start(t, DPO_OP_CONV, text);
    input(t, 0, view(4, N, H, W, I), seed);
    t->a.in[1] = view(4, O, 3, 3, I);
    t->a.in[1].panel = ways[0]->panel;
    fill(&t->a.in[1], seed);
    input(t, 2, view(1, O, 1, 1, 1), seed);
    if (test_int(seed, 0, 1)) input(t, 3, view(2, N, O, 1, 1), seed);
    if (test_int(seed, 0, 1)) input(t, 4, view(4, N, Y, X, O), seed);
    t->a.p.conv.stride = 1;  t->a.p.conv.scale = 1;
    t->a.p.conv.pad_top = t->a.p.conv.pad_left = pad;
    t->a.out = view(4, N, Y, X, O);
}

/* 3x3 kernels of stride 1 that are done tile by tile: more tiles, channels and panels than one job takes, channels and
   pixels that end within a tile.  The oracle sums in double; `exact` is what F32 and the transforms may cost, relative to
   the largest result.  Gradients of x and of weights; the seventh is large enough for tiles to be cut into parts. */
static void test_winograd(uint64_t *seed, int n)
{
    static const int shape[][6] = {       /* N, H, W, I, O, padding */
        { 1, 27, 22, 150, 70, 1 }, { 3, 8, 8, 300, 117, 1 }, { 2, 9, 14, 16, 8, 0 }, { 2, 17, 8, 33, 130, 1 },
        { 1, 8, 16, 17, 40, 1 }, { 1, 12, 12, 20, 25, 1 },         /* 8 and 9 tiles: half a strip, and one more */
        { 2, 39, 44, 20, 24, 1 }
    };
    const int *s = shape[n % 7];
    int64_t N = s[0], H = s[1], W = s[2], I = s[3], O = s[4];
    const double exact = 4e-6;
    unsigned wanted = 3, add = n % 2 ? 3 : 0;
    test_case t;
    test_result o, g, r;
    float *dout;
    char text[64];
    snprintf(text, sizeof text, "%dx%dx%dx%d -> %d, in tiles", (int)N, (int)H, (int)W, (int)I, (int)O);
    start_3x3(&t, text, s, s[5], seed);
    t.a.p.conv.act = test_int(seed, 0, 1) ? DPO_SILU : DPO_NONE;
    o = forward(ways[0], &t);
    for (int w = 1; w < WAYS; w++) {
        if (!ways[w]) continue;
        r = forward(ways[w], &t);
        snprintf(text, sizeof text, "forward, %s, %d threads", isa_names[w/2], w % 2 ? 3 : 1);
        compare(&t, text, &r, &o, exact);
        free_result(&r);
    }
    check_batch(&t, 0x19);
    t.a.p.conv.act = DPO_NONE;
    dout = (float *)malloc(o.count[0]*4 + 1);
    for (size_t i = 0; i < o.count[0]; i++) dout[i] = test_float(seed);
    g = backward(ways[0], &t, &o, dout, wanted, add);
    for (int w = 1; w < WAYS; w++) {
        if (!ways[w]) continue;
        r = backward(ways[w], &t, &o, dout, wanted, add);
        snprintf(text, sizeof text, "backward, %s, %d threads", isa_names[w/2], w % 2 ? 3 : 1);
        compare(&t, text, &r, &g, exact);
        free_result(&r);
    }
    free_result(&g);
    free_result(&o);
    free(dout);
    finish(&t);
}

/* ------------------------------------------------------------------------------------------ products of BF16

   Where products may round their factors: plain C of factors that are BF16 already, which leaves F32's rounding of the
   sums (and the adapter's own first half); of others within 2^-6 of the largest result, for few terms may cancel. */

static dpo_backend *rounding[2];          /* 1 and 3 threads; NULL: nothing here rounds */
static dpo_backend *exact_amx;            /* rounds only what is BF16 already */

/* n numbers to the nearest BF16. */
static void round_off(float *x, size_t n)
{
    for (size_t i = 0; x && i < n; i++) x[i] = dpoi_bf16_to_f32(dpoi_f32_to_bf16(x[i]));
}

static void check_rounding(const test_case *t, double tolerance, const test_result *oracle, const float *dout,
                           unsigned add)
{
    test_result r[2], g[2], wanted = dout ? backward(ways[0], t, oracle, dout, ~0u, add) : *oracle;
    for (int w = 0; w < 2; w++) {
        if (!dout) g[w] = forward(rounding[w], t);
        else {
            r[w] = forward(rounding[w], t);
            g[w] = backward(rounding[w], t, &r[w], dout, ~0u, add);
            free_result(&r[w]);
        }
    }
    compare(t, dout ? "backward, rounded" : "forward, rounded", &g[0], &wanted, tolerance);
    compare(t, dout ? "backward, rounded, 3 threads" : "forward, rounded, 3 threads", &g[1], &g[0], 0);
    if (dout) free_result(&wanted);
    for (int w = 0; w < 2; w++) free_result(&g[w]);
}

/* Weights of BF16 into pairs, where they can lie so. */
static int weave(dpo_view *w)
{
    int64_t K = w->shape[1]*w->shape[2]*w->shape[3];
    uint16_t *h = (uint16_t *)w->data, line[32];
    if (K % 2 || w->dtype != DPO_BF16) return 0;
    for (size_t i = 0; i < stored(w); i += 32) {
        memcpy(line, h + i, sizeof line);
        for (int k = 0; k < 32; k++) h[i + (size_t)(k % 16*2 + k/16)] = line[k];
    }
    w->pairs = 1;
    return 1;
}

/* Tensors of BF16 are read and written as they lie; `oracle` is what F32 gives for the same numbers.  Results are
   rounded, and what an adapter has between its halves is, too. */
static void check_rounding_half(const test_case *t, double tolerance, const test_result *oracle, const float *dout)
{
    test_case n = narrowed(t, DPO_BF16);
    test_result f = forward(ways[0], t), g, g2, wanted = backward(ways[0], t, oracle, dout, ~0u, 0);
    half_on(rounding[0], t, &n, DPO_BF16, &f, t->a.in[5].data ? 1e-2 : 5e-3);
    half_on(exact_amx, t, &n, DPO_BF16, &f, t->a.in[5].data ? 1e-2 : 5e-3);
    g2 = half_result(rounding[0], &n, DPO_BF16);
    g = backward(rounding[0], &n, oracle, dout, ~0u, 0);
    compare(t, "backward in bf16", &g, &wanted, tolerance);
    free_result(&f);
    free_result(&wanted);
    if (weave(&n.a.in[1])) {              /* the same bits from weights in pairs */
        half_on(rounding[0], t, &n, DPO_BF16, &g2, 0);
        wanted = backward(rounding[0], &n, oracle, dout, ~0u, 0);
        compare(t, "backward, weights in pairs", &wanted, &g, 0);
        free_result(&wanted);
    }
    free_result(&g2);
    free_result(&g);
    finish_narrowed(t, &n);
}

/* exact: the factors are BF16 before.  kernel: see conv_case. */
static void test_rounding(uint64_t *seed, int most, int kernel, int exact)
{
    test_case t = conv_case(seed, most, kernel);
    size_t n = stored(&t.a.out);
    float *dout = (float *)malloc(n*4 + 1);
    double tolerance = exact && !t.a.in[5].data ? 1e-5 : 1.6e-2;
    test_result oracle;
    for (size_t i = 0; i < n; i++) dout[i] = test_float(seed);
    for (int i = 0; exact && i < DPO_MAX_INPUTS; i++) if (t.a.in[i].data) round_off((float *)t.a.in[i].data, stored(&t.a.in[i]));
    if (exact) round_off(dout, n);
    oracle = forward(ways[0], &t);
    check_rounding(&t, tolerance, &oracle, NULL, 0);
    check_rounding(&t, tolerance, &oracle, dout, 0);
    check_rounding(&t, tolerance, &oracle, dout, ~0u);
    check_rounding_half(&t, tolerance, &oracle, dout);
    free_result(&oracle);
    if (!t.a.in[5].data) {                /* an activation, and each sample alone */
        t.a.p.conv.act = DPO_SILU;
        oracle = forward(ways[0], &t);
        check_rounding(&t, tolerance*4, &oracle, NULL, 0);
        free_result(&oracle);
    }
    {
        dpo_backend *before[WAYS];
        memcpy(before, ways, sizeof ways);
        memset(ways, 0, sizeof ways);
        ways[0] = rounding[0];
        check_batch(&t, 0x99);
        memcpy(ways, before, sizeof ways);
    }
    free(dout);
    finish(&t);
}

/* 3x3 kernels whose tiles begin at pixels: 16 of a row, or of the same row of all images in turns, and one where neither
   fills them; chunks of channels, too.  Each sample alone lies otherwise and gives the same bits. */
static void test_turns(uint64_t *seed)
{
    static const int shape[][5] = {       /* N, H, W, I, O */
        { 2, 8, 8, 64, 48 }, { 16, 3, 1, 32, 20 }, { 4, 5, 4, 96, 33 }, { 1, 4, 16, 32, 70 }, { 2, 3, 8, 512, 40 },
        { 3, 5, 6, 64, 24 }, { 2, 5, 48, 32, 130 }
    };
    const int *s = shape[test_int(seed, 0, 6)];
    int64_t N = s[0], H = s[1], W = s[2], O = s[4];
    dpo_backend *before[WAYS];
    test_case t;
    test_result oracle;
    float *dout = (float *)malloc((size_t)(N*H*W*O)*4);
    start_3x3(&t, "3x3 in turns", s, 1, seed);
    for (int i = 0; i < 5; i++) if (t.a.in[i].data) round_off((float *)t.a.in[i].data, stored(&t.a.in[i]));
    for (int64_t i = 0; i < N*H*W*O; i++) dout[i] = test_float(seed);
    round_off(dout, (size_t)(N*H*W*O));
    oracle = forward(ways[0], &t);
    check_rounding(&t, 1e-5, &oracle, NULL, 0);
    check_rounding(&t, 1e-5, &oracle, dout, 0);
    check_rounding_half(&t, 1e-5, &oracle, dout);
    memcpy(before, ways, sizeof ways);
    memset(ways, 0, sizeof ways);
    ways[0] = rounding[0];
    check_batch(&t, 0x19);
    memcpy(ways, before, sizeof ways);
    free_result(&oracle);
    free(dout);
    finish(&t);
}

/* A product in stripes of a few rows, as large pictures take it, gives the same bits. */
static void test_stripes(uint64_t *seed)
{
#ifdef DPOI_SIMD_AMX
    test_case t = conv_case(seed, 9, 70);
    size_t n = stored(&t.a.out);
    float *y = (float *)malloc(n*4), *z = (float *)malloc(n*4), *room;
    int64_t rows = test_int(seed, 1, 4);
    dpoi_cpu *cpu = (dpoi_cpu *)rounding[0]->self;
    dpoi_cpu_product p, q;
    dpoi_conv g;
    for (int i = 5; i < 7; i++) { free(t.a.in[i].data);  t.a.in[i].data = NULL; }
    g = dpoi_conv_of(cpu, &t.a);
    g.y = y;
    p = dpoi_forward_product(cpu, &g, NULL);
    p.room = room = (float *)aligned_alloc(64, ((size_t)dpoi_amx_product_of(&p).room*4 + 127)/64*64);
    dpoi_amx_product_go(&p);
    free(room);
    p.y = z;
    for (int64_t k = 0; k < p.N; k++)
        for (int64_t row = 0; row < p.Y; row += rows) {
            q = dpoi_amx_stripe(&p, k, row, rows);
            q.room = room = (float *)aligned_alloc(64, ((size_t)dpoi_amx_product_of(&q).room*4 + 127)/64*64);
            dpoi_amx_product_go(&q);
            free(room);
        }
    CHECK(!memcmp(y, z, n*4), "%s: stripes of %d rows differ", t.name, (int)rows);
    free(y);
    free(z);
    finish(&t);
#else
    (void)seed;
#endif
}

/* Gradients of weights of a layer with so many rows that they are taken in parts: one of few tiles, one of many. */
static void test_gradient_parts(uint64_t *seed)
{
    static const int shape[2][3] = { { 8500, 1000, 8 }, { 4100, 2100, 20 } };       /* M, I, O */
    for (int k = 0; k < 2; k++) {
        int64_t M = shape[k][0], I = shape[k][1], O = shape[k][2];
        test_case t;
        test_result none;
        char text[64];
        float *dout = (float *)malloc((size_t)(M*O)*4), *x;
        memset(&none, 0, sizeof none);
        snprintf(text, sizeof text, "%dx%d -> %d in parts", (int)M, (int)I, (int)O);
        start(&t, DPO_OP_CONV, text);
        input(&t, 0, view(1, 9973, 1, 1, 1), seed);       /* the numbers of x, again and again */
        round_off((float *)t.a.in[0].data, 9973);
        x = (float *)malloc((size_t)(M*I)*4);
        for (int64_t i = 0; i < M*I; i++) x[i] = ((float *)t.a.in[0].data)[i % 9973];
        free(t.a.in[0].data);
        t.a.in[0] = view(4, 1, 1, M, I);
        t.a.in[0].data = x;
        t.a.in[1] = view(2, O, I, 1, 1);
        t.a.in[1].panel = ways[0]->panel;
        fill(&t.a.in[1], seed);
        t.a.p.conv.stride = 1;  t.a.p.conv.scale = 1;
        t.a.out = view(4, 1, 1, M, O);
        for (int64_t i = 0; i < M*O; i++) dout[i] = test_float(seed);
        round_off(dout, (size_t)(M*O));
        for (unsigned add = 0; add < 4; add += 2) {
            test_result g = backward(ways[0], &t, &none, dout, 2, add), one = backward(rounding[0], &t, &none, dout, 2, add);
            test_result three = backward(rounding[1], &t, &none, dout, 2, add);
            compare(&t, "gradient of weights", &one, &g, 1e-5);
            compare(&t, "gradient of weights, 3 threads", &three, &one, 0);
            free_result(&g);
            free_result(&one);
            free_result(&three);
        }
        free(dout);
        finish(&t);
    }
}

/* isa: DPO_ISA_BEST, or AVX-512 for its products without tiles. */
static void open_rounding(int isa)
{
    for (int w = 0; w < 2; w++) {
        dpo_desc d;
        memset(&d, 0, sizeof d);
        d.threads = w ? 3 : 1;
        d.products = DPO_BF16;
        d.isa = isa;
        rounding[w] = dpo_cpu_open(&d);
        if (!rounding[w] || ((dpoi_cpu *)rounding[w]->self)->rounds) continue;
        SKIP("products of BF16 with %d threads: this machine or build has no such kernels", d.threads);
        rounding[w]->close(rounding[w]->self);
        rounding[w] = NULL;
    }
    if (rounding[0]) {
        dpo_desc d;
        memset(&d, 0, sizeof d);
        d.isa = isa;
        exact_amx = dpo_cpu_open(&d);
    }
}

static void close_rounding(void)
{
    for (int w = 0; w < 2; w++) {
        if (rounding[w]) rounding[w]->close(rounding[w]->self);
        rounding[w] = NULL;
    }
    if (exact_amx) exact_amx->close(exact_amx->self);
    exact_amx = NULL;
}

static void test_group_norm(uint64_t *seed, int act, int64_t P, float offset)
{
    test_case t;
    int64_t G = test_int(seed, 1, 5), C = G*test_int(seed, 1, 12), N = test_int(seed, 1, 4);
    char text[64];
    snprintf(text, sizeof text, "%dx%dx%d, %d groups, offset %g, act %d", (int)N, (int)P, (int)C, (int)G, (double)offset, act);
    start(&t, DPO_OP_GROUP_NORM, text);
    input(&t, 0, view(3, N, P, C, 1), seed);
    for (size_t i = 0; i < stored(&t.a.in[0]); i++) ((float *)t.a.in[0].data)[i] += offset;
    if (test_int(seed, 0, 4)) input(&t, 1, view(1, C, 1, 1, 1), seed);
    if (test_int(seed, 0, 4)) input(&t, 2, view(1, C, 1, 1, 1), seed);
    t.a.p.norm.groups = (int)G;  t.a.p.norm.act = act;  t.a.p.norm.eps = 1e-5f;
    t.a.out = view(3, N, P, C, 1);
    t.stat = view(3, N, G, 2, 1);
    t.tolerance = offset != 0 ? 2e-4 : 1e-5;              /* what the inputs' own rounding is worth */
    t.smooth = offset == 0;
    check_batch(&t, 1);
    check_case(&t, seed);
}

/* mean and deviation of a large group far from zero, against doubles. */
static void test_group_norm_exact(uint64_t *seed)
{
    test_case t;
    const int64_t P = 5000, C = 32;
    double mean = 0, var = 0;
    start(&t, DPO_OP_GROUP_NORM, "5000x32 far from zero");
    input(&t, 0, view(3, 1, P, C, 1), seed);
    for (int64_t i = 0; i < P*C; i++) mean += ((float *)t.a.in[0].data)[i] += 300;
    mean /= (double)(P*C);
    for (int64_t i = 0; i < P*C; i++) var += pow(((float *)t.a.in[0].data)[i] - mean, 2);
    t.a.p.norm.groups = 1;  t.a.p.norm.eps = 1e-6f;
    t.a.out = view(3, 1, P, C, 1);
    t.stat = view(3, 1, 1, 2, 1);
    for (int w = 0; w < WAYS; w++) {
        test_result f;
        double rs = 1/sqrt(var/(double)(P*C) + 1e-6);
        if (!ways[w]) continue;
        f = forward(ways[w], &t);
        CHECK(fabs(f.data[1][0] - mean) < 1e-4, "%s: mean %.8g, not %.8g", t.name, f.data[1][0], mean);
        CHECK(fabs(f.data[1][1] - rs) < 1e-6*rs, "%s: 1/deviation %.8g, not %.8g", t.name, f.data[1][1], rs);
        free_result(&f);
    }
    finish(&t);
}

static void test_layer_norm(uint64_t *seed)
{
    test_case t;
    int64_t R = test_int(seed, 1, 70), C = test_int(seed, 2, 300);
    char text[64];
    snprintf(text, sizeof text, "%dx%d", (int)R, (int)C);
    start(&t, DPO_OP_LAYER_NORM, text);
    input(&t, 0, view(2, R, C, 1, 1), seed);
    if (test_int(seed, 0, 4)) input(&t, 1, view(1, C, 1, 1, 1), seed);
    if (test_int(seed, 0, 4)) input(&t, 2, view(1, C, 1, 1, 1), seed);
    t.a.p.norm.eps = 1e-5f;
    t.a.out = view(2, R, C, 1, 1);
    t.stat = view(2, R, 2, 1, 1);
    t.tolerance = 1e-5;
    check_batch(&t, 1);
    check_case(&t, seed);
}

/* Heads of up to `deep` channels, sequences of up to `most`; many: 16 heads in all, which no one cuts further. */
static test_case attention_case(uint64_t *seed, int many, int deep, int most)
{
    test_case t;
    int64_t N = many ? 2 : test_int(seed, 1, 3), heads = many ? 8 : test_int(seed, 1, 4);
    int64_t D = heads*test_int(seed, 1, deep);
    int causal = test_int(seed, 0, 1);
    int64_t T = test_int(seed, 1, most), S = causal ? T : test_int(seed, 1, most);
    char text[64];
    snprintf(text, sizeof text, "%dx%dx%d, %d keys, %d heads%s", (int)N, (int)T, (int)D, (int)S, (int)heads, causal ? ", causal" : "");
    start(&t, DPO_OP_ATTENTION, text);
    input(&t, 0, view(3, N, T, D, 1), seed);
    input(&t, 1, view(3, N, S, D, 1), seed);
    input(&t, 2, view(3, N, S, D, 1), seed);
    t.a.p.attention.heads = (int)heads;  t.a.p.attention.causal = causal;
    t.a.p.attention.scale = (float)(1/sqrt((double)(D/heads)));
    t.a.out = view(3, N, T, D, 1);
    t.stat = view(3, N, heads, T, 1);
    t.tolerance = 1e-5;
    return t;
}

static void test_attention(uint64_t *seed)
{
    test_case t = attention_case(seed, 0, 40, 50);
    check_batch(&t, 7);
    check_case(&t, seed);
}

/* Sequences of several units, and heads whose keys are cut into parts in backward. */
static void test_attention_long(uint64_t *seed)
{
    test_case t = attention_case(seed, 0, 60, 300);
    t.smooth = 0;
    check_case(&t, seed);
}

/* Scores that grow along the keys, by hundreds: the largest of the first keys is far too small for the last. */
static void test_attention_growing(uint64_t *seed, int most)
{
    test_case t = attention_case(seed, 0, 40, most);
    test_result f;
    int64_t D = t.a.in[1].shape[2], S = t.a.in[1].shape[1];
    float *q = (float *)t.a.in[0].data, *k = (float *)t.a.in[1].data;
    for (size_t i = 0; i < stored(&t.a.in[1]); i++) k[i] *= 1 + 200.0f*(float)((int64_t)i/D % S)/(float)S;
    for (int i = 0; i < 3; i++) round_off((float *)t.a.in[i].data, stored(&t.a.in[i]));
    for (size_t i = 0; i < stored(&t.a.in[0]); i++) q[i] *= 4;
    f = forward(ways[0], &t);
    for (int w = 1; w < WAYS; w++) {
        test_result g;
        if (!ways[w]) continue;
        g = forward(ways[w], &t);
        compare(&t, "growing scores", &g, &f, 1e-3);
        free_result(&g);
    }
    check_rounding(&t, 8e-3, &f, NULL, 0);
    free_result(&f);
    finish(&t);
}

/* Numbers of BF16, of which only the probabilities and their slopes are rounded: 2^-9 of what they weigh. */
static void test_attention_rounding(uint64_t *seed, int many, int deep, int most)
{
    test_case t = attention_case(seed, many, deep, most), n;
    dpo_backend *before[WAYS];
    test_result f, g, wanted;
    size_t numbers = stored(&t.a.out);
    float *dout = (float *)malloc(numbers*4 + 1);
    for (int i = 0; i < 3; i++) round_off((float *)t.a.in[i].data, stored(&t.a.in[i]));
    for (size_t i = 0; i < numbers; i++) dout[i] = test_float(seed);
    round_off(dout, numbers);
    f = forward(ways[0], &t);
    check_rounding(&t, 8e-3, &f, NULL, 0);
    check_rounding(&t, 1e-2, &f, dout, 0);
    check_rounding(&t, 1e-2, &f, dout, ~0u);
    n = narrowed(&t, DPO_BF16);
    half_on(exact_amx, &t, &n, DPO_BF16, &f, 1e-2);
    wanted = backward(ways[0], &t, &f, dout, ~0u, 0);
    g = backward(exact_amx, &n, &f, dout, ~0u, 0);
    compare(&t, "backward in bf16", &g, &wanted, 1e-2);
    free_result(&g);
    free_result(&wanted);
    finish_narrowed(&t, &n);
    free_result(&f);
    free(dout);
    memcpy(before, ways, sizeof ways);
    memset(ways, 0, sizeof ways);
    ways[0] = rounding[0];
    check_batch(&t, 7);
    memcpy(ways, before, sizeof ways);
    finish(&t);
}

static void test_geglu(uint64_t *seed)
{
    test_case t;
    int64_t R = test_int(seed, 1, 60), D = test_int(seed, 1, 200);
    start(&t, DPO_OP_GEGLU, "");
    input(&t, 0, view(2, R, 2*D, 1, 1), seed);
    t.a.out = view(2, R, D, 1, 1);
    check_batch(&t, 1);
    check_case(&t, seed);
}

static void test_act(uint64_t *seed, int act)
{
    test_case t;
    int64_t R = test_int(seed, 1, 7), C = test_int(seed, 1, 9000);
    char text[64];
    float *x;
    snprintf(text, sizeof text, "%d, %dx%d", act, (int)R, (int)C);
    start(&t, DPO_OP_ACT, text);
    input(&t, 0, view(2, R, C, 1, 1), seed);
    x = (float *)t.a.in[0].data;
    for (int64_t i = 0; i < R*C; i++) {
        if (act == DPO_LOG || act == DPO_SQRT) x[i] = fabsf(x[i]) + 0.3f;
        else if (act == DPO_ABS || act == DPO_RELU) x[i] += x[i] > 0 ? 0.1f : -0.1f;
        else x[i] *= 2;
    }
    t.a.p.act.act = act;
    t.a.out = view(2, R, C, 1, 1);
    t.smooth = act != DPO_EXP;
    check_batch(&t, 1);
    check_case(&t, seed);
}

/* Far out: no overflow to NaN, the right limits. */
static void test_act_limits(void)
{
    static const float x[8] = { -1e30f, -200, -100, -88.5f, 88.5f, 100, 200, 1e30f };
    static const int acts[4] = { DPO_SILU, DPO_GELU, DPO_QUICK_GELU, DPO_SIGMOID };
    for (int k = 0; k < 4; k++)
        for (int w = 0; w < WAYS; w++) {
            test_case t;
            test_result f, g;
            float ones[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 };
            if (!ways[w]) continue;
            start(&t, DPO_OP_ACT, "limits");
            t.a.in[0] = t.a.out = view(1, 9, 1, 1, 1);
            t.a.in[0].data = malloc(36);
            memcpy(t.a.in[0].data, x, 32);
            ((float *)t.a.in[0].data)[8] = NAN;
            t.a.p.act.act = acts[k];
            f = forward(ways[w], &t);
            g = backward(ways[w], &t, &f, ones, 1, 0);
            for (int i = 0; i < 8; i++) {
                double want = x[i] < 0 ? 0 : acts[k] == DPO_SIGMOID ? 1 : x[i];
                CHECK(fabs(f.data[0][i] - want) <= 1e-6*fabs(want) + 1e-30, "%s, %s: act %d of %g is %g", t.name,
                      isa_names[w/2], acts[k], (double)x[i], (double)f.data[0][i]);
                CHECK(fabs(g.data[2][i] - (acts[k] != DPO_SIGMOID && x[i] > 0)) < 1e-6, "%s, %s: slope %d of %g is %g",
                      t.name, isa_names[w/2], acts[k], (double)x[i], (double)g.data[2][i]);
            }
            CHECK(isnan(f.data[0][8]) && isnan(g.data[2][8]), "%s, %s: act %d loses a NaN", t.name, isa_names[w/2], acts[k]);
            free_result(&f);
            free_result(&g);
            finish(&t);
        }
}

static void test_binary(uint64_t *seed, int fn)
{
    test_case t;
    dpo_view a = view(4, 1, 1, 1, 1), b = a, y = a;
    char text[96];
    for (int i = 0; i < 4; i++) {
        int64_t n = i == 3 ? test_int(seed, 1, 330) : test_int(seed, 1, 5);
        int kind = test_int(seed, 0, 5);
        y.shape[i] = n;
        a.shape[i] = kind == 0 ? 1 : n;
        b.shape[i] = kind == 1 ? 1 : n;
    }
    snprintf(text, sizeof text, "%d, %dx%dx%dx%d with %dx%dx%dx%d", fn, (int)a.shape[0], (int)a.shape[1], (int)a.shape[2],
             (int)a.shape[3], (int)b.shape[0], (int)b.shape[1], (int)b.shape[2], (int)b.shape[3]);
    start(&t, DPO_OP_BINARY, text);
    input(&t, 0, a, seed);
    input(&t, 1, b, seed);
    for (size_t i = 0; i < stored(&b) && fn == DPO_DIV; i++) {
        float *x = (float *)t.a.in[1].data + i;
        *x += *x < 0 ? -1.0f : 1.0f;
    }
    t.a.p.binary.fn = fn;
    t.a.out = y;
    check_case(&t, seed);
}

static void test_affine(uint64_t *seed)
{
    test_case t;
    int64_t n = test_int(seed, 1, 40000);
    start(&t, DPO_OP_AFFINE, "");
    input(&t, 0, view(1, n, 1, 1, 1), seed);
    t.a.p.affine.scale = 0.7f;  t.a.p.affine.shift = -0.2f;
    t.a.out = view(1, n, 1, 1, 1);
    check_case(&t, seed);
    start(&t, DPO_OP_CLAMP, "");
    input(&t, 0, view(1, n, 1, 1, 1), seed);
    t.a.p.clamp.low = -0.5f;  t.a.p.clamp.high = 0.8f;
    t.a.out = view(1, n, 1, 1, 1);
    t.smooth = 0;
    check_case(&t, seed);
    start(&t, DPO_OP_LERP, "");
    input(&t, 0, view(1, n, 1, 1, 1), seed);
    t.a.out = view(1, n, 1, 1, 1);
    fill(&t.a.out, seed);
    t.a.p.lerp.rate = 0.01f;
    t.in_out = 1;
    check_case(&t, seed);
}

static void test_sum(uint64_t *seed, int64_t A, int64_t n, int64_t B)
{
    test_case t;
    char text[64];
    snprintf(text, sizeof text, "%dx%dx%d", (int)A, (int)n, (int)B);
    start(&t, DPO_OP_SUM, text);
    input(&t, 0, view(3, A, n, B, 1), seed);
    t.a.p.sum.scale = 0.3f;
    t.a.out = view(3, A, 1, B, 1);
    check_batch(&t, 1);
    check_case(&t, seed);
}

static void test_concat(uint64_t *seed)
{
    test_case t;
    int64_t A = test_int(seed, 1, 9), n = test_int(seed, 1, 9), m = test_int(seed, 1, 9), B = test_int(seed, 1, 40);
    int64_t from = test_int(seed, 0, (int)n - 1), count = test_int(seed, 1, (int)(n - from));
    start(&t, DPO_OP_CONCAT, "");
    input(&t, 0, view(3, A, n, B, 1), seed);
    input(&t, 1, view(3, A, m, B, 1), seed);
    t.a.out = view(3, A, n + m, B, 1);
    check_case(&t, seed);
    start(&t, DPO_OP_SLICE, "");
    input(&t, 0, view(3, A, n, B, 1), seed);
    t.a.p.slice.from = from;
    t.a.out = view(3, A, count, B, 1);
    check_case(&t, seed);
}

static void test_upsample(uint64_t *seed)
{
    test_case t;
    int64_t N = test_int(seed, 1, 3), H = test_int(seed, 1, 7), W = test_int(seed, 1, 7), C = test_int(seed, 1, 40);
    int64_t Y = test_int(seed, 1, 15), X = test_int(seed, 1, 15);
    char text[64];
    snprintf(text, sizeof text, "%dx%d to %dx%d", (int)H, (int)W, (int)Y, (int)X);
    start(&t, DPO_OP_UPSAMPLE, text);
    input(&t, 0, view(4, N, H, W, C), seed);
    t.a.out = view(4, N, Y, X, C);
    check_batch(&t, 1);
    check_case(&t, seed);
}

static void test_embed(uint64_t *seed)
{
    test_case t;
    int64_t V = test_int(seed, 1, 40), D = test_int(seed, 1, 300), R = test_int(seed, 1, 60);
    start(&t, DPO_OP_EMBED, "");
    input(&t, 0, view(2, V, D, 1, 1), seed);
    input_ids(&t, 1, R, -2, (int)V + 1, seed);
    t.a.out = view(2, R, D, 1, 1);
    check_case(&t, seed);
}

static void test_timestep(uint64_t *seed)
{
    test_case t;
    int64_t N = test_int(seed, 1, 5), dim = test_int(seed, 2, 70);
    float *p;
    test_result f;
    start(&t, DPO_OP_TIMESTEP, "");
    input(&t, 0, view(1, N, 1, 1, 1), seed);
    p = (float *)t.a.in[0].data;
    for (int64_t n = 0; n < N; n++) p[n] = (float)test_int(seed, 0, 999);
    t.a.out = view(2, N, dim, 1, 1);
    f = forward(ways[0], &t);
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < dim/2; i++) {
            double phase = p[n]*exp(-log(10000.0)*(double)i/(double)(dim/2));
            CHECK(fabs(f.data[0][n*dim + i] - cos(phase)) < 2e-4 && fabs(f.data[0][n*dim + dim/2 + i] - sin(phase)) < 2e-4,
                  "%s: t %g, %d of %d", t.name, (double)p[n], (int)i, (int)dim);
        }
    free_result(&f);
    t.smooth = 0;
    check_case(&t, seed);
}

static void test_mix(uint64_t *seed)
{
    test_case t;
    int64_t N = test_int(seed, 1, 5), P = test_int(seed, 1, 20000);
    start(&t, DPO_OP_MIX, "");
    input(&t, 0, view(2, N, P, 1, 1), seed);
    input(&t, 1, view(2, N, P, 1, 1), seed);
    input(&t, 2, view(1, 7, 1, 1, 1), seed);
    input(&t, 3, view(1, 7, 1, 1, 1), seed);
    input_ids(&t, 4, N, -1, 8, seed);
    t.a.out = view(2, N, P, 1, 1);
    check_batch(&t, 0x13);
    check_case(&t, seed);
    start(&t, DPO_OP_MSE, "");
    input(&t, 0, view(2, N, P, 1, 1), seed);
    input(&t, 1, view(2, N, P, 1, 1), seed);
    t.a.out = view(1, N, 1, 1, 1);
    t.tolerance = 1e-6;
    check_batch(&t, 3);
    check_case(&t, seed);
}

static void test_randn(uint64_t *seed)
{
    static const uint32_t kat[3][10] = {                  /* Random123's known answers: counter, key, numbers */
        { 0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 },
        { ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd },
        { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0,
          0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } };
    test_case t;
    test_result f;
    double moment[4] = { 0, 0, 0, 0 };
    const int64_t N = 3, P = 70001;
    for (int k = 0; k < 3; k++) {
        uint32_t out[4];
        dpoi_philox(kat[k] + 4, kat[k], out);
        CHECK(!memcmp(out, kat[k] + 6, 16), "philox: known answer %d", k);
    }
    start(&t, DPO_OP_RANDN, "");
    input_ids(&t, 0, N, -1000, 1000, seed);
    t.a.p.random.seed = test_random(seed);  t.a.p.random.purpose = 3;  t.a.p.random.step = 77;
    t.a.out = view(2, N, P, 1, 1);
    f = forward(ways[0], &t);
    for (int64_t i = 0; i < N*P; i++)
        for (int k = 0; k < 4; k++) moment[k] += pow(f.data[0][i], k + 1)/(double)(N*P);
    CHECK(fabs(moment[0]) < 0.01 && fabs(moment[1] - 1) < 0.015 && fabs(moment[2]) < 0.03 && fabs(moment[3] - 3) < 0.1,
          "randn: moments %g %g %g %g", moment[0], moment[1], moment[2], moment[3]);
    free_result(&f);
    t.tolerance = 1e-30;
    t.smooth = 0;
    check_batch(&t, 1);
    check_case(&t, seed);
}

static void test_preference(uint64_t *seed, int kind)
{
    test_case t;
    int64_t B = test_int(seed, 1, 6);
    test_result f;
    double loss = 0;
    start(&t, DPO_OP_PREFERENCE, "");
    input(&t, 0, view(1, 2*B, 1, 1, 1), seed);
    input(&t, 1, view(1, 2*B, 1, 1, 1), seed);
    if (test_int(seed, 0, 1)) input(&t, 2, view(1, B, 1, 1, 1), seed);
    t.a.p.preference.kind = kind;  t.a.p.preference.beta = 1.3f;
    t.a.p.preference.smoothing = kind == DPO_PREF_SIGMOID ? 0.1f : 0;
    t.a.out = view(1, 1, 1, 1, 1);
    t.stat = view(2, 2, B, 1, 1);
    f = forward(ways[0], &t);
    for (int64_t b = 0; b < B; b++) {
        const float *L = (float *)t.a.in[0].data, *R = (float *)t.a.in[1].data, *w = (float *)t.a.in[2].data;
        double margin = -((L[b] - L[B + b]) - (R[b] - R[B + b])), in = 0.5*1.3f*margin, s = 0.1f;
        double one = kind == DPO_PREF_HINGE ? fmax(0, 1 - in) : kind == DPO_PREF_IPO ? (in - 0.5)*(in - 0.5)
                   : (1 - s)*log1p(exp(-in)) + s*log1p(exp(in));
        loss += (w ? w[b] : 1)*one/(double)B;
        CHECK(fabs(f.data[1][b] - in) < 1e-5, "%s: inside %g, not %g", t.name, (double)f.data[1][b], in);
    }
    CHECK(fabs(f.data[0][0] - loss) < 1e-5*(1 + fabs(loss)), "%s %d: loss %g, not %g", t.name, kind, (double)f.data[0][0], loss);
    free_result(&f);
    t.smooth = kind != DPO_PREF_HINGE;
    check_case(&t, seed);
}

/* Sums of squares -> clip -> adamw, against doubles. */
static void test_optimizer(uint64_t *seed, float max_norm)
{
    test_case s, t;
    int64_t n = test_int(seed, 1, 50000);
    float record[DPO_REC_COUNT] = { 1e-2f, 0.19f, 0.002f, 0, 0, 5, 0, 0 }, *p[4];
    test_result f, c;
    double sum = 0, factor;
    start(&s, DPO_OP_SUM_SQUARES, "");
    input(&s, 0, view(1, n, 1, 1, 1), seed);
    for (int64_t i = 0; i < n; i++) sum += pow(((float *)s.a.in[0].data)[i], 2);
    s.a.out = view(1, 1, 1, 1, 1);
    f = forward(ways[0], &s);
    CHECK(fabs(f.data[0][0] - sum) <= 1e-6*sum, "sum of squares: %g, not %g", (double)f.data[0][0], sum);

    start(&t, DPO_OP_CLIP, "");
    t.a.in[0] = view(1, 1, 1, 1, 1);
    t.a.in[0].data = block(f.data[0], 1);
    t.a.out = view(1, DPO_REC_COUNT, 1, 1, 1);
    t.a.out.data = block(record, DPO_REC_COUNT);
    t.a.p.clip.max_norm = max_norm;
    t.in_out = 1;
    c = forward(ways[0], &t);
    factor = max_norm > 0 ? fmin(1, max_norm/(sqrt(sum) + 1e-6)) : 1;
    CHECK(fabs(c.data[0][DPO_REC_FACTOR] - factor) < 1e-6 && fabs(c.data[0][DPO_REC_NORM] - sqrt(sum)) <= 1e-6*sqrt(sum) &&
          c.data[0][DPO_REC_SKIPPED] == 5 && c.data[0][DPO_REC_LR] == record[0], "clip: factor %g", (double)c.data[0][DPO_REC_FACTOR]);
    memcpy(record, c.data[0], sizeof record);
    free_result(&c);
    for (int bad = 0; bad < 2; bad++) {
        *(float *)t.a.in[0].data = bad ? INFINITY : NAN;
        c = forward(ways[0], &t);
        CHECK(c.data[0][DPO_REC_FACTOR] == 0 && c.data[0][DPO_REC_SKIPPED] == 6, "clip: a bad norm is not skipped");
        free_result(&c);
    }
    *(float *)t.a.in[0].data = f.data[0][0];
    check_case(&t, seed);
    free_result(&f);
    check_case(&s, seed);

    start(&t, DPO_OP_ADAMW, "");
    for (int i = 0; i < 3; i++) input(&t, i, view(1, n, 1, 1, 1), seed);
    t.a.in[3] = view(1, DPO_REC_COUNT, 1, 1, 1);
    t.a.in[3].data = block(record, DPO_REC_COUNT);
    t.a.out = view(1, n, 1, 1, 1);
    fill(&t.a.out, seed);
    t.a.p.adamw.beta1 = 0.9f;  t.a.p.adamw.beta2 = 0.999f;  t.a.p.adamw.eps = 1e-8f;  t.a.p.adamw.weight_decay = 0.01f;
    t.in_out = 1;
    for (int i = 0; i < 3; i++) p[i] = (float *)t.a.in[i].data;
    p[3] = (float *)t.a.out.data;
    for (int64_t i = 0; i < n; i++) p[2][i] = p[2][i]*p[2][i]*1e-3f;
    f = forward(ways[0], &t);
    sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double g = record[DPO_REC_FACTOR]*(double)p[0][i], m = 0.9*p[1][i] + 0.1*g, v = 0.999*p[2][i] + 0.001*g*g;
        double w = p[3][i]*(1 - 1e-4) - 1e-2*(m/0.19)/(sqrt(v/0.002) + 1e-8);
        sum = fmax(sum, fabs(w - f.data[0][i])/(1 + fabs(w)) + fabs(m - f.data[3][i]) + fabs(v - f.data[4][i]));
    }
    CHECK(sum < 2e-5, "adamw: off by %g", sum);
    free_result(&f);
    ((float *)t.a.in[3].data)[DPO_REC_FACTOR] = 0;
    f = forward(ways[0], &t);
    CHECK(!memcmp(f.data[0], p[3], (size_t)n*4) && !memcmp(f.data[3], p[1], (size_t)n*4) && !memcmp(f.data[4], p[2], (size_t)n*4),
          "adamw: a skipped step moves something");
    free_result(&f);
    ((float *)t.a.in[3].data)[DPO_REC_FACTOR] = record[DPO_REC_FACTOR];
    check_case(&t, seed);
}

/* Every F16 and BF16 there is, and rounding between them. */
static void test_numbers(void)
{
    int bad = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = dpoi_f16_to_f32((uint16_t)h), b = dpoi_bf16_to_f32((uint16_t)h);
        uint32_t e = h >> 10 & 31, m = h & 1023;
        double want = ldexp(e ? 1024 + m : m, (int)(e ? e : 1) - 25)*(h >> 15 ? -1 : 1);
        if (e < 31 && x != want) bad++;
        if (e == 31 && (m ? x == x : !isinf(x))) bad++;
        if (x == x ? dpoi_f32_to_f16(x) != h : (dpoi_f32_to_f16(x) & 0x7c00) != 0x7c00 || !(dpoi_f32_to_f16(x) & 1023)) bad++;
        if (b == b ? dpoi_f32_to_bf16(b) != h : dpoi_f32_to_bf16(b) != (h | 0x40)) bad++;
        if (e < 30) {                                     /* halfway to the next one: to even; a little more: up */
            float next = dpoi_f16_to_f32((uint16_t)(h + 1)), half_way = (x + next)/2;
            if (dpoi_f32_to_f16(half_way) != (h & 1 ? h + 1 : h)) bad++;
            if (dpoi_f32_to_f16(nextafterf(half_way, next)) != h + 1) bad++;
            if (dpoi_f32_to_f16(nextafterf(half_way, x)) != h) bad++;
        }
    }
    CHECK(!bad, "half precision: %d conversions are wrong", bad);
    CHECK(dpoi_f32_to_f16(65519.996f) == 0x7bff && dpoi_f32_to_f16(65520.0f) == 0x7c00, "half precision: overflow");
    CHECK(dpoi_f32_to_bf16(3.4e38f) == 0x7f80, "bf16: overflow");
    CHECK(dpoi_f32_to_f16(1e-9f) == 0 && dpoi_f32_to_f16(-1e-9f) == 0x8000, "half precision: underflow");
}

/* The rows' own conversions agree with those, and copies between types. */
static void test_copy(uint64_t *seed)
{
    for (int w = 0; w < WAYS; w++)
        for (int from = 0; from < 3; from++)
            for (int to = 0; to < 3; to++) {
                int n = test_int(seed, 1, 40000), differ = 0;
                float *x = (float *)malloc((size_t)n*4), *y = (float *)malloc((size_t)n*4 + 1), *z = (float *)malloc((size_t)n*4);
                dpo_args a;
                if (ways[w]) {
                    memset(&a, 0, sizeof a);
                    a.op = DPO_OP_COPY;
                    a.in[0] = a.out = view(1, n, 1, 1, 1);
                    a.in[0].dtype = from;  a.out.dtype = to;
                    a.in[0].data = malloc(bytes_of(&a.in[0]) + 1);
                    a.out.data = malloc(bytes_of(&a.out) + 1);
                    for (int i = 0; i < n; i++) {
                        uint32_t bits = (uint32_t)test_random(seed);
                        x[i] = i % 3 ? test_float(seed)*(i % 5 ? 1 : 1e-6f) : dpoi_float_of(bits);
                    }
                    dpoi_narrow(from, n, x, a.in[0].data);
                    dpoi_widen(from, n, a.in[0].data, x);
                    CHECK(call(ways[w], &a) == DPO_OK, "COPY fails");
                    dpoi_widen(to, n, a.out.data, y);
                    for (int i = 0; i < n; i++) {
                        uint16_t h;
                        dpoi_narrow(to, 1, x + i, to == DPO_F32 ? (void *)(z + i) : (void *)&h);
                        if (to != DPO_F32) dpoi_widen(to, 1, &h, z + i);
                        differ += memcmp(&y[i], &z[i], 4) && !(y[i] != y[i] && z[i] != z[i]);
                    }
                    CHECK(!differ, "COPY %d to %d, %s: %d of %d differ", from, to, isa_names[w/2], differ, n);
                    free(a.in[0].data);
                    free(a.out.data);
                }
                free(x);
                free(y);
                free(z);
            }
}

/* ------------------------------------------------------------------------------------------ */

static void host_parallel(void *user, int64_t n, void (*task)(void *arg, int64_t i), void *arg)
{
    *(int *)user += 1;
    for (int64_t i = n - 1; i >= 0; i--) task(arg, i);    /* any order will do */
}

/* The host's own parallel for replaces the library's threads. */
static void test_hook(uint64_t *seed)
{
    dpo_desc d;
    dpo_backend *b;
    test_case t;
    test_result r, o;
    int calls = 0;
    memset(&d, 0, sizeof d);
    d.threads = 4;  d.isa = DPO_ISA_PLAIN;  d.parallel = host_parallel;  d.user = &calls;
    b = dpo_cpu_open(&d);
    start(&t, DPO_OP_ACT, "with the host's threads");
    input(&t, 0, view(1, 100001, 1, 1, 1), seed);
    t.a.p.act.act = DPO_SILU;
    t.a.out = view(1, 100001, 1, 1, 1);
    r = forward(b, &t);
    o = forward(ways[0], &t);
    compare(&t, "", &r, &o, 0);
    CHECK(calls == 1, "the host's threads were called %d times", calls);
    free_result(&r);
    free_result(&o);
    finish(&t);
    b->close(b->self);
}

/* ------------------------------------------------------------------------------------------ what is not finite */

/* Numbers that are not finite in the oracle's result and are in r. */
static int hidden(const test_result *oracle, const test_result *r)
{
    int n = 0;
    for (int i = 0; i < DPO_MAX_INPUTS + 2; i++)
        for (size_t e = 0; oracle->data[i] && r->data[i] && e < oracle->count[i]; e++)
            n += !isfinite(oracle->data[i][e]) && isfinite(r->data[i][e]);
    return n;
}

/* One number of one input, or (input -1) of dout, is bad: where plain C says so, all others do, in what is made of it. */
static void check_spoiled(const test_case *t, int input, float bad, uint64_t *seed)
{
    size_t n = stored(&t->a.out), size = input < 0 ? n : stored(&t->a.in[input]);
    float *dout = (float *)malloc(n*4), *x = input < 0 ? dout : (float *)t->a.in[input].data, before;
    size_t at = (size_t)test_int(seed, 0, (int)size - 1);
    test_result f, g;
    for (size_t i = 0; i < n; i++) dout[i] = test_float(seed);
    before = x[at];
    x[at] = bad;
    f = forward(ways[0], t);
    g = backward(ways[0], t, &f, dout, ~0u, 0);
    for (int w = 2; w < WAYS + 2; w += 2) {
        dpo_backend *b = w < WAYS ? ways[w] : rounding[0];
        test_result r, s;
        if (!b) continue;
        r = forward(b, t);
        s = backward(b, t, &r, dout, ~0u, 0);
        CHECK(!hidden(&f, &r), "%s, %s: %g in input %d is lost in %d results", t->name, w < WAYS ? isa_names[w/2] : "BF16",
              (double)bad, input, hidden(&f, &r));
        CHECK(!hidden(&g, &s), "%s, %s: %g in input %d is lost in %d gradients", t->name,
              w < WAYS ? isa_names[w/2] : "BF16", (double)bad, input, hidden(&g, &s));
        free_result(&r);
        free_result(&s);
    }
    x[at] = before;
    free_result(&f);
    free_result(&g);
    free(dout);
}

static void test_spoiled(uint64_t *seed)
{
    static const int shape[5] = { 2, 9, 8, 32, 20 };
    for (int k = 0; k < 3; k++) {
        test_case t;
        if (k == 0) t = conv_case(seed, 99, 3);
        else if (k == 1) start_3x3(&t, "3x3 with a bad number", shape, 1, seed);
        else t = attention_case(seed, 0, 40, 90);
        for (int i = -1; i < 3; i++)
            for (int bad = 0; bad < 2; bad++)
                if (i < 0 || t.a.in[i].data) check_spoiled(&t, i, bad ? INFINITY : NAN, seed);
        finish(&t);
    }
}

static void open_ways(void)
{
    for (int w = 0; w < WAYS; w++) {
        dpo_desc d;
        memset(&d, 0, sizeof d);
        d.isa = DPO_ISA_PLAIN + w/2;
        d.threads = w % 2 ? 3 : 1;
        ways[w] = dpo_cpu_open(&d);
        if (ways[w] && ((dpoi_cpu *)ways[w]->self)->isa != d.isa) {
            SKIP("%s with %d threads: this machine or build has no such kernels", isa_names[w/2], d.threads);
            ways[w]->close(ways[w]->self);
            ways[w] = NULL;
        }
    }
}

static void one_round(uint64_t *seed)
{
    test_conv(seed);
    test_group_norm(seed, test_int(seed, 0, 1) ? DPO_SILU : DPO_NONE, test_int(seed, 1, 90), 0);
    test_layer_norm(seed);
    test_attention(seed);
    test_geglu(seed);
    test_act(seed, test_int(seed, DPO_NONE, DPO_ACTS - 1));
    test_binary(seed, test_int(seed, DPO_ADD, DPO_DIV));
    test_sum(seed, test_int(seed, 1, 5), test_int(seed, 1, 60), test_int(seed, 1, 2) == 1 ? 1 : test_int(seed, 2, 600));
    test_concat(seed);
    test_upsample(seed);
    test_embed(seed);
    test_preference(seed, test_int(seed, DPO_PREF_SIGMOID, DPO_PREF_IPO));
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    int rounds = argc > 1 ? atoi(argv[1]) : 25;
    open_ways();
    test_numbers();
    for (int i = 0; i < rounds; i++) one_round(&seed);
    for (int i = 0; i < 3; i++) {
        test_affine(&seed);
        test_mix(&seed);
        test_timestep(&seed);
        test_optimizer(&seed, i == 1 ? 0.0f : i ? 1.0f : 1e9f);
    }
    for (int act = DPO_NONE; act < DPO_ACTS; act++) test_act(&seed, act);
    test_act_limits();
    for (int i = 0; i < 14; i++) test_winograd(&seed, i);
    for (int i = 0; i < 4; i++) test_attention_long(&seed);
    test_group_norm(&seed, DPO_SILU, 2500, 0);            /* many chunks */
    test_group_norm(&seed, DPO_NONE, 3001, 40);
    test_group_norm_exact(&seed);
    test_sum(&seed, 2, 70000, 1);
    test_randn(&seed);
    test_copy(&seed);
    test_hook(&seed);
    for (int isa = DPO_ISA_BEST; isa <= DPO_ISA_AVX512; isa += DPO_ISA_AVX512 - DPO_ISA_BEST) {
        open_rounding(isa);
        for (int i = 0; i < 12; i++) test_spoiled(&seed);
        if (isa == DPO_ISA_BEST && rounding[0] && rounding[1]) test_gradient_parts(&seed);
        for (int i = 0; rounding[0] && rounding[1] && i < 2*rounds; i++) {
            test_rounding(&seed, i % 8 == 0 ? 1500 : i % 2 ? 40 : 99, i % 5 == 1 ? 1 : 6, i % 4 != 3);
            test_stripes(&seed);
            test_turns(&seed);
            if (((dpoi_cpu *)rounding[0]->self)->isa < DPO_ISA_AMX) continue;
            test_attention_rounding(&seed, 0, i % 4 ? 40 : 170, i % 4 ? 50 : 600);
            if (!i) test_attention_rounding(&seed, 1, 20, 600);
            test_attention_growing(&seed, 600);
        }
        close_rounding();
    }
    for (int w = 0; w < WAYS; w++) if (ways[w]) ways[w]->close(ways[w]->self);
    return test_report();
}
