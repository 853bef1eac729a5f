/* bench.c - how fast does diffdpo.h do the work that people wait for, and is it right at full size?

   build   cc -O2 examples/bench.c -o bench -lm -lpthread
   run     ./bench WORK [--dtype f32|bf16] [--device cpu|cuda] [--isa plain|avx2|avx512|amx] [--threads N] [--batch N]
                        [--size N] [--repeat 3] [--checkpoint] [--profile] [--products f32|bf16]
           ./bench peak [--dtype f32|bf16] [--isa NAME] [--threads N]       what the machine could do: arithmetic, memory
           ./bench --check DIR [options]                 the step that pytorch_peer.py --save DIR took, and the differences
   WORK    MODEL_TASK, random weights, new random inputs every step:
           sd15, sdxl, small (10 M parameters, 32x32x3, 16 tokens)
           forward    the UNet on a batch of 2 (small: 16)
           dpo_lora   one Diffusion-DPO step on that batch as pairs: rank 16 on the attention layers, reference = adapters
                      off, backward, clip to 1, AdamW
           dpo_full   the same for all weights, with a frozen copy as reference; sd15 and sdxl recompute their blocks
   --size  the picture's side as the UNet sees it; if not given, 64 (sd15), 128 (sdxl), 32 (small)
   result  one line of JSON: seconds is the best step of --repeat after one to warm up, peak_bytes the most memory that the
           process held (cuda: the context, on the device), tflop the arithmetic of the products and attentions of one step,
           recomputation included                                                                                       */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE                       /* mkdtemp, symlink, getrusage */
#endif
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

enum { FORWARD, DPO_LORA, DPO_FULL };
static const char *const task_names[] = { "forward", "dpo_lora", "dpo_full" };
static const char *const isa_names[]  = { "best", "plain", "avx2", "avx512", "amx" };      /* DPO_ISA_BEST ... */

typedef struct options {
    const char *work, *check, *device;
    int         dtype, isa, threads, batch, size, repeat, checkpoint, profile, products;
} options;

/* ----------------------------------------------------------------------------------------------- models */

typedef struct model_kind {
    const char *name, *unet;              /* unet: its config.json; what is not there has diffusers' default */
    int         size, channels, tokens, width, pooled, batch, checkpoint;
} model_kind;

static const model_kind kinds[] = {
    { "sd15", "{\"_class_name\": \"UNet2DConditionModel\", \"sample_size\": 64, \"cross_attention_dim\": 768,"
              " \"attention_head_dim\": 8, \"block_out_channels\": [320, 640, 1280, 1280]}", 64, 4, 77, 768, 0, 2, 1 },
    { "sdxl", "{\"_class_name\": \"UNet2DConditionModel\", \"sample_size\": 128, \"cross_attention_dim\": 2048,"
              " \"attention_head_dim\": [5, 10, 20], \"block_out_channels\": [320, 640, 1280],"
              " \"down_block_types\": [\"DownBlock2D\", \"CrossAttnDownBlock2D\", \"CrossAttnDownBlock2D\"],"
              " \"up_block_types\": [\"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\", \"UpBlock2D\"],"
              " \"transformer_layers_per_block\": [1, 2, 10], \"use_linear_projection\": true,"
              " \"addition_embed_type\": \"text_time\", \"addition_time_embed_dim\": 256,"
              " \"projection_class_embeddings_input_dim\": 2816}", 128, 4, 77, 2048, 1280, 2, 1 },
    { "small", "{\"_class_name\": \"UNet2DConditionModel\", \"sample_size\": 32, \"in_channels\": 3, \"out_channels\": 3,"
               " \"cross_attention_dim\": 128, \"attention_head_dim\": 4, \"norm_num_groups\": 16,"
               " \"block_out_channels\": [64, 128, 128], \"layers_per_block\": 2,"
               " \"down_block_types\": [\"DownBlock2D\", \"CrossAttnDownBlock2D\", \"CrossAttnDownBlock2D\"],"
               " \"up_block_types\": [\"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\", \"UpBlock2D\"]}", 32, 3, 16, 128, 0, 16, 0 }
};

/* The library makes pipelines, so the bench writes one around the UNet that it wants: the least text encoders that give
   rows of the right width.  The folder is temporary. */
static char folder[256];
static const char *const pipeline_files[] = {             /* deepest first, so that they can be removed in this order */
    "model_index.json", "scheduler/scheduler_config.json", "scheduler",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder",
    "text_encoder_2/config.json", "text_encoder_2/model.safetensors", "text_encoder_2",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer",
    "tokenizer_2/vocab.json", "tokenizer_2/merges.txt", "tokenizer_2/tokenizer_config.json", "tokenizer_2"
};

static const char *in_folder(const char *name)
{
    static char path[2][512];
    static int  k;
    char       *p = path[k++ % 2];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void remove_folder(void)
{
    for (size_t i = 0; i < sizeof pipeline_files / sizeof *pipeline_files; i++) remove(in_folder(pipeline_files[i]));
    if (folder[0]) rmdir(folder);
    folder[0] = 0;
}

static int write_file(const char *name, const char *text)
{
    FILE *f = fopen(in_folder(name), "wb");
    int   ok = f && fputs(text, f) >= 0;
    if (f && fclose(f) != 0) ok = 0;
    if (!ok) fprintf(stderr, "bench: cannot write %s\n", in_folder(name));
    return ok;
}

static int write_text_encoder(int which, int width, int projection)
{
    char text[512], name[64];
    snprintf(text, sizeof text, "{\"architectures\": [\"%s\"], \"vocab_size\": 2, \"hidden_size\": %d, \"intermediate_size\": 8,"
             " \"num_hidden_layers\": 1, \"num_attention_heads\": 1, \"max_position_embeddings\": 4, \"projection_dim\": %d,"
             " \"bos_token_id\": 0, \"eos_token_id\": 1}", projection ? "CLIPTextModelWithProjection" : "CLIPTextModel", width,
             projection ? projection : width);
    snprintf(name, sizeof name, "text_encoder%s/config.json", which ? "_2" : "");
    if (!write_file(name, text)) return 0;
    snprintf(name, sizeof name, "tokenizer%s/merges.txt", which ? "_2" : "");
    if (!write_file(name, "#version: 0.2\n")) return 0;
    snprintf(name, sizeof name, "tokenizer%s/vocab.json", which ? "_2" : "");
    return write_file(name, "{\"<|startoftext|>\": 0, \"<|endoftext|>\": 1}");
}

static int write_pipeline(const char *unet, int width, int pooled)
{
    static const char *const folders[] = { "scheduler", "unet", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2" };
    const char *where = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.200s/diffdpo-bench-XXXXXX", where && *where ? where : "/tmp");
    if (!mkdtemp(folder)) {
        fprintf(stderr, "bench: cannot make the folder %s\n", folder);
        folder[0] = 0;
        return 0;
    }
    for (int i = 0; i < (pooled ? 6 : 4); i++) mkdir(in_folder(folders[i]), 0700);
    return write_file("model_index.json", pooled
            ? "{\"_class_name\": \"StableDiffusionXLPipeline\", \"scheduler\": [\"diffusers\", \"DDIMScheduler\"],"
              " \"text_encoder\": [\"transformers\", \"CLIPTextModel\"], \"tokenizer\": [\"transformers\", \"CLIPTokenizer\"],"
              " \"text_encoder_2\": [\"transformers\", \"CLIPTextModelWithProjection\"],"
              " \"tokenizer_2\": [\"transformers\", \"CLIPTokenizer\"], \"unet\": [\"diffusers\", \"UNet2DConditionModel\"]}"
            : "{\"_class_name\": \"StableDiffusionPipeline\", \"scheduler\": [\"diffusers\", \"DDIMScheduler\"],"
              " \"text_encoder\": [\"transformers\", \"CLIPTextModel\"], \"tokenizer\": [\"transformers\", \"CLIPTokenizer\"],"
              " \"unet\": [\"diffusers\", \"UNet2DConditionModel\"]}")
        && write_file("scheduler/scheduler_config.json", "{\"_class_name\": \"DDIMScheduler\", \"beta_schedule\": \"scaled_linear\"}")
        && write_file("unet/config.json", unet)
        && write_text_encoder(0, pooled ? width / 2 : width, 0) && (!pooled || write_text_encoder(1, width / 2, pooled));
}

/* ----------------------------------------------------------------------------------------------- the machine's peak */

typedef struct peak_job {
    int             isa, half;            /* half: products of BF16, where the processor has them */
    double          least, seconds, work; /* how long at least, how long it was; flop, or bytes */
    const uint64_t *memory;
    size_t          count;
    volatile float    result;
    volatile uint64_t sum;
} peak_job;

/* Twelve independent chains hide the latency of the multiply-add; each counts 2 flop a lane. */
#if defined(__x86_64__) && defined(__GNUC__)
#define PEAK(name, isa_target, vector, set1, fma, lanes, sum) \
    __attribute__((target(isa_target))) static double name(int64_t rounds, volatile float *result) { \
        vector x[12], a = set1(0.999f), b = set1(0.001f); \
        for (int i = 0; i < 12; i++) x[i] = set1((float)i); \
        for (int64_t r = 0; r < rounds; r++) { \
            x[0] = fma(x[0], a, b); x[1] = fma(x[1], a, b); x[2] = fma(x[2], a, b); x[3] = fma(x[3], a, b); \
            x[4] = fma(x[4], a, b); x[5] = fma(x[5], a, b); x[6] = fma(x[6], a, b); x[7] = fma(x[7], a, b); \
            x[8] = fma(x[8], a, b); x[9] = fma(x[9], a, b); x[10] = fma(x[10], a, b); x[11] = fma(x[11], a, b); \
        } \
        for (int i = 1; i < 12; i++) x[0] = fma(x[i], a, x[0]); \
        *result = sum(x[0]); \
        return 24.0 * lanes * (double)rounds; \
    }
#define SUM_512(v) _mm512_cvtss_f32(v)
#define SUM_256(v) _mm256_cvtss_f32(v)
PEAK(peak_avx512, "avx512f", __m512, _mm512_set1_ps, _mm512_fmadd_ps, 16, SUM_512)
PEAK(peak_avx2, "avx2,fma", __m256, _mm256_set1_ps, _mm256_fmadd_ps, 8, SUM_256)
#endif

/* BF16: four tiles of 16x16 sums over 32 numbers. */
#ifdef DPOI_SIMD_AMX
DPOI_AMX static double peak_tiles(int64_t rounds, volatile float *result)
{
    static const uint16_t zeros[512];
    float c[256];
    dpoi_amx_begin();
    _tile_zero(0);  _tile_zero(1);  _tile_zero(2);  _tile_zero(3);
    _tile_loadd(4, zeros, 64);  _tile_loadd(5, zeros, 64);  _tile_loadd(6, zeros, 64);  _tile_loadd(7, zeros, 64);
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);  _tile_dpbf16ps(1, 4, 7);  _tile_dpbf16ps(2, 5, 6);  _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    dpoi_amx_end();
    *result = c[0];
    return 4.0 * 2*16*16*32 * (double)rounds;
}
#endif

static double peak_plain(int64_t rounds, volatile float *result)
{
    float x[16], a = 0.999f, b = 0.001f, sum = 0;
    for (int i = 0; i < 16; i++) x[i] = (float)i;
    for (int64_t r = 0; r < rounds; r++)
        for (int i = 0; i < 16; i++) x[i] = x[i]*a + b;
    for (int i = 0; i < 16; i++) sum += x[i];
    *result = sum;
    return 32.0 * (double)rounds;
}

static double peak_rounds(peak_job *j, int64_t rounds)
{
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef DPOI_SIMD_AMX
    if (j->half && j->isa == DPO_ISA_AMX) return peak_tiles(rounds / 20, &j->result);
#endif
    if (j->isa >= DPO_ISA_AVX512) return peak_avx512(rounds, &j->result);
    if (j->isa == DPO_ISA_AVX2) return peak_avx2(rounds, &j->result);
#endif
    return peak_plain(rounds, &j->result);
}

static void *peak_arithmetic(void *arg)
{
    peak_job *j = (peak_job *)arg;
    double    start = dpo_seconds();
    j->work = 0;
    while ((j->seconds = dpo_seconds() - start) < j->least) j->work += peak_rounds(j, 200000);
    return NULL;
}

/* Reads this thread's share.  Eight sums of whole numbers, so that the additions do not wait for each other. */
static void *peak_memory(void *arg)
{
    peak_job *j = (peak_job *)arg;
    double    start = dpo_seconds();
    uint64_t  s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    j->work = 0;
    while ((j->seconds = dpo_seconds() - start) < j->least) {
        for (const uint64_t *p = j->memory, *end = p + j->count/8*8; p < end; p += 8) {
            s0 += p[0];  s1 += p[1];  s2 += p[2];  s3 += p[3];  s4 += p[4];  s5 += p[5];  s6 += p[6];  s7 += p[7];
        }
        j->work += (double)j->count * sizeof *j->memory;
    }
    j->sum = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7;
    return NULL;
}

/* The sum of all threads' rates, of one run. */
static double peak_once(void *(*work)(void *), const peak_job *what, int threads)
{
    pthread_t id[64];
    peak_job  jobs[64];
    double    rate = 0;
    for (int i = 0; i < threads; i++) {
        jobs[i] = *what;
        jobs[i].count = what->count / (size_t)threads;
        if (what->memory) jobs[i].memory = what->memory + (size_t)i * jobs[i].count;
        if (pthread_create(&id[i], NULL, work, &jobs[i]) != 0) threads = i;
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(id[i], NULL);
        rate += jobs[i].work / jobs[i].seconds;
    }
    return rate;
}

/* How many run: --threads, or one a processor. */
static int thread_count(const options *o)
{
    long n = o->threads > 0 ? o->threads : sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 64 ? 64 : (int)n;
}

static dpo_desc desc_of(const options *o)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.isa = o->isa;
    d.threads = o->threads;
    d.products = o->products;
    return d;
}

/* What the library would use. */
static int best_isa(const options *o)
{
    dpo_desc     d = desc_of(o);
    dpo_backend *b = dpo_cpu_open(&d);
    int          isa = b ? ((dpoi_cpu *)b->self)->isa : DPO_ISA_PLAIN;
    if (b) b->close(b->self);
    return isa;
}

/* ----------------------------------------------------------------------------------------------- counting

   A backend that hands every call on to another one, and counts what it was. */

#define BENCH_NAME(name, inputs, grads, keeps) #name,
static const char *const op_names[] = { DPO_OPS(BENCH_NAME) "CONV 3x3" };

typedef struct tally {
    double  seconds, flop, bytes, possible;       /* possible: flop of the machine's peak in that time */
    int64_t calls;
} tally;

typedef struct meter {
    dpo_backend  shell, *inner;
    tally        ops[DPO_OP_COUNT + 1][2];                /* by op, forward and backward; the last: CONV larger than 1x1 */
    int          timed;
    peak_job     peak;                                    /* with --profile on a CPU, where least > 0: the peak of the moment, */
    int          threads;                                 /* taken anew every fifth of a second for a hundredth; */
    double       rate, taken, aside;                      /* flop/s, when, and the seconds that this took */
} meter;

static double count(const dpo_view *v) { return v->data ? (double)v->shape[0]*v->shape[1]*v->shape[2]*v->shape[3] : 0; }

static double bytes(const dpo_view *v) { return count(v) * (v->dtype == DPO_F32 || v->dtype == DPO_I32 ? 4 : 2); }

/* Two for each multiplication with its addition; dx and dW cost as much as y.  Adapters: r*(I*kh*kw + O) a pixel more. */
static double product_flop(const dpo_args *a)
{
    const dpo_view *w = &a->in[1], *y = a->backward ? &a->dout : &a->out;
    double K = (double)w->shape[1]*w->shape[2]*w->shape[3], O = (double)w->shape[0], R = count(y) / O;
    double r = a->in[5].data ? (double)a->in[5].shape[0] : 0;
    double times = a->backward ? (a->din[0].data != NULL) + (a->din[1].data != NULL) : 1;
    return 2*R*K*O*times + 2*R*r*(K + O)*(a->backward ? times + 1 : 1);
}

/* q k^T and p v, T*S*D each and sample; twice that in backward, where recomputing the scores is not counted. */
static double attention_flop(const dpo_args *a)
{
    const dpo_view *q = &a->in[0], *k = &a->in[1];
    return 4.0 * q->shape[0]*q->shape[1]*k->shape[1]*q->shape[2] * (a->backward ? 2 : 1);
}

/* The machine's peak changes from second to second where others share it: a rate is held against that of its moment. */
static void meter_peak(meter *m)
{
    double start = dpo_seconds();
    if (m->peak.least <= 0 || start - m->taken < 0.2) return;
    m->rate = peak_once(peak_arithmetic, &m->peak, m->threads);
    m->taken = dpo_seconds();
    m->aside += m->taken - start;
}

static void meter_note(meter *m, const dpo_args *a, double seconds)
{
    int    wide = a->op == DPO_OP_CONV && a->in[1].shape[1]*a->in[1].shape[2] > 1;
    tally *t = &m->ops[wide ? (int)DPO_OP_COUNT : a->op][a->backward != 0];
    t->calls++;
    t->seconds += seconds;
    t->possible += seconds * m->rate;
    if (a->op == DPO_OP_CONV) t->flop += product_flop(a);
    if (a->op == DPO_OP_ATTENTION) t->flop += attention_flop(a);
    t->bytes += bytes(&a->out) + bytes(&a->dout);
    for (int i = 0; i < DPO_MAX_INPUTS; i++) t->bytes += bytes(&a->in[i]) + bytes(&a->din[i]);
}

static int meter_run(void *self, const dpo_args *a)
{
    meter *m = (meter *)self;
    double start;
    int    status;
    if (m->timed) meter_peak(m);
    start = m->timed ? dpo_seconds() : 0;
    status = m->inner->run(m->inner->self, a);
    if (m->timed) m->inner->sync(m->inner->self);
    meter_note(m, a, m->timed ? dpo_seconds() - start : 0);
    return status;
}

static meter *meter_of(void *self) { return (meter *)self; }
static void *meter_alloc(void *s, size_t n)                { return meter_of(s)->inner->alloc(meter_of(s)->inner->self, n); }
static void  meter_release(void *s, void *p, size_t n)     { meter_of(s)->inner->release(meter_of(s)->inner->self, p, n); }
static int   meter_copy(void *s, void *to, const void *from, size_t n, int d) { return meter_of(s)->inner->copy(meter_of(s)->inner->self, to, from, n, d); }
static int   meter_zero(void *s, void *p, size_t n)        { return meter_of(s)->inner->zero(meter_of(s)->inner->self, p, n); }
static size_t meter_workspace(void *s, const dpo_args *a)  { return meter_of(s)->inner->workspace(meter_of(s)->inner->self, a); }
static int   meter_step(void *s, int begin)                { return meter_of(s)->inner->step(meter_of(s)->inner->self, begin); }
static int   meter_sync(void *s)                           { return meter_of(s)->inner->sync(meter_of(s)->inner->self); }
static const char *meter_explain(void *s)                  { return meter_of(s)->inner->explain(meter_of(s)->inner->self); }
static void  meter_close(void *s)                          { meter_of(s)->inner->close(meter_of(s)->inner->self); }

/* In front of `inner`, which it takes over. */
static dpo_backend *meter_open(meter *m, dpo_backend *inner)
{
    if (!inner) return NULL;
    m->inner = inner;
    m->shell = *inner;
    m->shell.self = m;
    m->shell.alloc = meter_alloc;
    m->shell.release = meter_release;
    m->shell.copy = meter_copy;
    m->shell.zero = meter_zero;
    m->shell.workspace = meter_workspace;
    m->shell.run = meter_run;
    m->shell.sync = meter_sync;
    m->shell.step = inner->step ? meter_step : NULL;
    m->shell.send = NULL;
    m->shell.take = NULL;
    m->shell.explain = meter_explain;
    m->shell.close = meter_close;
    return &m->shell;
}

static double meter_flop(const meter *m)
{
    double sum = 0;
    for (int i = 0; i <= DPO_OP_COUNT; i++) sum += m->ops[i][0].flop + m->ops[i][1].flop;
    return sum;
}

static void meter_print(const meter *m, int steps, double seconds)
{
    double inside = 0;
    printf("%-22s %8s %10s %7s %10s %8s %8s\n", "op, one step", "calls", "ms", "share", "GFLOP/s", "of peak", "GB/s");
    for (int i = 0; i <= DPO_OP_COUNT; i++)
        for (int k = 0; k < 2; k++) {
            const tally *t = &m->ops[i][k];
            if (!t->calls) continue;
            inside += t->seconds / steps;
            printf("%-13s %-8s %8.0f %10.2f %6.1f%% %10.1f %7.1f%% %8.1f\n", op_names[i], k ? "backward" : "forward",
                   (double)t->calls / steps, 1e3 * t->seconds / steps, 100 * t->seconds / steps / seconds,
                   t->flop / t->seconds / 1e9, t->possible > 0 ? 100 * t->flop / t->possible : 0, t->bytes / t->seconds / 1e9);
        }
    printf("%-22s %8s %10.2f %6.1f%%\n", "outside of ops", "", 1e3 * (seconds - inside), 100 * (seconds - inside) / seconds);
}

/* ----------------------------------------------------------------------------------------------- one step */

typedef struct bench {
    const options    *o;
    const model_kind *kind;
    int         task, N, checkpoint;      /* N: pictures of a step, winners first */
    meter       m;
    dpo_ctx    *c;
    dpo_model  *model;
    dpo_net    *unet, *reference;         /* reference: NULL where it is the adapters off */
    dpo_optim  *optim;
    uint32_t    step;
    double      loss, grad_norm;
} bench;

typedef struct step_in { dpo_unet_in u; dpo_tensor *noise; } step_in;
typedef struct step_out { dpo_tensor *y, *policy, *reference, *loss; } step_out;

static dpo_ctx *open_context(const options *o, meter *m)
{
    dpo_desc d = desc_of(o);
    if (strcmp(o->device, "cuda") == 0) {
#ifdef DIFFDPO_CUDA
        dpo_backend *b = dpo_cuda_open(0, DIFFDPO_VERSION);
        dpo_cuda_set(b, DPO_CUDA_PRODUCTS, o->products);
        d.backend = meter_open(m, b);
#else
        fprintf(stderr, "bench: this build has no CUDA; see the build line of diffdpo_cuda.cu\n");
        return NULL;
#endif
    } else d.backend = meter_open(m, dpo_cpu_open(&d));
    return d.backend ? dpo_open(&d) : NULL;
}

/* Normal numbers [N,shape..]; pairs: the second half of the batch repeats the first. */
static dpo_tensor *normal(bench *b, uint32_t purpose, int pairs, int rank, const int64_t *shape)
{
    int32_t keys[1024];
    int64_t n = b->N;
    for (int i = 0; i < b->N; i++) keys[i] = pairs ? i % (b->N / 2) : i;
    return dpo_randn(b->c, 1, purpose, b->step, dpo_tensor_from(b->c, DPO_I32, 1, &n, keys), rank, shape);
}

/* In the type that the network computes in. */
static dpo_tensor *typed(bench *b, dpo_tensor *x) { return b->o->dtype == DPO_F32 ? x : dpo_cast(b->c, x, b->o->dtype); }

static dpo_tensor *timesteps(bench *b)
{
    float   t[1024];
    int64_t n = b->N;
    for (int i = 0; i < b->N; i++) {
        uint32_t k = (uint32_t)(b->task == FORWARD ? i : i % (b->N / 2)), x = (b->step * 1024 + k + 1) * 2654435761u;
        t[i] = (float)((x ^ x >> 15) * 2246822519u % 1000);
    }
    return dpo_tensor_from(b->c, DPO_F32, 1, &n, t);
}

static step_in draw(bench *b)
{
    const model_kind *k = b->kind;
    int64_t size = b->o->size ? b->o->size : k->size, picture[3] = { size, size, k->channels };
    int64_t text[2] = { k->tokens, k->width }, pooled[1] = { k->pooled };
    int64_t ids[2] = { b->N, 6 };
    float   sizes[6 * 1024];
    step_in in;
    memset(&in, 0, sizeof in);
    in.u.x = typed(b, normal(b, 1, 0, 3, picture));
    in.u.t = timesteps(b);
    in.u.emb = typed(b, normal(b, 2, b->task != FORWARD, 2, text));
    in.u.checkpoint = b->checkpoint;
    if (b->task != FORWARD) in.noise = normal(b, 3, 1, 3, picture);
    if (k->pooled) {
        for (int i = 0; i < 6 * b->N; i++) sizes[i] = 1024;
        in.u.pooled = typed(b, normal(b, 4, 0, 1, pooled));
        in.u.time_ids = dpo_tensor_from(b->c, DPO_F32, 2, ids, sizes);
    }
    return in;
}

/* Reference without a gradient, policy with one, errors, loss:  L = mean (net(x) - noise)^2, Diffusion-DPO with beta 5000. */
static step_out forward(bench *b, const step_in *in)
{
    dpo_ctx    *c = b->c;
    dpo_unet_in ref = in->u;
    step_out    out;
    memset(&out, 0, sizeof out);
    dpo_no_grad(c, 1);
    if (b->task == FORWARD) out.y = dpo_unet(b->unet, &in->u);
    else {
        int64_t scope = dpo_scope(c);
        ref.adapters_off = 1;
        ref.checkpoint = 0;
        out.reference = dpo_scope_end(c, scope, dpo_mse(c, dpo_last(dpo_unet(b->reference ? b->reference : b->unet, &ref)), in->noise));
    }
    dpo_no_grad(c, -1);
    if (b->task == FORWARD) return out;
    out.y = dpo_unet(b->unet, &in->u);
    out.policy = dpo_mse(c, out.y, in->noise);
    out.loss = dpo_preference_loss(c, out.policy, out.reference, NULL, DPO_PREF_SIGMOID, 5000, 0, NULL);
    return out;
}

/* From new draws to new weights.  The few numbers that come back are read outside of the time. */
static double timed_step(bench *b)
{
    double     start = dpo_seconds(), seconds;
    int64_t    scope = dpo_scope(b->c), skipped;
    int        replay = b->m.inner->step && !b->m.timed;       /* the device may replay a whole step; --profile wants each call */
    step_in    in;
    step_out   out;
    float      loss = NAN, norm = NAN;
    if (replay) b->m.inner->step(b->m.inner->self, 1);
    in = draw(b);
    out = forward(b, &in);
    b->step++;
    if (b->task != FORWARD) {
        dpo_backward(out.loss);
        dpo_optim_step(b->optim, 1e-6f);
    }
    if (replay) b->m.inner->step(b->m.inner->self, 0);
    b->m.inner->sync(b->m.inner->self);
    seconds = dpo_seconds() - start - b->m.aside;
    b->m.aside = 0;
    if (b->task != FORWARD && dpo_read(out.loss, &loss)) dpo_optim_read(b->optim, &norm, &skipped);
    b->loss = loss;
    b->grad_norm = norm;
    dpo_scope_end(b->c, scope, NULL);
    return seconds;
}

/* ----------------------------------------------------------------------------------------------- setting up */

/* Random weights in F32 are made in place.  In BF16 another process makes and saves them, so that this one, whose peak is
   measured, holds what a program holds that loads a file. */
static dpo_model *make_model(bench *b)
{
    pid_t child;
    int   status = 1;
    if (!write_pipeline(b->kind->unet, b->kind->width, b->kind->pooled)) return NULL;
    if (b->o->dtype == DPO_F32 || b->task == DPO_FULL) return dpo_model_create(b->c, folder, 1);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        dpo_ctx *c = dpo_open(NULL);
        dpo_model_save(dpo_model_create(c, folder, 1), folder, b->o->dtype);
        if (dpo_error(c)) fprintf(stderr, "bench: %s\n", dpo_error(c));
        _exit(dpo_error(c) != NULL);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) return NULL;
    return dpo_model_load(b->c, folder, b->o->dtype);
}

/* What a task trains, and against which reference. */
static void prepare(bench *b, const char *adapters)
{
    dpo_adapter_desc a;
    dpo_adamw_desc   d;
    dpo_tensor     **params;
    int              count;
    memset(&a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    a.rank = 16;
    a.alpha = 16;
    a.seed = 1;
    d.weight_decay = 1e-2f;
    d.max_norm = 1;
    b->unet = dpo_model_unet(b->model);
    if (b->task == FORWARD || !b->unet) return;
    if (b->task == DPO_LORA) {
        dpo_adapter_new(b->unet, &a);
        if (adapters) dpo_adapter_load(b->unet, adapters);
        params = dpo_adapter_params(b->unet, &count);
    } else {
        b->reference = dpo_net_copy(b->unet, b->o->dtype);
        dpo_net_trainable(b->unet, 1);
        params = dpo_net_params(b->unet, &count);
    }
    b->optim = dpo_adamw_new(b->c, params, count, &d);
}

static double peak_bytes(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
#ifdef __APPLE__
    return (double)r.ru_maxrss;
#else
    return (double)r.ru_maxrss * 1024;
#endif
}

static int by_size(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

static int failed(dpo_ctx *c)
{
    if (c && !dpo_error(c)) return 0;
    fprintf(stderr, "bench: %s\n", c ? dpo_error(c) : "no context");
    return 1;
}

static int run_work(bench *b)
{
    double times[100], flop, sum = 0;
    int    n = b->o->repeat;
    if (!(b->c = open_context(b->o, &b->m))) return 1;
    if (!failed(b->c)) b->model = make_model(b);
    prepare(b, NULL);
    remove_folder();
    if (!b->model || failed(b->c)) { if (!dpo_error(b->c)) fprintf(stderr, "bench: no model\n"); dpo_close(b->c); return 1; }
    timed_step(b);
    flop = 0;
    memset(b->m.ops, 0, sizeof b->m.ops);
    b->m.timed = b->o->profile;
    if (b->o->profile && strcmp(b->o->device, "cpu") == 0) {
        b->m.peak.isa = best_isa(b->o);
        b->m.peak.half = b->o->dtype != DPO_F32 || b->o->products == DPO_BF16;
        b->m.peak.least = 0.01;
        b->m.threads = thread_count(b->o);
    }
    for (int i = 0; i < n && !dpo_error(b->c); i++) sum += times[i] = timed_step(b);
    if (failed(b->c)) { dpo_close(b->c); return 1; }
    flop = meter_flop(&b->m) / n;
    if (b->o->profile) meter_print(&b->m, n, sum / n);
    qsort(times, (size_t)n, sizeof *times, by_size);
    printf("{\"work\": \"%s\", \"by\": \"diffdpo %d.%d.%d\", \"dtype\": \"%s\", \"device\": \"%s\", \"batch\": %d, \"seconds\": %.4f,"
           " \"seconds_median\": %.4f, \"peak_bytes\": %.0f, \"tflop\": %.4f", b->o->work, DIFFDPO_VERSION >> 16,
           DIFFDPO_VERSION >> 8 & 255, DIFFDPO_VERSION & 255, b->o->dtype == DPO_F32 ? "f32" : "bf16", b->o->device, b->N,
           times[0], times[n / 2], strcmp(b->o->device, "cuda") == 0 ? (double)dpo_memory_peak(b->c, 0) : peak_bytes(), flop / 1e12);
    if (b->task != FORWARD) printf(", \"loss\": %.7g, \"grad_norm\": %.7g", b->loss, b->grad_norm);
    printf("}\n");
    dpo_close(b->c);
    return 0;
}

/* ----------------------------------------------------------------------------------------------- checking */

static float *values_of(dpo_entry *e)
{
    float *x = e ? (float *)malloc(((size_t)e->count + 1) * sizeof *x) : NULL;
    if (x && !dpo_entry_floats(e, 0, e->count, x)) { free(x); return NULL; }
    return x;
}

/* PyTorch's [N,C,P] to [N,P,C], or back with C and P exchanged. */
static void turn(float *to, const float *from, int64_t N, int64_t C, int64_t P)
{
    for (int64_t n = 0; n < N; n++)
        for (int64_t c = 0; c < C; c++)
            for (int64_t p = 0; p < P; p++) to[(n*P + p)*C + c] = from[(n*C + c)*P + p];
}

static dpo_tensor *tensor_of(dpo_ctx *c, dpo_file *f, const char *name)
{
    dpo_entry  *e = dpo_file_find(f, name);
    float      *x = values_of(e), *y = x && e->rank == 4 ? (float *)malloc(((size_t)e->count + 1) * sizeof *y) : NULL;
    int64_t     s[4];
    dpo_tensor *t = NULL;
    if (x && e->rank <= 4) {
        for (int i = 0; i < 4; i++) s[i] = e->shape[i];
        if (y) {
            turn(y, x, s[0], s[1], s[2]*s[3]);
            s[1] = e->shape[2]; s[2] = e->shape[3]; s[3] = e->shape[1];
        }
        t = dpo_tensor_from(c, DPO_F32, e->rank, s, y ? y : x);
    }
    free(x);
    free(y);
    return t;
}

/* One line: the largest difference over the largest value, the relative difference in the sum of squares; 1 if it fails. */
static int differ(const char *name, dpo_tensor *t, dpo_entry *e, double tolerance)
{
    float *a = (float *)malloc(((size_t)dpo_count(t) + 1) * sizeof *a), *b = values_of(e), *back = NULL;
    double worst = 0, most = 0, sum = 0, all = 0;
    int    ok;
    if (!t || !a || !b || dpo_count(t) != e->count || !dpo_read(t, a)) worst = NAN;
    else if (e->rank == 4 && (back = (float *)malloc((size_t)e->count * sizeof *back)) != NULL) {
        turn(back, b, e->shape[0], e->shape[1], e->shape[2]*e->shape[3]);
        memcpy(b, back, (size_t)e->count * sizeof *b);
    }
    for (int64_t i = 0; worst == worst && i < e->count; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
        if (fabs(b[i]) > most) most = fabs(b[i]);
        sum += d*d;
        all += (double)b[i]*b[i];
    }
    ok = sqrt(sum / all) <= tolerance;
    printf("%-12s max %.2e  l2 %.2e  tolerance %.0e  %s\n", name, worst / most, sqrt(sum / all), tolerance, ok ? "ok" : "FAIL");
    free(a);
    free(b);
    free(back);
    return !ok;
}

static int differ_number(const char *name, double is, double wanted, double tolerance)
{
    int ok = fabs(is - wanted) <= tolerance * fmax(1, fabs(wanted));
    printf("%-12s %.7g, wanted %.7g, difference %.2e  tolerance %.0e  %s\n", name, is, wanted, fabs(is - wanted), tolerance, ok ? "ok" : "FAIL");
    return !ok;
}

/* The saved UNet inside a pipeline of the least text encoders: those are made and saved first, around a UNet that is as
   small, and then its folder is replaced by the saved one. */
static dpo_model *load_saved(bench *b, const char *dir)
{
    char      small[512], path[4096], *full;
    dpo_json *v;
    int       width, pooled;
    dpo_ctx  *c = dpo_open(NULL);
    snprintf(path, sizeof path, "%s/unet", dir);
    full = realpath(path, NULL);
    snprintf(path, sizeof path, "%s/unet/config.json", dir);
    v = dpo_json_load(c, path);
    width = (int)dpo_json_want_int(v, "cross_attention_dim", 1280, 1, 1 << 16);
    pooled = (int)dpo_json_want_int(v, "projection_class_embeddings_input_dim", 0, 0, 1 << 16) -
             6 * (int)dpo_json_want_int(v, "addition_time_embed_dim", 0, 0, 1 << 16);
    snprintf(small, sizeof small, "{\"cross_attention_dim\": %d, \"block_out_channels\": [32], \"layers_per_block\": 1,"
             " \"sample_size\": 8, \"down_block_types\": [\"DownBlock2D\"], \"up_block_types\": [\"UpBlock2D\"]}", width);
    if (!failed(c) && full && write_pipeline(small, width, pooled)) dpo_model_save(dpo_model_create(c, folder, 1), folder, DPO_F32);
    if (failed(c) || !full) { dpo_close(c); free(full); return NULL; }
    dpo_close(c);
    remove(in_folder("unet/config.json"));
    remove(in_folder("unet/diffusion_pytorch_model.safetensors"));
    rmdir(in_folder("unet"));
    if (symlink(full, in_folder("unet")) == 0) b->model = dpo_model_load(b->c, folder, b->task == DPO_FULL ? DPO_F32 : b->o->dtype);
    unlink(in_folder("unet"));
    free(full);
    return b->model;
}

static step_in saved_input(bench *b, dpo_file *f)
{
    step_in in;
    memset(&in, 0, sizeof in);
    in.u.x = typed(b, tensor_of(b->c, f, "x"));
    in.u.t = tensor_of(b->c, f, "t");
    in.u.emb = typed(b, tensor_of(b->c, f, "emb"));
    if (dpo_file_find(f, "pooled")) {
        in.u.pooled = typed(b, tensor_of(b->c, f, "pooled"));
        in.u.time_ids = tensor_of(b->c, f, "time_ids");
    }
    in.u.checkpoint = b->checkpoint;
    in.noise = tensor_of(b->c, f, "noise");
    return in;
}

/* F32: rounding alone.  A step's loss multiplies differences of errors by 2,500.  BF16: 2 % of the output. */
static int compare_step(bench *b, dpo_file *f, const dpo_json *v)
{
    int      half = b->o->dtype != DPO_F32, bad;
    step_in  in = saved_input(b, f);
    step_out out = forward(b, &in);
    float    loss = NAN, norm = NAN;
    double   wanted = NAN;
    int64_t  skipped;
    bad = differ("y", out.y, dpo_file_find(f, "y"), half ? 2e-2 : 1e-5);
    if (b->task == FORWARD) return bad;
    bad += differ("policy", out.policy, dpo_file_find(f, "policy"), half ? 1e-2 : 1e-5);
    bad += differ("reference", out.reference, dpo_file_find(f, "reference"), half ? 1e-2 : 1e-5);
    dpo_read(out.loss, &loss);
    dpo_json_double(dpo_json_get(v, "loss"), &wanted);
    bad += differ_number("loss", loss, wanted, half ? 1 : 5e-3);
    dpo_backward(out.loss);
    dpo_optim_step(b->optim, 1e-6f);
    dpo_optim_read(b->optim, &norm, &skipped);
    wanted = NAN;
    dpo_json_double(dpo_json_get(v, "grad_norm"), &wanted);
    return bad + differ_number("grad_norm", norm, wanted, half ? 1 : 5e-3);
}

static int task_of(const char *work)
{
    const char *name = work ? strchr(work, '_') : NULL;
    for (int i = 0; name && i < 3; i++) if (strcmp(name + 1, task_names[i]) == 0) return i;
    return -1;
}

static int run_check(bench *b, const char *dir)
{
    char      path[4096];
    dpo_json *v;
    dpo_file *f;
    int       bad = 1;
    if (!(b->c = open_context(b->o, &b->m))) return 1;
    snprintf(path, sizeof path, "%s/step.json", dir);
    v = dpo_json_load(b->c, path);
    snprintf(path, sizeof path, "%s/step.safetensors", dir);
    f = dpo_safetensors_open(b->c, path);
    b->task = task_of(dpo_json_want_text(v, "work", NULL));
    snprintf(path, sizeof path, "%s/lora.safetensors", dir);
    if (f && b->task >= 0) {
        b->checkpoint = b->o->checkpoint;
        if (load_saved(b, dir)) prepare(b, path);
        remove_folder();
        if (b->model && !dpo_error(b->c)) bad = compare_step(b, f, v);
    }
    if (failed(b->c)) bad = 1;
    printf("%s\n", bad ? "differs" : "agrees");
    dpo_close(b->c);
    return bad != 0;
}

/* ----------------------------------------------------------------------------------------------- bench peak */

/* The best of five runs of half a second. */
static double peak_of(void *(*work)(void *), const peak_job *what, int threads)
{
    double best = 0;
    for (int round = 0; round < 5; round++) {
        double rate = peak_once(work, what, threads);
        if (rate > best) best = rate;
    }
    return best;
}

static int run_peak(const options *o)
{
    size_t    words = (size_t)1 << 26;    /* 512 MiB: larger than any cache */
    int       threads = thread_count(o);
    uint64_t *memory = (uint64_t *)malloc(words * sizeof *memory);
    peak_job  job;
    double    flops, bandwidth = 0;
    memset(&job, 0, sizeof job);
    job.isa = best_isa(o);
    job.half = o->dtype != DPO_F32;
    job.least = 0.5;
    flops = peak_of(peak_arithmetic, &job, threads);
    if (memory) {
        for (size_t i = 0; i < words; i++) memory[i] = i;
        job.memory = memory;
        job.count = words;
        bandwidth = peak_of(peak_memory, &job, threads);
    }
    free(memory);
    printf("{\"work\": \"peak\", \"by\": \"diffdpo %d.%d.%d\", \"isa\": \"%s\", \"threads\": %d, \"gflops_%s\": %.1f,"
           " \"read_gigabytes_per_second\": %.1f}\n", DIFFDPO_VERSION >> 16, DIFFDPO_VERSION >> 8 & 255, DIFFDPO_VERSION & 255,
           isa_names[job.isa], threads, job.half ? "bf16" : "f32", flops / 1e9, bandwidth / 1e9);
    return 0;
}

/* ----------------------------------------------------------------------------------------------- command line */

static int usage(void)
{
    fprintf(stderr, "usage: bench MODEL_TASK | peak | --check DIR  [--dtype f32|bf16] [--device cpu|cuda]\n"
                    "             [--isa plain|avx2|avx512|amx] [--products f32|bf16] [--threads N] [--batch N] [--size N]\n"
                    "             [--repeat N] [--checkpoint] [--profile]\n"
                    "       MODEL sd15, sdxl, small; TASK forward, dpo_lora, dpo_full\n");
    return 2;
}

static int choose(const char *text, const char *const *names, int n)
{
    for (int i = 0; i < n; i++) if (strcmp(text, names[i]) == 0) return i;
    return -1;
}

/* One option with its value; 0 if it is none. */
static int set_option(options *o, const char *name, const char *value)
{
    static const char *const dtypes[] = { "f32", "bf16" };                   /* DPO_F32, DPO_BF16 */
    static const char *const devices[] = { "cpu", "cuda" };
    if (strcmp(name, "--check") == 0)   { o->check = value; return 1; }
    if (strcmp(name, "--dtype") == 0)   { o->dtype = choose(value, dtypes, 2); return o->dtype >= 0; }
    if (strcmp(name, "--products") == 0) { o->products = choose(value, dtypes, 2); return o->products >= 0; }
    if (strcmp(name, "--device") == 0)  { o->device = value; return choose(value, devices, 2) >= 0; }
    if (strcmp(name, "--isa") == 0)     { o->isa = choose(value, isa_names, 5); return o->isa >= 0; }
    if (strcmp(name, "--threads") == 0) { o->threads = atoi(value); return o->threads > 0; }
    if (strcmp(name, "--batch") == 0)   { o->batch = atoi(value); return o->batch > 0 && o->batch <= 1024; }
    if (strcmp(name, "--size") == 0)    { o->size = atoi(value); return o->size > 0 && o->size <= 1024; }
    if (strcmp(name, "--repeat") == 0)  { o->repeat = atoi(value); return o->repeat > 0 && o->repeat <= 100; }
    return 0;
}

static int parse(options *o, int argc, char **argv)
{
    memset(o, 0, sizeof *o);
    o->device = "cpu";
    o->repeat = 3;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--checkpoint") == 0) o->checkpoint = 1;
        else if (strcmp(argv[i], "--profile") == 0) o->profile = 1;
        else if (argv[i][0] == '-' && i + 1 < argc) { if (!set_option(o, argv[i], argv[i + 1])) return 0; i++; }
        else if (argv[i][0] != '-' && !o->work) o->work = argv[i];
        else return 0;
    }
    return (o->work != NULL) != (o->check != NULL);
}

int main(int argc, char **argv)
{
    options      o;
    static bench b;                       /* its meter is large */
    if (!parse(&o, argc, argv)) return usage();
    b.o = &o;
    if (o.check) return run_check(&b, o.check);
    if (strcmp(o.work, "peak") == 0) return run_peak(&o);
    b.task = task_of(o.work);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strncmp(o.work, kinds[i].name, strlen(kinds[i].name)) == 0 && o.work[strlen(kinds[i].name)] == '_') b.kind = &kinds[i];
    if (b.task < 0 || !b.kind) return usage();
    b.N = o.batch ? o.batch : b.kind->batch;
    if (b.task != FORWARD && b.N % 2) { fprintf(stderr, "bench: a batch of pairs is even\n"); return 2; }
    b.checkpoint = o.checkpoint || (b.task == DPO_FULL && b.kind->checkpoint);
    return run_work(&b);
}
