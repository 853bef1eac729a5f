/* train.c - train Stable Diffusion on preferences: from a folder of pairs to an adapter, through every interruption.

   need    apt-get install gcc libc6-dev libstb-dev
   build   cc -O2 examples/train.c -o build/train -lm -lpthread
           mpicc -O2 -DDIFFDPO_MPI examples/train.c -o build/train-mpi -lm -lpthread       (several processes)
   run     build/train --pretrained_model_name_or_path MODEL --train_data_dir PAIRS --output_dir OUT
                       [--preset official-sd15|official-sdxl|official-turbo|lora-sd15|lora-sdxl|diffusers|small] [...]
           build/train --help                           every option with its default
   MODEL   a folder as diffusers writes it, or one .safetensors file
   PAIRS   a manifest (.jsonl, .json, .csv) or a folder with w/ and l/, see dpo_pairs_load in diffdpo.h
   result  OUT/adapter.safetensors or OUT/model/      what was learned, for other programs
           OUT/checkpoint-N/, OUT/latest.txt          what --resume_from_checkpoint latest goes on from
           OUT/metrics.jsonl, OUT/events.out.tfevents.*, OUT/samples/, OUT/report.html     what happened
           OUT/best/                                  the checkpoint that ranks held-out pairs best

   Options are those of the authors' script and of diffusers'; `-` and `_` are alike in their names. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef DIFFDPO_MPI
#include <mpi.h>
#endif
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"

enum { PATHS = 1200 };                  /* bytes of a path */

/* ---- Words ------------------------------------------------------------------------------------------------------ */

/* One line for what went wrong.  Returns 0, so that a function can say: return fail(...).
   What the library could not do needs no such call: the context keeps it, and main says it, once. */
static int fail(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("train: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return 0;
}

static void on_log(void *user, int level, const char *text)
{
    (void)user;
    if (level == DPO_LOG_WARNING) fprintf(stderr, "train: %s\n", text);
    if (level == DPO_LOG_INFO) { printf("%s\n", text); fflush(stdout); }
}

/* With --check_data every bad row is what the user wants to read. */
static void on_log_all(void *user, int level, const char *text)
{
    if (level == DPO_LOG_ERROR) fprintf(stderr, "train: %s\n", text);
    else on_log(user, level, text);
}

#include "train_options.h"

/* A run as it goes. */
typedef struct {
    settings    s;
    dpo_ctx    *c;
    dpo_model  *m;
    dpo_pairs  *pairs, *held;
    dpo_trainer *t;
    dpo_team    team;
    int         width, height;
    double      beta;                   /* in the library's convention */
    char       *note;                   /* the settings as text, for checkpoints */
    FILE       *metrics, *events;
    double      start, told;
    float       best;                   /* held-out accuracy of OUT/best; -1: none */
    int         failed, warned;
    int64_t     trained;                /* pairs that are trained on */
    int64_t     held_at;                /* step of the last line of held-out pairs; -1: none */
    int64_t     stop_at;                /* step of --stop_when_degrading, or 0 */
} run;

/* ---- Settings that fit each other -------------------------------------------------------------------------------- */

/* Whatever contradicts itself is refused here, before anything is written. */
static int check_settings(run *r)
{
    settings *s = &r->s;
    char     *end = NULL;
    if (s->check_data) return s->data ? 1 : fail("--check_data wants --train_data_dir");
    if (!s->model) return fail("--pretrained_model_name_or_path is missing: which model?");
    if (!s->data)  return fail("--train_data_dir is missing: which pairs?");
    if (!s->out && !s->estimate) return fail("--output_dir is missing: where to?");
#ifndef DIFFDPO_CUDA
    if (s->device == 1) return fail("this build has no CUDA; diffdpo_cuda.cu says how to make one");
#endif
    if (s->sft && s->objective > 1) return fail("--sft contradicts --objective");
    if (s->sft) s->objective = DPO_SFT;
    if ((s->adafactor && s->adam8) || (s->adafactor && s->optimizer == DPO_ADAMW8) ||
        (s->adam8 && s->optimizer == DPO_ADAFACTOR && !s->preset))
        return fail("--use_adafactor, --use_8bit_adam and --optimizer name different optimizers");
    if (s->adafactor) s->optimizer = DPO_ADAFACTOR;
    if (s->adam8) s->optimizer = DPO_ADAMW8;
    if (s->drop && s->keep_encoders) return fail("--drop_encoders contradicts --keep_encoders");
    if (s->held_share > 0 && s->held_data) return fail("--validation_pairs and --validation_data_dir: one of the two");
    if (s->schedule == 5) s->schedule = DPO_LR_CONSTANT;
    else if (s->schedule == DPO_LR_CONSTANT && s->warmup && !s->preset)
        return fail("--lr_scheduler constant has no warm-up: take constant_with_warmup");
    if (s->convention && s->objective != DPO_DPO) return fail("--beta_convention is about dpo alone");
    if (s->stop_degrading && !(s->limit > 0)) return fail("--stop_when_degrading needs --degrading_limit above 0");
    if (s->lora && s->rank == 0) return fail("--lora starts adapters, --rank 0 trains all weights");
    r->beta = s->convention ? 2 * s->beta : s->beta;
    if (!s->resolution) return 1;
    r->width = r->height = (int)strtol(s->resolution, &end, 10);
    if (*end == 'x') r->height = (int)strtol(end + 1, &end, 10);
    if (*end || r->width < 8 || r->height < 8 || r->width > 8192 || r->height > 8192)
        return fail("--resolution wants 512 or 640x384, not %.40s", s->resolution);
    return 1;
}

/* name=value lines of all options whose change would make another run. */
static int write_note(run *r)
{
    size_t at = 0, room = 16384;
    char   text[1024];
    if (!(r->note = (char *)dpo_scope_alloc(r->c, room))) return 0;
    for (int i = 0; i < OPTIONS; i++) {
        const option *o = &options[i];
        if (o->keep) continue;
        option_text(&r->s, o, text, sizeof text);
        at += (size_t)snprintf(r->note + at, room - at, "%s=%s\n", o->name, text);
        if (at >= room) return fail("the settings are too long");
    }
    return 1;
}

/* A note of a checkpoint against ours: the first option that differs. */
static int compare_note(const run *r, const char *note, const char *where)
{
    for (int i = 0; i < OPTIONS; i++) {
        const option *o = &options[i];
        char          mine[1024], key[80];
        const char   *p = note, *end;
        if (o->keep) continue;
        option_text(&r->s, o, mine, sizeof mine);
        snprintf(key, sizeof key, "%s=", o->name);
        while (p && strncmp(p, key, strlen(key))) p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL;
        if (!p) continue;                       /* a checkpoint of an older program */
        p += strlen(key);
        end = p + strcspn(p, "\n");
        if ((size_t)(end - p) == strlen(mine) && !memcmp(p, mine, strlen(mine))) continue;
        return fail("%s was made with --%s %.*s, not %s", where, o->name, (int)(end - p), p, mine);
    }
    return 1;
}

/* ---- What is written as it goes --------------------------------------------------------------------------------- */

static void path_of(const run *r, char *path, const char *name) { snprintf(path, PATHS, "%s/%s", r->s.out, name); }

static int broken(const char *what)
{
    return fail("cannot write %s: %s", what, errno ? strerror(errno) : "the disk is full");
}

#include "train_page.h"

/* Lines of metrics.jsonl up to `step` stay, the others belong to steps that will be done again. */
static int open_metrics(run *r, int64_t step)
{
    char   path[PATHS], aside[PATHS], line[4096];
    FILE  *old, *f;
    int    ok;
    path_of(r, path, "metrics.jsonl");
    path_of(r, aside, "metrics.jsonl.tmp");
    if (!(f = fopen(aside, "wb"))) return broken(path);
    old = step ? fopen(path, "rb") : NULL;
    while (old && fgets(line, sizeof line, old)) {
        double at = 0, x;
        if (!strchr(line, '\n') || !line_number(line, "step", &at) || at > (double)step) continue;
        fputs(line, f);
        if (line_number(line, "held_accuracy", &x)) {
            r->held_at = (int64_t)at;
            if (at > 0 && (float)x > r->best) r->best = (float)x;
        }
        replay_event(r, line);
    }
    if (old) fclose(old);
    ok = !ferror(f);
    if (fclose(f) || !ok || rename(aside, path)) { remove(aside); return broken(path); }
    return (r->metrics = fopen(path, "ab")) != NULL || broken(path);
}

/* One line, whole on the disk or not there: a reader may look at any moment. */
static int put_metrics(run *r, const char *format, ...)
{
    char    line[2048];
    va_list args;
    int     n;
    va_start(args, format);
    n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof line) return fail("a line of metrics is too long");
    errno = 0;
    if (fwrite(line, 1, (size_t)n, r->metrics) != (size_t)n || fflush(r->metrics)) return broken("metrics.jsonl");
    return put_event(r, line);
}

/* Of one step. */
static double seconds_of(const run *r, const dpo_progress *p)
{
    double pairs = (double)r->s.batch * r->s.accumulation * r->team.count;
    return p->pairs_per_second > 0 ? pairs / p->pairs_per_second : 0;
}

/* A number for JSON, which has no infinity. */
static double plain(double x) { return x == x && fabs(x) < 1e30 ? x : 0; }

static int step_metrics(run *r, const dpo_progress *p)
{
    return put_metrics(r, "{\"step\": %lld, \"loss\": %.7g, \"implicit_acc\": %.6g, \"policy_w\": %.7g, "
        "\"policy_l\": %.7g, \"reference_w\": %.7g, \"reference_l\": %.7g, \"margin\": %.7g, \"grad_norm\": %.7g, "
        "\"lr\": %.7g, \"skipped\": %lld, \"bytes\": %llu, \"seconds\": %.4f, \"seconds_data\": %.5f, "
        "\"seconds_optimizer\": %.5f, \"time\": %.3f}\n", (long long)p->step, plain(p->loss), (double)p->implicit_acc,
        plain(p->policy_w), plain(p->policy_l), plain(p->reference_w), plain(p->reference_l), plain(p->margin),
        plain(p->grad_norm), (double)p->lr, (long long)p->skipped, (unsigned long long)p->memory, seconds_of(r, p),
        p->seconds_data, p->seconds_optimizer, (double)time(NULL));
}

/* Every second at most: a small model does hundreds of steps in one. */
static void progress_line(run *r, const dpo_progress *p)
{
    double    now = dpo_seconds(), each = seconds_of(r, p);
    long long left = (long long)(each * (double)(p->steps - p->step));
    if (now - r->told < 1 && p->step != p->steps && p->step != 1) return;
    r->told = now;
    printf("step %lld/%lld  loss %.4f  ranked right %.2f  errors w %.4f (%.4f) l %.4f (%.4f)  |g| %.3g  lr %.3g  %.2f s"
           "  data %.1f%%  left %lld:%02lld:%02lld\n", (long long)p->step, (long long)p->steps, p->loss,
           p->implicit_acc, p->policy_w, p->reference_w, p->policy_l, p->reference_l, p->grad_norm, p->lr, each,
           each > 0 ? 100 * p->seconds_data / each : 0, left / 3600, left / 60 % 60, left % 60);
    fflush(stdout);
}

/* ---- Watching --------------------------------------------------------------------------------------------------- */

/* Held-out pairs; the best state so far is kept, before the line that says so.  All processes measure, for they must
   agree on stopping; the first one writes. */
static int measure(run *r, int64_t step)
{
    dpo_held h;
    char     path[PATHS];
    if (!dpo_train_held(r->t, &h)) return 0;
    if (h.degrading && r->s.stop_degrading) r->stop_at = step;
    if (!h.pairs || r->team.index) return 1;
    printf("step %lld  held-out pairs ranked right: %.3f; by timestep, first quarter to last: %.2f %.2f %.2f %.2f\n",
           (long long)step, h.accuracy, h.range[0], h.range[1], h.range[2], h.range[3]);
    fflush(stdout);
    if (step && h.accuracy > r->best) {
        r->best = h.accuracy;
        path_of(r, path, "best");
        if (!dpo_train_save(r->t, path)) return 0;
    }
    if (h.degrading && !r->warned) {
        r->warned = 1;
        fail("warning: step %lld: both errors on held-out pairs are more than %g%% above the reference's",
             (long long)step, 100 * r->s.limit);
    }
    return put_metrics(r, "{\"step\": %lld, \"held_accuracy\": %.6g, \"held_0\": %.6g, \"held_1\": %.6g, "
                       "\"held_2\": %.6g, \"held_3\": %.6g, \"held_policy_w\": %.7g, \"held_policy_l\": %.7g, "
                       "\"held_reference_w\": %.7g, \"held_reference_l\": %.7g, \"time\": %.3f}\n", (long long)step,
                       (double)h.accuracy, (double)h.range[0], (double)h.range[1], (double)h.range[2],
                       (double)h.range[3], plain(h.policy_w), plain(h.policy_l), plain(h.reference_w),
                       plain(h.reference_l), (double)time(NULL));
}

/* --validation_prompts on a model, to be freed with the scope; NULL: not done. */
static uint8_t *draw_prompts(const run *r, dpo_model *m, dpo_ctx *c, int sampler_steps)
{
    const settings *s = &r->s;
    dpo_sample_desc d;
    int             n = s->prompt_count * s->images;
    const char    **prompts = (const char **)dpo_scope_alloc(c, (size_t)n * sizeof *prompts);
    uint8_t        *rgb = (uint8_t *)dpo_scope_alloc(c, (size_t)n * (size_t)r->width * (size_t)r->height * 3);
    memset(&d, 0, sizeof d);
    d.width = r->width;
    d.height = r->height;
    for (int i = 0; prompts && i < n; i++) prompts[i] = s->prompts[i / s->images];
    d.n = n;
    d.prompts = prompts;
    d.steps = sampler_steps;
    d.guidance = (float)s->guidance;
    d.seed = (uint64_t)s->seed;
    d.batch = s->batch;
    return rgb && prompts && dpo_sample(m, &d, rgb) ? rgb : NULL;
}

/* OUT/samples/step-000100-0-0.png: prompt and picture.  The same noise at every step. */
static int draw(run *r, int64_t step)
{
    const settings *s = &r->s;
    char            name[64], path[PATHS];
    int             n = s->prompt_count * s->images, size = r->width * r->height * 3, ok;
    uint8_t        *rgb;
    int64_t         scope;
    if (!n || r->team.index) return 1;
    scope = dpo_scope(r->c);
    rgb = draw_prompts(r, r->m, r->c, s->sample_steps);
    ok = rgb && (!dpo_train_rests(r->t) || dpo_model_rest(r->m));
    for (int i = 0; ok && i < n; i++) {
        dpo_image x = { 0, 0, NULL };
        x.width = r->width;
        x.height = r->height;
        x.rgb = rgb + (size_t)i * (size_t)size;
        snprintf(name, sizeof name, "samples/step-%06lld-%d-%d.png", (long long)step, i / s->images, i % s->images);
        path_of(r, path, name);
        ok = dpo_image_save(r->c, path, &x);
    }
    dpo_scope_end(r->c, scope, NULL);
    return ok;
}

/* ---- The run ---------------------------------------------------------------------------------------------------- */

static dpo_train_desc describe(const run *r)
{
    const settings *s = &r->s;
    dpo_train_desc  d;
    memset(&d, 0, sizeof d);
    d.steps = s->steps;
    d.batch = s->batch;
    d.accumulation = s->accumulation;
    d.objective = s->objective;
    d.kind = s->kind;
    d.beta = (float)r->beta;
    d.smoothing = (float)s->smoothing;
    d.lr = (float)(s->lr * (s->scale_lr ? (double)s->batch * s->accumulation * r->team.count : 1));
    d.lr_schedule = s->schedule;
    d.warmup = s->warmup;
    d.lr_cycles = s->schedule == DPO_LR_RESTARTS ? (float)s->lr_cycles : 0;
    d.lr_power = (float)s->lr_power;
    d.optimizer = s->optimizer;
    d.adamw.beta1 = (float)s->beta1;
    d.adamw.beta2 = (float)s->beta2;
    d.adamw.eps = (float)s->eps;
    d.adamw.weight_decay = d.adafactor.weight_decay = (float)s->decay;
    d.adamw.max_norm = d.adafactor.max_norm = (float)s->max_norm;
    d.rank = s->rank;
    d.alpha = (float)s->alpha;
    d.targets = s->targets;
    d.average = s->ema ? (float)s->ema_decay : 0;
    d.empty_prompts = (float)s->empty;
    d.timestep_bias = (float)s->bias;
    d.flip = !s->no_hflip;
    d.width = r->width;
    d.height = r->height;
    d.checkpoint = s->checkpointing;
    d.seed = (uint64_t)s->seed;
    d.min_snr = (float)s->snr_gamma;
    d.safeguard = (float)s->safeguard;
    d.noise_offset = (float)s->noise_offset;
    d.input_perturbation = (float)s->perturbation;
    d.levels = s->levels;
    d.t_limit = s->t_limit;
    d.zero_snr = s->zero_snr;
    d.random_crop = s->random_crop;
    d.apart = s->apart;
    d.bucket_step = s->buckets ? s->bucket_step : 0;
    d.real_sizes = s->real_sizes;
    d.ahead = s->rank == 0 && !s->no_ahead && (s->objective == DPO_DPO || s->objective == DPO_KTO);
    d.rest_encoders = !s->keep_encoders;
    d.desirable_weight = (float)s->desirable;
    d.undesirable_weight = (float)s->undesirable;
    d.positive_ratio = (float)s->positive;
    d.drop_encoders = s->drop;
    d.degrading_limit = (float)s->limit;
    d.team = r->team;
    return d;
}

static int on_step(void *user, const dpo_progress *p);

/* What only the real run has: folders, held-out pairs, a thread beside it. */
static void describe_rest(const run *r, dpo_train_desc *d)
{
    static char cache[PATHS];
    const settings *s = &r->s;
    d->output = s->out;
    d->save_every = s->save_every;
    d->keep = s->keep;
    d->note = r->note;
    d->held_out = (float)s->held_share;
    d->held_pairs = r->held;
    d->beside = 1;
    d->on_step = on_step;
    d->user = (void *)(uintptr_t)r;
    path_of(r, cache, "cache");
    d->cache_folder = s->cache ? s->cache : cache;
    if (!strcmp(d->cache_folder, "none")) d->cache_folder = NULL;
    if (s->resume && !strcmp(s->resume, "latest")) d->resume = 1;
    else d->resume_from = s->resume;
}

static dpo_model *load_model(dpo_ctx *c, const settings *s)
{
    dpo_load_desc d;
    dpo_model    *m;
    memset(&d, 0, sizeof d);
    d.dtype = s->rank > 0 && s->precision == 1 ? DPO_BF16 : DPO_F32;
    d.vae = s->vae;
    d.tokenizer = s->tokenizer;
    d.prediction = s->prediction;
    m = dpo_model_load_with(c, s->model, &d);
    if (m && s->lora) dpo_model_adapter_load(m, s->lora);
    return m;
}

/* The backend of --device, NULL for the CPU's own. */
static dpo_backend *open_device(const run *r)
{
#ifdef DIFFDPO_CUDA
    if (r->s.device == 1) {
        dpo_backend *b = dpo_cuda_open(0, DIFFDPO_VERSION);
        if (r->s.precision == 1) dpo_cuda_set(b, DPO_CUDA_PRODUCTS, DPO_BF16);
        return b;
    }
#endif
    (void)r;
    return NULL;
}

/* realloc that keeps count: bytes held, and the most so far. */
typedef struct { size_t held, most; } tally;

static void *counting_alloc(void *user, void *old, size_t old_size, size_t size)
{
    tally *t = (tally *)user;
    void  *p = NULL;
    if (size && !(p = realloc(old, size))) return NULL;
    if (!size) free(old);
    t->held += size - (old ? old_size : 0);
    if (t->held > t->most) t->most = t->held;
    return p;
}

/* One step of the same run, and one of its pictures, on a backend that computes nothing and counts: bytes of tensors at
   most, and with those of the host in *all; 0 where it failed. */
static size_t estimate(const run *r, const dpo_desc *desc, size_t *all)
{
    tally          host = { 0, 0 };
    dpo_desc       dry = *desc;
    dpo_backend   *model = open_device(r);
    dpo_ctx       *c;
    dpo_model     *m;
    dpo_pairs     *p;
    dpo_image      x;
    dpo_trainer   *t;
    dpo_train_desc d = describe(r);
    size_t         bytes = 0;
    int            ok;
    if (!model) model = dpo_cpu_open(desc);
    dry.backend = dpo_dry_open(model);
    dry.log = NULL;
    dry.alloc = counting_alloc;
    dry.user = &host;
    c = dpo_open(&dry);
    m = load_model(c, &r->s);
    p = dpo_pairs_new(c);
    d.steps = 1;
    d.accumulation = 1;
    d.random_crop = 0;                    /* views are kept in a folder, which this run has not */
    memset(&d.team, 0, sizeof d.team);
    if (dpo_image_new(c, r->width, r->height, &x)) {
        if (d.objective == DPO_KTO) dpo_pairs_add_single(p, "", &x, 1, 1);
        else dpo_pairs_add(p, "", &x, &x, 1);
        dpo_image_free(c, &x);
    }
    t = dpo_train_begin(m, p, &d);
    ok = dpo_train_step(t, NULL);
    if (r->s.prompt_count) ok = ok && draw_prompts(r, m, c, 1);
    if (ok) bytes = dpo_memory_peak(c, 0);
    *all = bytes + host.most;
    dpo_close(c);
    if (model) model->close(model->self);
    return bytes;
}

/* What will happen, before it does. */
static void announce(const run *r, const dpo_train_desc *d, size_t bytes, size_t all)
{
    static const char *const objectives[] = { "Diffusion-DPO", "SFT on the chosen pictures", "Diffusion-KTO", "MaPO" };
    static const char *const kinds[] = { "sigmoid", "hinge", "IPO" };
    static const char *const optimizers[] = { "AdamW", "Adafactor", "AdamW with 8-bit moments" };
    const settings *s = &r->s;
    int64_t         batch = (int64_t)s->batch * s->accumulation * r->team.count;
    printf("pairs      %lld, %lld ties dropped\nobjective  %s", (long long)dpo_pairs_count(r->pairs),
           (long long)dpo_pairs_ties(r->pairs), objectives[s->objective]);
    if (s->objective == DPO_DPO)
        printf(", %s, beta %g as the authors write it (diffusers' script for SD: %g)", kinds[s->kind], r->beta,
               r->beta / 2);
    if (s->objective == DPO_KTO) printf(", beta %g", r->beta);
    if (s->objective == DPO_MAPO) printf(", lambda %g", r->beta);
    printf("\nstep       %lld pairs = %d a batch x %d accumulated x %d processes; %lld steps, %dx%d pixels%s\n",
           (long long)batch, s->batch, s->accumulation, r->team.count, (long long)d->steps, r->width, r->height,
           s->buckets ? ", in buckets" : "");
    printf("optimizer  %s, learning rate %.4g%s\n", optimizers[s->optimizer], (double)d->lr,
           s->scale_lr ? " (scaled by the pairs of a step)" : "");
    if (s->rank) printf("trains     adapters of rank %d", s->rank);
    else printf("trains     all weights");
    if (s->objective != DPO_DPO && s->objective != DPO_KTO) printf("; no reference\n");
    else if (s->rank) printf("; the reference is the model without them\n");
    else printf("; the reference%s\n", d->ahead ? "'s errors are computed before the first step" : " is a second copy");
    printf("cache      %s\n", d->cache_folder ? d->cache_folder : "texts and pictures in memory alone");
    if (bytes) printf("memory     %.1f MB for tensors, at most, %.1f MB in all\n", (double)bytes / 1e6, (double)all / 1e6);
    fflush(stdout);
}

/* Is the checkpoint that will be loaded one of this run? */
static int check_resume(run *r)
{
    char        path[PATHS], name[64] = "", file[PATHS + 64];
    FILE       *f;
    dpo_file   *state;
    const char *note;
    int         ok = 1;
    if (!r->s.resume) return 1;
    if (strcmp(r->s.resume, "latest")) snprintf(path, sizeof path, "%s", r->s.resume);
    else {
        path_of(r, path, "latest.txt");
        if (!(f = fopen(path, "rb"))) return 1;           /* nothing yet: a new run */
        if (!fgets(name, sizeof name, f)) name[0] = 0;
        fclose(f);
        path_of(r, path, name);
    }
    snprintf(file, sizeof file, "%s/state.safetensors", path);
    if (!(state = dpo_safetensors_open(r->c, file))) return 0;
    note = dpo_file_metadata(state, "note");
    if (note) ok = compare_note(r, note, path);
    dpo_file_close(state);
    return ok;
}

/* After every step and before its checkpoint: what a resumed run finds in metrics.jsonl is never behind its weights.
   Nonzero stops. */
static int on_step(void *user, const dpo_progress *p)
{
    run *r = (run *)user;
    int  held = r->held != NULL || r->s.held_share > 0;
    if (r->team.index == 0) {
        progress_line(r, p);
        if (!step_metrics(r, p)) r->failed = 1;
    }
    if (!p->degrading || held) return r->failed;
    if (!r->warned++)
        fail("warning: step %lld: both errors are more than %g%% above the reference's", (long long)p->step,
             100 * r->s.limit);
    if (r->s.stop_degrading) r->stop_at = p->step;
    return r->failed || r->stop_at;
}

/* Held-out pairs and samples, where this step is one for them. */
static int watch(run *r, int64_t step)
{
    int every = r->s.images_every ? r->s.images_every : r->s.held_every, last = step == r->s.steps;
    if ((!step || last || (r->s.held_every && step % r->s.held_every == 0)) && !measure(r, step)) return 0;
    return !(!step || last || (every && step % every == 0)) || draw(r, step);
}

/* A run that was killed between a checkpoint and what is measured there measures it now. */
static int steps(run *r)
{
    int64_t done = dpo_train_done(r->t);
    if ((!done || r->held_at < done) && !watch(r, done)) return 0;
    while (!r->stop_at && !r->failed && dpo_train_step(r->t, NULL))
        if (!r->failed && !watch(r, dpo_train_done(r->t))) return 0;
    if (r->stop_at && !dpo_error(r->c))
        fail("stopped at step %lld: both errors have risen past the limit", (long long)r->stop_at);
    return dpo_error(r->c) == NULL && !r->failed;
}

/* What was learned, for other programs: the averages, where they are kept. */
static int save_result(run *r)
{
    char               path[PATHS];
    dpo_adapter_format f;
    int                ok;
    if (r->team.index) return 1;
    if (r->s.ema && !dpo_train_average(r->t)) return 0;
    memset(&f, 0, sizeof f);
    f.dtype = DPO_F16;
    f.naming = r->s.naming ? DPO_PEFT : DPO_KOHYA;
    path_of(r, path, r->s.rank ? "adapter.safetensors" : "model");
    ok = dpo_train_end(r->t);             /* gradients and moments make room for text encoders and VAE */
    r->t = NULL;
    if (!ok) return 0;
    ok = r->s.rank ? dpo_model_adapter_save(r->m, path, &f) : dpo_model_save(r->m, path, DPO_F16);
    if (ok) printf("%s\n", path);
    return ok;
}

static int train(run *r, const dpo_desc *desc)
{
    dpo_train_desc d;
    dpo_model_info info;
    char           path[PATHS];
    size_t         bytes = 0, all = 0;
    int64_t        each = (int64_t)r->s.batch * r->s.accumulation * r->team.count;
    if (!(r->m = load_model(r->c, &r->s)) || !(r->pairs = dpo_pairs_load(r->c, r->s.data))) return 0;
    if (r->s.held_data && !(r->held = dpo_pairs_load(r->c, r->s.held_data))) return 0;
    info = dpo_model_describe(r->m);
    if (!r->width) r->width = r->height = info.size;
    if (info.time_ids == 5 && !r->s.t_limit) r->s.t_limit = 200;
    if (r->beta == 0) r->beta = r->s.objective == DPO_KTO ? 1000 : r->s.objective == DPO_MAPO ? 0.1 : 5000;
    if (r->s.epochs) r->s.steps = (int)((dpo_pairs_count(r->pairs) * r->s.epochs + each - 1) / each);
    if (!write_note(r) || (!r->s.estimate && !check_resume(r))) return 0;
    d = describe(r);
    if (!r->s.estimate) describe_rest(r, &d);
    if (!r->team.index && !r->s.no_estimate) bytes = estimate(r, desc, &all);
    if (!r->team.index) announce(r, &d, bytes, all);
    if (r->s.estimate) return 1;
    if (!(r->t = dpo_train_begin(r->m, r->pairs, &d))) return 0;
    r->trained = dpo_train_count(r->t);
    path_of(r, path, "samples");          /* now: a run that is refused leaves nothing */
    if (!dpo_make_folder(r->c, r->s.out) || (r->s.prompt_count && !dpo_make_folder(r->c, path))) return 0;
    if (dpo_train_done(r->t)) printf("resumed after step %lld\n", (long long)dpo_train_done(r->t));
    if (!r->team.index && (!open_events(r) || !open_metrics(r, dpo_train_done(r->t)))) return 0;
    return steps(r) && save_result(r) && (r->team.index || write_page(r, dpo_seconds() - r->start));
}

/* Every row and picture, and how many of each kind. */
static int survey(run *r)
{
    dpo_pairs       *p = dpo_pairs_load_good(r->c, r->s.data);
    dpo_pairs_counts n;
    if (!p || !dpo_pairs_survey(p, 1, &n)) return 0;
    printf("%lld rows, %lld bad; %lld pairs, %lld ties dropped, %lld single pictures liked, %lld not; %lld pictures, "
           "%lld unreadable; %lld pairs of different sizes\n", (long long)n.rows, (long long)n.bad_rows,
           (long long)n.pairs, (long long)n.ties, (long long)n.liked, (long long)n.disliked, (long long)n.pictures,
           (long long)n.unreadable, (long long)n.different);
    return !n.bad_rows && !n.unreadable ? 1 : fail("%s: see above", r->s.data);
}

/* ---- Several processes ------------------------------------------------------------------------------------------ */

#ifdef DIFFDPO_MPI
/* Sums that were begun and not waited for. */
typedef struct { MPI_Request *open; int count, room; } errands;

/* Begin a sum, 2^24 numbers at a time: MPI counts in int, and the sum's order must not hang on how it is cut.  MPI works
   on what was begun only while it is called: hence the test, which lets it go on with the earlier ones. */
static int reduce(void *user, void *data, int64_t count, int dtype, int op)
{
    errands *e = (errands *)user;
    int      done;
    if (dtype != DPO_F32) return 0;
    for (int64_t at = 0; at < count; at += 1 << 24) {
        int n = count - at < 1 << 24 ? (int)(count - at) : 1 << 24;
        if (e->count == e->room) {
            MPI_Request *more = (MPI_Request *)realloc(e->open, (size_t)(e->room + 64) * sizeof *more);
            if (!more) return 0;
            e->open = more;
            e->room += 64;
        }
        if (MPI_Iallreduce(MPI_IN_PLACE, (float *)data + at, n, MPI_FLOAT, op == DPO_REDUCE_MAX ? MPI_MAX : MPI_SUM,
                           MPI_COMM_WORLD, &e->open[e->count]) != MPI_SUCCESS) return 0;
        e->count++;
    }
    return MPI_Testall(e->count, e->open, &done, MPI_STATUSES_IGNORE) == MPI_SUCCESS;
}

static int settle(void *user)
{
    errands *e = (errands *)user;
    int      ok = MPI_Waitall(e->count, e->open, MPI_STATUSES_IGNORE) == MPI_SUCCESS;
    e->count = 0;
    return ok;
}

static void join_team(run *r)
{
    static errands e;
    MPI_Init(NULL, NULL);
    MPI_Comm_size(MPI_COMM_WORLD, &r->team.count);
    MPI_Comm_rank(MPI_COMM_WORLD, &r->team.index);
    r->team.reduce = reduce;
    r->team.wait = settle;
    r->team.user = &e;
}

/* One that failed takes the others along: they would wait for its numbers for ever. */
static void leave_team(int ok)
{
    if (ok) MPI_Finalize();
    else MPI_Abort(MPI_COMM_WORLD, 1);
}
#else
static void join_team(run *r) { r->team.count = 1; }
static void leave_team(int ok) { (void)ok; }
#endif

int main(int argc, char **argv)
{
    static run r;
    dpo_desc   desc;
    int        ok;
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 20);   /* what is given back leaves the process, too */
#endif
    join_team(&r);
    r.s = defaults();
    r.best = -1;
    r.held_at = -1;
    r.start = dpo_seconds();
    if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) { help(&r.s); leave_team(1); return 0; }
    ok = read_options(&r.s, argc, argv, "preset") && (!r.s.preset || apply_preset(&r.s));
    ok = ok && read_options(&r.s, argc, argv, NULL) && check_settings(&r);
    if (!ok) { leave_team(0); return 1; }
    for (int i = 0; i < r.s.ignored_count && !r.team.index; i++)
        printf("--%s has no meaning here\n", r.s.ignored[i]);
    if (r.s.precision == 2 && !r.team.index)
        puts("fp16       is taken as bf16: as small and as fast, and its range needs no loss scaling");
    if (r.s.precision == 2) r.s.precision = 1;
    memset(&desc, 0, sizeof desc);
    desc.threads = r.s.threads;
    desc.isa = r.s.isa;
    desc.products = r.s.precision == 1 ? DPO_BF16 : DPO_F32;
    desc.log = r.team.index ? NULL : r.s.check_data ? on_log_all : on_log;
    desc.backend = open_device(&r);
    r.c = dpo_open(&desc);
    ok = r.s.check_data ? survey(&r) : train(&r, &desc);
    if (dpo_error(r.c)) { ok = 0; fail("%s", dpo_error(r.c)); }
    if (r.metrics) fclose(r.metrics);
    if (r.events) fclose(r.events);
    dpo_close(r.c);
    leave_team(ok);
    return !ok;
}
