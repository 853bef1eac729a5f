/* checks.c - what the CUDA backend promises beside its numbers: steps that are replayed, memory, errors; and every op in every
   type against the CPU.

   build   sh tests/test_cuda.sh builds it: with the stand-in (-DSTAND_IN), or with nvcc for the GPU that is there
   run     build/cuda/checks [seed [rounds|quick [part]]]     from the project's folder; part: "replay", say                                                      */
#define main tiny_model_main
#include "../tiny_model.c"
#undef main
#include "../dpo_test.h"

#define FOLDER "build/cuda/checks.tmp"
#define TINY   FOLDER "/tiny"

#ifdef STAND_IN
typedef struct stand_in_control {         /* as in cuda_stand_in.h */
    int    devices, driver, major, minor, order, deny_alloc, deny_launch, deny_product, deny_call, no_products;
    size_t memory, used;
    int    allocs, launches, graphs, events, waits, queued;
} stand_in_control;
extern stand_in_control *stand_in(void);
#endif

static uint64_t first_seed = 1;
static int      rounds = 34*3;
static int      quick;                    /* the same kinds, fewer of them */
static const char *only;                  /* part of the name of what is wanted */

static const char *why(dpo_ctx *c) { return dpo_error(c) ? dpo_error(c) : "no error"; }

/* ---- a small run ------------------------------------------------------------------------------------------------ */

static dpo_pairs *some_pairs(dpo_ctx *c, int n)
{
    dpo_pairs *p = dpo_pairs_new(c);
    for (int i = 0; i < n; i++) {
        dpo_image x[2];
        char      prompt[32];
        memset(x, 0, sizeof x);
        snprintf(prompt, sizeof prompt, "thing %d", i / 2);
        for (int k = 0; k < 2; k++) {
            uint64_t state = (uint64_t)(2*i + k);
            if (!dpo_image_new(c, 8, 8, &x[k])) return NULL;
            for (int e = 0; e < 8*8*3; e++) x[k].rgb[e] = (uint8_t)(test_random(&state) % 160 + (k ? 0 : 95));
        }
        dpo_pairs_add(p, prompt, &x[0], &x[1], 1);
        for (int k = 0; k < 2; k++) dpo_image_free(c, &x[k]);
    }
    return p;
}

typedef struct outcome { float *v; int64_t n; int graphs, allocs, told, waits, ahead; float loss[16]; } outcome;

/* Of a run that waits for no step: losses as they are told; how often the host waited for all of the stream from the third
   report on, and how often the next step was on the stream already. */
static int tell(void *user, const dpo_progress *p)
{
    outcome *o = (outcome *)user;
    if (p->step == o->told + 1) o->loss[o->told % 16] = p->loss;
    o->told++;
#ifdef STAND_IN
    if (p->step == 3) { o->waits = stand_in()->waits; o->allocs = stand_in()->allocs; }
    if (p->step >= 3 && p->step + 2 <= p->steps) o->ahead += stand_in()->queued > 0;
    if (p->step + 2 == p->steps) { o->waits = stand_in()->waits - o->waits; o->allocs = stand_in()->allocs - o->allocs; }
#endif
    return 0;
}

/* Trains `steps` steps on a backend; allocs: what was asked of the device after the third step; late: nobody waits for a
   step's figures. */
static outcome train(dpo_backend *b, int rank, int steps, float average, int late)
{
    outcome        out;
    dpo_desc       desc;
    dpo_train_desc d = dpo_recipe_small();
    dpo_progress   e;
    dpo_ctx       *c;
    dpo_model     *m;
    dpo_trainer   *t;
    dpo_tensor   **x;
    int            n = 0, k = 0;
    memset(&out, 0, sizeof out);
    memset(&desc, 0, sizeof desc);
    memset(&e, 0, sizeof e);
    desc.backend = b;
    c = dpo_open(&desc);
    m = dpo_model_create(c, TINY, 3);
    d.steps = steps;  d.batch = 2;  d.accumulation = 2;  d.rank = rank;  d.beta = 200;  d.seed = 7;  d.average = average;
    if (late) { d.on_step = tell;  d.user = &out; }
    t = dpo_train_begin(m, some_pairs(c, 7), &d);
    if (late) while (dpo_train_step(t, NULL)) { k++; }
    while (dpo_train_step(t, &e)) {
#ifdef STAND_IN
        if (k == 2) out.allocs = stand_in()->allocs;
#endif
        out.loss[k++ % 16] = e.loss;
    }
#ifdef STAND_IN
    if (!late) out.allocs = stand_in()->allocs - out.allocs;
#endif
    CHECK(dpo_train_end(t) && k == steps, "training: %s", why(c));
    x = rank ? dpo_adapter_params(dpo_model_unet(m), &n) : dpo_net_params(dpo_model_unet(m), &n);
    for (int i = 0; i < n; i++) {
        out.v = (float *)realloc(out.v, (size_t)(out.n + dpo_count(x[i])) * sizeof(float));
        dpo_read(x[i], out.v + out.n);
        out.n += dpo_count(x[i]);
    }
    dpo_close(c);
    return out;
}

static dpo_backend *open_cuda(int graphs)
{
    dpo_backend *b = dpo_cuda_open(0, DIFFDPO_VERSION);
    dpo_cuda_set(b, DPO_CUDA_GRAPHS, graphs);
    return b;
}

/* The same bits whether steps are replayed or not, waited for or not, and the CPU's weights but for rounding.  Quick: what is
   replayed is not waited for. */
static void check_replay(int rank, float average)
{
    int     steps = quick ? 6 : 10;
    outcome cpu = train(NULL, rank, steps, average, 0), eager = train(open_cuda(0), rank, steps, average, 0), graph, late;
    double  worst = 0, most = 0;
#ifdef STAND_IN
    int graphs = stand_in()->graphs;
#endif
    graph = train(open_cuda(1), rank, steps, average, quick);
#ifdef STAND_IN
    CHECK(stand_in()->graphs - graphs >= steps/2, "rank %d: only %d of %d steps were replayed", rank, stand_in()->graphs - graphs, steps);
#endif
    late = quick ? graph : train(open_cuda(1), rank, steps, average, 1);
    CHECK(graph.n > 0 && graph.n == eager.n && !memcmp(graph.v, eager.v, (size_t)graph.n * sizeof(float)),
          "rank %d: replayed steps give other weights", rank);
    CHECK(!memcmp(graph.loss, eager.loss, sizeof graph.loss), "rank %d: replayed steps report other losses", rank);
    CHECK(late.told == steps && !memcmp(late.loss, graph.loss, sizeof graph.loss) && late.n == graph.n &&
          !memcmp(late.v, graph.v, (size_t)graph.n * sizeof(float)), "rank %d: what is told a step late differs", rank);
    /* fresh adapters change no bit: policy and reference are one network, and the loss is log 2 */
    CHECK(!rank || (eager.loss[0] == cpu.loss[0] && fabs((double)eager.loss[0] - log(2.0)) < 1e-7), "rank %d: the first loss is %.9g, the CPU's %.9g",
          rank, (double)eager.loss[0], (double)cpu.loss[0]);
    for (int64_t i = 0; i < graph.n && i < cpu.n; i++) {
        worst = fmax(worst, fabs((double)graph.v[i] - cpu.v[i]));
        most = fmax(most, fabs((double)cpu.v[i]));
    }
    CHECK(cpu.n == graph.n && worst <= 2e-3*most, "rank %d: weights differ from the CPU's by %g of %g", rank, worst, most);
#ifdef STAND_IN
    CHECK(late.ahead == steps - 4 && late.waits == 0 && late.allocs == 0,
          "rank %d: in %d of %d reports the next step was under way; %d waits, %d allocations", rank, late.ahead, steps - 4, late.waits,
          late.allocs);
    CHECK(graph.allocs == 0 && eager.allocs == 0, "rank %d: %d and %d allocations after the third step", rank, graph.allocs, eager.allocs);
    CHECK(stand_in()->used == 0, "%zu bytes of the device were not given back", stand_in()->used);
#endif
    if (!quick) free(late.v);
    free(cpu.v);
    free(eager.v);
    free(graph.v);
}

/* Two pictures in 12 steps, or 8, twice: every step but the first few is a replay, and the bytes are those without. */
static void check_sampling(void)
{
    int steps = quick ? 8 : 12;
    static const char *const prompts[2] = { "thing 1", "thing 2" };
    uint8_t rgb[2][2][2*8*8*3];
    int     graphs[2] = { 0, 0 };
    for (int k = 0; k < 2; k++) {
        dpo_sample_desc d;
        dpo_desc        desc;
        dpo_ctx        *c;
        dpo_model      *m;
        memset(&d, 0, sizeof d);
        memset(&desc, 0, sizeof desc);
        desc.backend = open_cuda(k);
        c = dpo_open(&desc);
        m = dpo_model_create(c, TINY, 3);
        d.n = 2;  d.steps = steps;  d.guidance = 3;  d.eta = 1;  d.seed = 5;  d.prompts = prompts;
#ifdef STAND_IN
        graphs[k] = stand_in()->graphs;
#endif
        for (int i = 0; i < 2; i++) CHECK(dpo_sample(m, &d, rgb[k][i]), "sampling: %s", why(c));
#ifdef STAND_IN
        graphs[k] = stand_in()->graphs - graphs[k];
#endif
        dpo_close(c);
    }
    CHECK(!memcmp(rgb[0], rgb[1], sizeof rgb[0]), "replayed steps draw other pictures");
    (void)graphs;
#ifdef STAND_IN
    CHECK(graphs[0] == 0 && graphs[1] >= steps, "%d of %d steps of sampling were replayed", graphs[1], 2*steps);
#endif
}

/* ---- every op in every type ------------------------------------------------------------------------------------- */

/* A call made from a seed, the same on every backend: its result and the gradients of its inputs. */
typedef struct probe {
    dpo_ctx    *c;
    uint64_t    seed;
    int         dtype, exact;             /* exact: factors are BF16, products of them differ by the order of sums alone */
    char        name[128];
    dpo_tensor *in[8];
    int         count;
    float      *out[9];
    int64_t     n[9];
} probe;

static int pick(probe *p, int least, int most) { return least + (int)(test_random(&p->seed) % (uint64_t)(most - least + 1)); }

/* The next input: normal numbers of type p->dtype (rounded to BF16 first, so that all types hold them), or a weight. */
static dpo_tensor *input(probe *p, int weight, int rank, int64_t a, int64_t b, int64_t d, int64_t e)
{
    int64_t     shape[4] = { a, b, d, e }, n = a*b*d*e;
    float      *v = (float *)malloc((size_t)n * sizeof *v);
    dpo_tensor *x;
    for (int64_t i = 0; i < n; i++) v[i] = dpoi_bf16_to_f32(dpoi_f32_to_bf16((float)test_normal(&p->seed) * (weight ? 0.3f : 1)));
    if (weight) { x = dpo_weight_new(p->c, p->dtype, rank, shape, "w"); dpo_write(x, v); }
    else x = dpo_tensor_from(p->c, p->dtype, rank, shape, v);
    if (x) x->needs_grad = 1;
    free(v);
    return p->in[p->count++] = x;
}

/* wide: channels are multiples of 8, and many. */
static dpo_tensor *probe_conv(probe *p, int wide)
{
    int64_t   N = pick(p, 1, 3), H = pick(p, 3, 12), W = pick(p, 3, 12), I = wide ? 8*pick(p, 1, 20) : pick(p, 1, 40), k = pick(p, 0, 2) ? 3 : 1;
    int64_t   O = wide ? 8*pick(p, 1, 20) : pick(p, 1, 70), r = pick(p, 0, 2) ? 0 : pick(p, 1, 9), stride = pick(p, 1, 2), y, x;
    int       pad[4] = { 0, 0, 0, 0 };
    dpo_extra e;
    dpo_tensor *in, *w, *bias = NULL;
    memset(&e, 0, sizeof e);
    if (k == 3) for (int i = 0; i < 4; i++) pad[i] = pick(p, 0, 1);
    y = (H + pad[0] + pad[1] - k)/stride + 1;
    x = (W + pad[2] + pad[3] - k)/stride + 1;
    snprintf(p->name, sizeof p->name, "conv %dx%dx%dx%d to %d, kernel %d, stride %d, rank %d", (int)N, (int)H, (int)W, (int)I, (int)O, (int)k, (int)stride, (int)r);
    in = input(p, 0, 4, N, H, W, I);
    w = input(p, 1, 4, O, k, k, I);
    if (pick(p, 0, 1)) bias = input(p, 0, 1, O, 1, 1, 1);
    if (pick(p, 0, 1)) e.vec = input(p, 0, 2, N, O, 1, 1);
    if (pick(p, 0, 1)) e.residual = input(p, 0, 4, N, y, x, O);
    if (r) {
        e.scale = 0.5f;
        e.down = input(p, 1, 4, r, k, k, I);
        e.up = input(p, 1, 4, O, 1, 1, r);
        if (pick(p, 0, 1)) e.strength = input(p, 0, 1, N, 1, 1, 1);
        p->exact = 0;                     /* x down is rounded in between */
    }
    e.act = pick(p, 0, 3) ? DPO_NONE : DPO_SILU;
    if (e.act) p->exact = 0;              /* its slope makes dy other numbers */
    return dpo_conv2d(p->c, in, w, bias, (int)stride, pad, &e);
}

static dpo_tensor *probe_attention(probe *p, int wide)
{
    int64_t N = pick(p, 1, 2), heads = pick(p, 1, 3), d = wide ? 8*pick(p, 1, 20) : pick(p, 1, 70), T = pick(p, 1, 150), S = pick(p, 1, 150);
    int     causal = pick(p, 0, 2) == 0;
    dpo_tensor *q, *k, *v;
    if (wide > 1 || pick(p, 0, 15) == 0) d = wide ? 8*pick(p, 21, 66) : 264;
    if (S < 2) S = 2;                     /* of one key there is no gradient but rounding */
    if (causal) T = S;
    snprintf(p->name, sizeof p->name, "attention %dx%d, %d keys, %d heads of %d%s", (int)N, (int)T, (int)S, (int)heads, (int)d, causal ? ", causal" : "");
    q = input(p, 0, 3, N, T, heads*d, 1);
    k = input(p, 0, 3, N, S, heads*d, 1);
    v = input(p, 0, 3, N, S, heads*d, 1);
    p->exact = 0;
    return dpo_attention(p->c, q, k, v, (int)heads, causal);
}

static dpo_tensor *probe_norm(probe *p, int layer)
{
    int64_t G = pick(p, 1, 5), C = G*pick(p, 1, 40), N = pick(p, 1, 3), P = pick(p, 1, 400);
    dpo_tensor *x, *gamma, *beta;
    snprintf(p->name, sizeof p->name, "%s %dx%dx%d", layer ? "layer norm" : "group norm", (int)N, (int)P, (int)C);
    x = input(p, 0, 3, N, P, C, 1);
    gamma = input(p, 0, 1, C, 1, 1, 1);
    beta = input(p, 0, 1, C, 1, 1, 1);
    if (layer) return dpo_layer_norm(p->c, x, gamma, beta, 1e-3f);
    return dpo_group_norm(p->c, x, gamma, beta, (int)G, 1e-3f, pick(p, 0, 1) ? DPO_SILU : DPO_NONE);
}

static dpo_tensor *probe_small(probe *p, int which)
{
    int64_t a = pick(p, 1, 4), b = pick(p, 1, 30), d = which % 2 ? 8*pick(p, 1, 9) : pick(p, 1, 60);
    dpo_tensor *x, *y;
    snprintf(p->name, sizeof p->name, "small op %d on %dx%dx%d", which, (int)a, (int)b, (int)d);
    if (which < 2)  return dpo_geglu(p->c, input(p, 0, 3, a, b, 2*d, 1));
    if (which < 4)  return dpo_act(p->c, input(p, 0, 3, a, b, d, 1), pick(p, 0, 1) ? DPO_SILU : DPO_GELU);
    if (which < 6)  { x = input(p, 0, 3, a, b, d, 1); y = input(p, 0, 1, d, 1, 1, 1); return dpo_binary(p->c, pick(p, DPO_ADD, DPO_MUL), x, y); }
    if (which < 8)  { x = input(p, 0, 3, a, b, d, 1); y = input(p, 0, 3, a, b, 16, 1); return dpo_concat(p->c, x, y, 2); }
    if (which < 10) return dpo_upsample(p->c, input(p, 0, 4, a, b, 3, d), 2*b, 5);
    if (which < 12) return dpo_slice(p->c, input(p, 0, 3, a, b, d, 1), 1, b/2, b - b/2);
    if (which < 14) return dpo_sum(p->c, input(p, 0, 3, a, b, d, 1), pick(p, -1, 2));
    if (which < 16) { x = input(p, 0, 3, a, b, d, 1); y = input(p, 0, 3, a, b, d, 1); return dpo_mse(p->c, x, y); }
    if (which < 18) return dpo_clamp(p->c, dpo_affine(p->c, input(p, 0, 3, a, b, d, 1), 2, 0.5f), -1, 1);
    return dpo_cast(p->c, input(p, 0, 3, a, b, d, 1), pick(p, DPO_F32, DPO_F16));
}

static void run_probe(probe *p, int kind)
{
    int64_t     scope = dpo_scope(p->c);
    dpo_tensor *y, *dy;
    float      *v;
    y = kind < 0 ? probe_attention(p, 2) : kind < 6 ? probe_conv(p, kind % 2) : kind < 10 ? probe_attention(p, kind % 2) : kind < 14 ? probe_norm(p, kind % 2) : probe_small(p, kind - 14);
    p->n[8] = dpo_count(y);
    v = (float *)malloc((size_t)p->n[8] * sizeof *v + 4);
    p->out[8] = (float *)calloc((size_t)p->n[8] + 1, sizeof(float));
    for (int64_t i = 0; i < p->n[8]; i++) v[i] = dpoi_bf16_to_f32(dpoi_f32_to_bf16((float)test_normal(&p->seed)));
    if (y) dpo_read(y, p->out[8]);
    dy = y ? dpo_tensor_from(p->c, DPO_F32, y->rank, y->shape, v) : NULL;
    free(v);
    CHECK(dy && dpo_backward_from(y, dy), "%s: %s", p->name, why(p->c));
    for (int i = 0; i < p->count; i++) {
        p->n[i] = dpo_count(p->in[i]);
        p->out[i] = (float *)calloc((size_t)p->n[i] + 1, sizeof(float));
        if (p->in[i] && p->in[i]->grad) dpo_read(p->in[i]->grad, p->out[i]);
    }
    for (int i = 0; i < p->count; i++) if (p->in[i] && p->in[i]->persistent) dpo_param_free(p->in[i]);
    dpo_scope_end(p->c, scope, NULL);
    dpo_clear_error(p->c);
}

static double distance(const probe *a, const probe *b, int i)
{
    double most = 1e-6, worst = 0;
    for (int64_t e = 0; e < a->n[i] && e < b->n[i]; e++) {
        double d = fabs((double)a->out[i][e] - b->out[i][e]);
        if (!(d <= worst)) worst = d;
        if (fabs((double)b->out[i][e]) > most) most = fabs((double)b->out[i][e]);
    }
    return a->n[i] == b->n[i] ? worst / most : INFINITY;
}

/* Results in narrow types may differ by a rounding, results in F32 by the order of sums; where factors are rounded in between
   (attention's probabilities, adapters) by what that is worth. */
static void compare_probes(probe *a, probe *b, const char *what)
{
    static const char *const types[] = { "F32", "BF16", "F16" };
    double narrow = a->dtype == DPO_BF16 ? 8e-3 : 1e-3, sums = a->dtype != DPO_BF16 ? 1e-5 : a->exact ? 1e-5 : 1.2e-2;
    if (a->dtype == DPO_F16 && !a->exact) sums = 2e-3;
#ifdef DIFFDPO_CUDNN
    if (a->dtype != DPO_F32) sums = 1.2e-2;               /* cuDNN rounds dx */
#endif
    for (int i = 0; i < 9; i++) {
        double tolerance = i == 8 && a->dtype != DPO_F32 ? narrow : sums;
        if (!a->out[i]) continue;
        CHECK(distance(a, b, i) <= tolerance, "%s in %s, %s: %s %d differs by %.3g, allowed %.3g", a->name, types[a->dtype], what,
              i == 8 ? "result" : "gradient", i, distance(a, b, i), tolerance);
    }
}

static void free_probe(probe *p)
{
    for (int i = 0; i < 9; i++) free(p->out[i]);
    memset(p, 0, sizeof *p);
}

static dpo_ctx *open_on(dpo_backend *b)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.backend = b;
    d.isa = DPO_ISA_PLAIN;
    d.threads = 1;
    return dpo_open(&d);
}

/* Against the CPU's plain C; with and without tensor cores; and with the stand-in in both orders of threads, bit for bit. */
static void check_types(uint64_t seed, int rounds, int wide_heads)
{
    dpo_backend *b = open_cuda(0), *plain = open_cuda(0), *rounding = open_cuda(0), *tf32 = open_cuda(0);
    dpo_ctx     *cpu = open_on(NULL), *cuda = open_on(b), *simple = open_on(plain), *rounded = open_on(rounding);
    dpo_ctx     *fast = open_on(tf32);
    dpo_cuda_set(plain, DPO_CUDA_PLAIN, 1);
    dpo_cuda_set(rounding, DPO_CUDA_PRODUCTS, DPO_BF16);
    dpo_cuda_set(tf32, DPO_CUDA_TF32, 1);
    for (int k = 0; k < rounds; k++) {
        int   kind = wide_heads ? -1 : k % 34, dtype = (k + k/34) % 3;            /* 102 rounds are each kind in each type */
        probe p[6];
        int   probes = dtype == DPO_F32 && kind >= 0 && kind < 6 ? 6 : 5;        /* TF32 is for convolutions of F32 */
        memset(p, 0, sizeof p);
        for (int i = 0; i < probes; i++) {
            p[i].c = i == 0 ? cpu : i == 2 ? simple : i == 4 ? rounded : i == 5 ? fast : cuda;
            p[i].seed = seed + (uint64_t)k;
            p[i].dtype = dtype;
            p[i].exact = 1;
#ifdef STAND_IN
            stand_in()->order = i != 3 ? 0 : k % 3 ? k : -1;
            stand_in()->no_products = i == 2;
#endif
            run_probe(&p[i], kind);
        }
        compare_probes(&p[1], &p[0], "against the CPU");
        compare_probes(&p[2], &p[0], "plain kernels against the CPU");
        p[4].dtype = DPO_BF16;            /* results of factors that were rounded may differ as such */
        p[4].exact = 0;
        compare_probes(&p[4], &p[0], "with factors rounded, against the CPU");
        for (int i = 0; i < 9; i++)
            if (p[1].out[i]) CHECK(p[1].n[i] == p[3].n[i] && !memcmp(p[1].out[i], p[3].out[i], (size_t)p[1].n[i] * 4),
                                   "%s: other bits the second time", p[1].name);
        p[5].dtype = DPO_F16;             /* as many bits as TF32 keeps */
        p[5].exact = 0;
        if (probes > 5) compare_probes(&p[5], &p[0], "as TF32, against the CPU");
        for (int i = 0; i < 6; i++) free_probe(&p[i]);
    }
    dpo_close(cpu);
    dpo_close(cuda);
    dpo_close(simple);
    dpo_close(rounded);
    dpo_close(fast);
#ifdef STAND_IN
    stand_in()->order = stand_in()->no_products = 0;
#endif
}

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* Words that an error must hold; the context is closed, and nothing of the device is left. */
static void check_error(dpo_ctx *c, const char *what, const char *first, const char *second)
{
    const char *text = c ? dpo_error(c) : NULL;
    CHECK(text && strstr(text, first) && strstr(text, second), "%s: the error is \"%s\"", what, text ? text : "none");
    dpo_close(c);
#ifdef STAND_IN
    CHECK(stand_in()->used == 0 && stand_in()->events == 0, "%s: %zu bytes of the device and %d events were not given back",
          what, stand_in()->used, stand_in()->events);
#endif
}

static dpo_ctx *open_device(int device, uint32_t version)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.backend = dpo_cuda_open(device, version);
    return dpo_open(&d);
}

#ifdef STAND_IN
/* A host that finds no device goes on with the CPU: the failed context is closed, another one opened. */
static void check_going_on(void)
{
    dpo_ctx *c = open_device(0, DIFFDPO_VERSION);
    int64_t  n = 2;
    float    v[2] = { 1, 2 };
    if (dpo_error(c)) {
        dpo_close(c);
        c = open_on(NULL);
    }
    CHECK(dpo_read(dpo_affine(c, dpo_tensor_from(c, DPO_F32, 1, &n, v), 2, 1), v) && v[1] == 5, "on the CPU instead: %s", why(c));
    dpo_close(c);
}
#endif

static void check_opening(void)
{
    dpo_backend *b = dpo_cuda_open(0, DIFFDPO_VERSION), *cpu = dpo_cpu_open(NULL);
    CHECK(strstr(dpo_cuda_about(b), "GiB, compute capability"), "about says \"%s\"", dpo_cuda_about(b));
    CHECK(!dpo_cuda_set(b, DPO_CUDA_OPTIONS, 1) && !dpo_cuda_set(cpu, DPO_CUDA_TF32, 1) && dpo_cuda_set(b, DPO_CUDA_TF32, 1), "options");
    CHECK(strstr(dpo_cuda_about(cpu), "no CUDA"), "about of another backend");
    b->close(b->self);
    cpu->close(cpu->self);
    check_error(open_device(99, DIFFDPO_VERSION), "a device that is not there", "cuda: cudaSetDevice", "invalid device");
    check_error(open_device(0, DIFFDPO_VERSION + 1), "another version", "dpo_cuda_open", "version");
#ifdef STAND_IN
    stand_in()->devices = 0;
    check_error(open_device(0, DIFFDPO_VERSION), "no device", "cudaGetDeviceCount", "no CUDA-capable device");
    check_going_on();
    stand_in()->devices = 1;
    stand_in()->driver = 0;
    check_error(open_device(0, DIFFDPO_VERSION), "an old driver", "cudaGetDeviceCount", "driver version is insufficient");
    stand_in()->driver = 13000;
    stand_in()->major = 7;
    check_error(open_device(0, DIFFDPO_VERSION), "an old device", "compute capability 7.0", "8.0 or newer");
    stand_in()->major = 9;
    for (int k = 0; k < 4; k++) {
        stand_in()->deny_alloc = k;
        check_error(open_device(0, DIFFDPO_VERSION), "no memory while opening", "cudaMalloc", "out of memory");
    }
    stand_in()->deny_alloc = -1;
    for (int k = 0, fired = 1; fired; k++) {
        dpo_ctx *c;
        stand_in()->deny_call = k;
        c = open_device(0, DIFFDPO_VERSION);
        fired = stand_in()->deny_call < 0;
        stand_in()->deny_call = -1;
        if (fired) check_error(c, "a call fails while opening", "cuda", "unknown error");
        else dpo_close(c);
    }
#endif
}

/* The sum over the GPUs of a communicator: three alike in the stand-in; refused, by name, where NCCL is not built in. */
static void check_reduce(void)
{
#if defined(STAND_IN) || !defined(DIFFDPO_NCCL)
    dpo_ctx    *c = open_on(open_cuda(1));
    int64_t     n = 3;
    int         gpus = 3, status;
    float       v[3] = { 1, -2, 0.5f }, got[3] = { 0, 0, 0 };
    dpo_tensor *x = dpo_tensor_from(c, DPO_F32, 1, &n, v);
    status = dpo_cuda_reduce(c->backend, &gpus, x->data, 3, DPO_F32, 0);
#ifdef DIFFDPO_NCCL
    CHECK(status == DPO_OK && dpo_read(x, got) && got[0] == 3 && got[1] == -6 && got[2] == 1.5f, "reduce: %g %g %g", got[0], got[1], got[2]);
#else
    CHECK(status == DPO_UNSUPPORTED && strstr(c->backend->explain(c->backend->self), "DIFFDPO_NCCL"), "reduce without NCCL: status %d", status);
    (void)got;
#endif
    dpo_close(c);
#endif
}

/* The check backend, as a host uses it: CUDA's kernels beside the CPU's, call by call. */
static void check_check(void)
{
    dpo_desc       desc;
    dpo_train_desc d = dpo_recipe_small();
    dpo_ctx       *c;
    dpo_trainer   *t;
    memset(&desc, 0, sizeof desc);
    desc.backend = dpo_check_open(open_cuda(1), dpo_cpu_open(NULL), 2e-5f);
    c = dpo_open(&desc);
    d.steps = 2;  d.batch = 2;  d.rank = 0;  d.beta = 200;
    t = dpo_train_begin(dpo_model_create(c, TINY, 3), some_pairs(c, 7), &d);
    while (dpo_train_step(t, NULL)) { }
    CHECK(dpo_train_end(t), "checked training: %s", why(c));
    dpo_close(c);
}

/* The dry backend counts what the CUDA backend takes, to the byte. */
static void check_dry(void)
{
    size_t       peak[2];
    dpo_backend *model = open_cuda(1);
    for (int k = 0; k < 2; k++) {
        dpo_train_desc d = dpo_recipe_small();
        dpo_ctx       *c = open_on(k ? dpo_dry_open(model) : open_cuda(1));
        dpo_trainer   *t;
        d.steps = 3;  d.batch = 2;  d.rank = 4;
        t = dpo_train_begin(dpo_model_create(c, TINY, 3), some_pairs(c, 7), &d);
        while (dpo_train_step(t, NULL)) { }
        dpo_train_end(t);
        peak[k] = dpo_memory_peak(c, 0);
        CHECK(!dpo_error(c), "%s", why(c));
        dpo_close(c);
    }
    CHECK(peak[0] == peak[1], "%zu bytes at most, the dry run said %zu", peak[0], peak[1]);
    model->close(model->self);
}

/* Six steps of an optimizer on 90 weights of all shapes, more than one launch takes: vectors, matrices, kernels; sizes beside
   the borders of blocks and pieces; and one step in between whose gradients are not finite.  w: all weights.  A weight is used
   as such, in a product; step `which` decides with what. */
static dpo_tensor *optimize_through(dpo_ctx *c, dpo_tensor *w, int which)
{
    static const int pad[4];
    float      *v;
    dpo_tensor *x;
    int64_t     n = w && w->rank == 4 ? 9*w->shape[3] : w && w->rank == 2 ? 3*w->shape[1] : 0, shape[4] = { 1, 3, 3, 0 };
    if (!n) return dpo_affine(c, w, 1, -0.3f * (float)which);
    v = (float *)malloc((size_t)n * sizeof *v);
    for (int64_t e = 0; e < n; e++) v[e] = (float)sin((double)(e + 7*which));
    shape[3] = w->shape[3];
    if (w->rank == 2) { shape[0] = 3;  shape[1] = w->shape[1]; }
    x = dpo_tensor_from(c, DPO_F32, w->rank, shape, v);
    free(v);
    return w->rank == 2 ? dpo_linear(c, x, w, NULL, NULL) : dpo_conv2d(c, x, w, NULL, 1, pad, NULL);
}
enum { OPTIM_WEIGHTS = 90, OPTIM_NUMBERS = 500000 };
static int64_t optimize(dpo_backend *b, int kind, float *w, int *launches)
{
    static const int64_t shapes[6][4] = { { 5 }, { 40, 33 }, { 6, 3, 3, 17 }, { 300, 70 }, { 9, 3, 3, 64 }, { 4100 } };
    static const int     ranks[6] = { 1, 2, 4, 2, 4, 1 };
    dpo_ctx       *c = open_on(b);
    dpo_tensor    *p[OPTIM_WEIGHTS];
    dpo_optim     *o;
    dpo_adamw_desc d;
    dpo_adafactor_desc f;
    int64_t        n = 0;
    uint64_t       seed = 9;
    memset(&d, 0, sizeof d);
    memset(&f, 0, sizeof f);
    (void)launches;
    for (int i = 0; i < OPTIM_WEIGHTS; i++) {
        int64_t shape[4] = { 1, 1, 1, 1 };
        memcpy(shape, shapes[i % 6], (size_t)ranks[i % 6] * sizeof *shape);
        p[i] = ranks[i % 6] == 1 ? dpo_param_new(c, DPO_F32, 1, shape, "w") : dpo_weight_new(c, DPO_F32, ranks[i % 6], shape, "w");
        for (int64_t e = 0; e < dpo_count(p[i]); e++) w[e] = (float)test_normal(&seed);
        dpo_write(p[i], w);
        if (p[i]) p[i]->needs_grad = 1;
    }
    d.weight_decay = f.weight_decay = 0.01f;
    d.eps = 1e-4f;                        /* or the rounding of gradients near 0 would show */
    o = kind == DPO_ADAFACTOR ? dpo_adafactor_new(c, p, OPTIM_WEIGHTS, &f) : kind == DPO_ADAMW8 ? dpo_adamw8_new(c, p, OPTIM_WEIGHTS, &d)
        : dpo_adamw_new(c, p, OPTIM_WEIGHTS, &d);
    for (int k = 0; k < 6 && !dpo_error(c); k++) {
        int64_t     scope = dpo_scope(c);
        dpo_tensor *sum = NULL;
        for (int i = 0; i < OPTIM_WEIGHTS; i++) {
            dpo_tensor *y = optimize_through(c, p[i], k + i % 5);
            y = dpo_mean(c, dpo_binary(c, DPO_MUL, y, dpo_binary(c, DPO_MUL, y, y)), -1);
            sum = sum ? dpo_binary(c, DPO_ADD, sum, y) : y;
        }
        dpo_backward(k == 3 ? dpo_affine(c, sum, INFINITY, 0) : sum);
#ifdef STAND_IN
        *launches = stand_in()->launches;
#endif
        dpo_optim_step(o, 1e-2f);
        dpo_read(p[0], w);                /* what waits is launched */
#ifdef STAND_IN
        *launches = stand_in()->launches - *launches;
#endif
        dpo_scope_end(c, scope, NULL);
    }
    for (int i = 0; i < OPTIM_WEIGHTS; n += dpo_count(p[i++])) dpo_read(p[i], w + n);
    CHECK(!dpo_error(c) && n <= OPTIM_NUMBERS, "optimizer %d: %s", kind, why(c));
    dpo_close(c);
    return n;
}
static void check_optimizers(void)
{
    float *w[3];
    for (int i = 0; i < 3; i++) w[i] = (float *)malloc(OPTIM_NUMBERS * sizeof(float));
    for (int kind = DPO_ADAMW; kind <= DPO_ADAMW8; kind++) {
        if (quick && kind != DPO_ADAMW + (int)(first_seed % 3)) continue;      /* another one every day */
        double  worst = 0;
        int     launches = 0;
        int64_t n = optimize(dpo_cpu_open(NULL), kind, w[0], &launches);
        optimize(open_cuda(0), kind, w[1], &launches);
#ifdef STAND_IN
        /* squares in 3 launches of two kernels, clip; AdamW in 3, Adafactor in 3 times six, codes and AdamW in 2 each */
        CHECK(launches <= 7 + (kind == DPO_ADAFACTOR ? 18 : 4), "optimizer %d: %d launches for 90 weights", kind, launches);
        stand_in()->order = 5;
#endif
        if (!quick) optimize(open_cuda(0), kind, w[2], &launches);
#ifdef STAND_IN
        stand_in()->order = 0;
#endif
        /* A number between two codes may fall to either side, which moves a step by a few per cent of 1e-2.  Matrices lie in another
           order on the CPU, and share their scales with other numbers: there only the vectors are alike, the last 4100 of 32527. */
        for (int64_t i = 0; i < n; i++) {
            double off = fabs((double)w[0][i] - w[1][i]);
            worst = fmax(worst, kind == DPO_ADAMW8 && i % 32527 < 32527 - 4100 ? off / 12 : off);
        }
        CHECK(worst < (kind == DPO_ADAMW8 ? 2e-3 : 2e-5), "optimizer %d: weights differ from the CPU's by %g", kind, worst);
        CHECK(quick || !memcmp(w[1], w[2], (size_t)n * sizeof(float)), "optimizer %d: other bits the second time", kind);
    }
    for (int i = 0; i < 3; i++) free(w[i]);
}

#ifdef STAND_IN
/* A small graph of several ops and an optimizer's step, where one thing fails; the error of the context.  failed_at: -1 if it did. */
static int failed_at;
static dpo_ctx *fail_at(int *what, int after)
{
    dpo_ctx    *c = open_on(open_cuda(1));
    int64_t     xs[4] = { 2, 6, 6, 8 }, ws[4] = { 16, 3, 3, 8 }, vs[2] = { 16, 16 }, tokens[3] = { 2, 36, 16 };
    int         pad[4] = { 1, 1, 1, 1 };
    dpo_tensor *x, *w[2], *y;
    dpo_optim  *o;
    *what = after;
    x = dpo_tensor_new(c, DPO_F32, 4, xs);
    w[0] = dpo_weight_new(c, DPO_F32, 4, ws, "w");
    w[1] = dpo_weight_new(c, DPO_F32, 2, vs, "v");
    for (int i = 0; i < 2; i++) if (w[i]) w[i]->needs_grad = 1;
    o = dpo_adamw_new(c, w, 2, NULL);
    for (int k = 0; k < 6 && !dpo_error(c); k++) {
        int64_t scope = dpo_scope(c);
        dpoi_device_step(c, 1);
        y = dpo_reshape(c, dpo_conv2d(c, x, w[0], NULL, 1, pad, NULL), 3, tokens);
        y = dpo_linear(c, dpo_attention(c, y, y, y, 2, 0), w[1], NULL, NULL);
        dpo_backward(dpo_mean(c, y, -1));
        dpo_optim_step(o, 1e-3f);
        dpo_scope_end(c, scope, NULL);
        dpoi_device_step(c, 0);
    }
    failed_at = *what;
    *what = -1;
    return c;
}

/* Each launch, product and allocation fails once: always an error that names the call, never a crash, nothing left over. */
static void check_failures(void)
{
    int ops = 0, done = 0, errors = 0;
    for (int after = 0; after < 400 && !done; after += after < 60 ? 1 : 13) {
        dpo_ctx *c = fail_at(&stand_in()->deny_launch, after);
        done = !dpo_error(c);
        ops += dpo_error(c) && (strstr(dpo_error(c), "CONV") || strstr(dpo_error(c), "ATTENTION") || strstr(dpo_error(c), "SUM") ||
                                strstr(dpo_error(c), "ADAMW") || strstr(dpo_error(c), "CLIP"));
        if (done) dpo_close(c);
        else check_error(c, "a launch fails", "launch of dpoc_", "unspecified launch failure");
    }
    CHECK(done && ops > 10, "failing launches: %d named an op", ops);
    for (int after = done = 0; after < 100 && !done; after++) {
        dpo_ctx *c = fail_at(&stand_in()->deny_product, after);
        done = !dpo_error(c);
        if (done) dpo_close(c);
        else check_error(c, "a product fails", "cublasLtMatmul", "CONV");
    }
    CHECK(done, "failing products: no end");
    for (int after = done = 0; after < 100 && !done; after++) {
        dpo_ctx *c = fail_at(&stand_in()->deny_alloc, after);
        done = !dpo_error(c);
        if (done) dpo_close(c);
        else check_error(c, "no memory", "memory", "");
    }
    CHECK(done, "failing allocations: no end");
    /* copies, events, streams, graphs: a capture that fails is no error, the step runs without */
    for (int after = 0, fired = 1; fired && after < 5000; after += after < 30 ? 1 : 11) {
        dpo_ctx *c = fail_at(&stand_in()->deny_call, after);
        fired = failed_at < 0;
        errors += dpo_error(c) != NULL;
        if (dpo_error(c)) check_error(c, "a call fails", "cuda", "unknown error");
        else dpo_close(c);
        CHECK(stand_in()->used == 0 && stand_in()->events == 0, "call %d fails: %zu bytes, %d events left", after,
              stand_in()->used, stand_in()->events);
    }
    CHECK(errors > 20, "failing calls: %d errors", errors);
}
#endif

static void check_all_types(void)       { check_types(first_seed, rounds, 0); }
static void check_wide_heads(void)      { check_types(first_seed, (rounds + 5)/6, 1); }
static void check_replay_all(void)      { check_replay(0, 0); }
static void check_replay_adapters(void) { check_replay(4, 0.9f); }

static void part(const char *name, void (*run)(void))
{
    double began = dpo_seconds();
    if (only && !strstr(name, only)) return;
    run();
    printf("%-22s %6.1f s\n", name, dpo_seconds() - began);
}

int main(int argc, char **argv)
{
    char *make[2];
    make[0] = (char *)"tiny_model";
    make[1] = (char *)TINY;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1) first_seed = (uint64_t)atoll(argv[1]);
    if (argc > 2) quick = !strcmp(argv[2], "quick");
    if (argc > 2) rounds = quick ? 34 : atoi(argv[2]);
    if (argc > 3) only = argv[3];
    if (system("mkdir -p " FOLDER) != 0 || tiny_model_main(2, make) != 0) return 1;
    part("opening", check_opening);
    part("sums over GPUs", check_reduce);
    part("check backend", check_check);
    part("dry backend", check_dry);
    part("sampling", check_sampling);
    part("optimizers", check_optimizers);
#ifdef STAND_IN
    part("failures", check_failures);
#endif
    part("types", check_all_types);
    part("wide heads", check_wide_heads);
    if (!quick) part("replay of all weights", check_replay_all);
    part("replay of adapters", check_replay_adapters);
    return test_report();
}
