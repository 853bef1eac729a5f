/* checks.c - what the CUDA backend promises beside its numbers: steps that are replayed, memory, errors; and every op in every
   type against the CPU.

   build   sh tests/test_cuda.sh builds it: with the stand-in (-DSTAND_IN), or with nvcc for the GPU that is there
   run     build/cuda/checks [seed]     from the project's folder                                                      */
#define main tiny_model_main
#include "../tiny_model.c"
#undef main
#include "../dpo_test.h"

#define FOLDER "build/cuda/checks.tmp"
#define TINY   FOLDER "/tiny"

#ifdef STAND_IN
typedef struct stand_in_control {         /* as in cuda_stand_in.h */
    int    devices, driver, major, minor, backwards, deny_alloc, deny_launch, deny_product;
    size_t memory, used;
    int    allocs, launches, graphs;
} stand_in_control;
extern stand_in_control *stand_in(void);
#endif

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

typedef struct outcome { float *v; int64_t n; int graphs, allocs; float loss[16]; } outcome;

/* Trains `steps` steps on a backend; allocs: what was asked of the device after the second step. */
static outcome train(dpo_backend *b, int rank, int steps, float average)
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
    t = dpo_train_begin(m, some_pairs(c, 7), &d);
    while (dpo_train_step(t, &e)) {
#ifdef STAND_IN
        if (k == 5) out.allocs = stand_in()->allocs;
#endif
        out.loss[k++ % 16] = e.loss;
    }
#ifdef STAND_IN
    out.allocs = stand_in()->allocs - out.allocs;
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

/* The same bits whether steps are replayed or not, and the CPU's weights but for rounding. */
static void check_replay(int rank, float average)
{
    enum { STEPS = 14 };
    outcome cpu = train(NULL, rank, STEPS, average), eager = train(open_cuda(0), rank, STEPS, average), graph;
    double  worst = 0, most = 0;
#ifdef STAND_IN
    int graphs = stand_in()->graphs;
#endif
    graph = train(open_cuda(1), rank, STEPS, average);
    CHECK(graph.n > 0 && graph.n == eager.n && !memcmp(graph.v, eager.v, (size_t)graph.n * sizeof(float)),
          "rank %d: replayed steps give other weights", rank);
    CHECK(!memcmp(graph.loss, eager.loss, sizeof graph.loss), "rank %d: replayed steps report other losses", rank);
    for (int64_t i = 0; i < graph.n && i < cpu.n; i++) {
        worst = fmax(worst, fabs((double)graph.v[i] - cpu.v[i]));
        most = fmax(most, fabs((double)cpu.v[i]));
    }
    CHECK(cpu.n == graph.n && worst <= 2e-3*most, "rank %d: weights differ from the CPU's by %g of %g", rank, worst, most);
#ifdef STAND_IN
    CHECK(stand_in()->graphs - graphs >= STEPS/2, "rank %d: only %d of %d steps were replayed", rank, stand_in()->graphs - graphs, STEPS);
    CHECK(graph.allocs == 0 && eager.allocs == 0, "rank %d: %d and %d allocations after the sixth step", rank, graph.allocs, eager.allocs);
    CHECK(stand_in()->used == 0, "%zu bytes of the device were not given back", stand_in()->used);
#endif
    free(cpu.v);
    free(eager.v);
    free(graph.v);
}



int main(int argc, char **argv)
{
    char *make[2];
    make[0] = (char *)"tiny_model";
    make[1] = (char *)TINY;
    if (system("mkdir -p " FOLDER) != 0 || tiny_model_main(2, make) != 0) return 1;
    check_replay(0, 0);
    check_replay(4, 0.9f);
    (void)argc; (void)argv;
    return test_report();
}
