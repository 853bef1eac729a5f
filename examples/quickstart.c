/* quickstart.c - teach a text-to-image model a taste by Diffusion-DPO, and measure what it learned.

   need    apt-get install gcc libc6-dev libstb-dev
   build   cc -O2 examples/quickstart.c -o build/quickstart -lm -lpthread
   run     build/quickstart [--judge warm|soft|compact] [--seed N] [--steps N]
                            [--model DIR] [--out DIR] [--threads N] [--isa plain|avx2|avx512]
                            [--device cpu|cuda|check]
   result  quickstart.html           pictures before and after, curves, win rate, settings: one file
           quickstart-out/           what it was computed from; the numbers are prompt and picture:
             base_000_0.png ...      before                aligned_000_0.png ...  after, from the same noise
             pair_000_0.png ...      what was judged       pairs.jsonl            how, as dpo_pairs_load reads it
             prompts.jsonl           which prompts were for what; those for "eval" stand in the order of their numbers
             adapter.safetensors     what was learned

   1  The model draws two pictures for each of some hundred prompts, and a judge picks one: that makes a pair.
   2  Low-rank adapters are trained on the pairs (arXiv 2311.12908); the model's own weights stay as they are.
   3  For 128 prompts that no pair used, the model draws without and with its adapters, and the judge compares.

   To teach your own taste, write a judge; to use your own pairs, write a pairs.jsonl and start at train(). */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"

enum {
    EACH     = 2,                       /* pictures a prompt: one to win, one to lose                           */
    EVAL     = 128,                     /* prompts to compare on: a win rate of 0.9 is then known to about 0.05 */
    CAPTIONS = 8192,                    /* most that captions.jsonl may have                                    */
    SHOWN    = 24                       /* prompts that the page shows at once; the others fold away            */
};

/* The whole experiment: change a number here and run again. */
typedef struct {
    const char *model, *out;            /* folders */
    uint64_t    seed;                   /* of everything: choice of prompts, noise, adapters, order of the pairs */
    int         threads, isa, cuda;     /* 0: all cores, the best instructions, no GPU */
    int         pair_prompts;           /* prompts to make pairs of */
    int         sample_steps, batch;    /* of drawing; batch: pictures at a time */
    float       guidance;
    int         steps, pairs_a_step;    /* of training */
    int         rank;
    const char *targets;                /* layers that get adapters; NULL: the attention's */
    float       beta, lr;
} settings;

static settings defaults(void)
{
    settings s;
    memset(&s, 0, sizeof s);
    s.model        = "examples/emoji";
    s.out          = ".";
    s.seed         = 1;
    s.pair_prompts = 400;               /* many prompts, each pair seen three or four times: 128 taught pixels, not taste */
    s.sample_steps = 10;                /* two thirds of the time goes into drawing; fewer blur the pictures */
    s.batch        = 16;
    s.guidance     = 2;                 /* at 1 the prompt is followed loosely, above 3 colours saturate */
    s.steps        = 90;
    s.pairs_a_step = 16;                /* 90 steps of 16 see every pair three or four times */
    s.rank         = 16;
    s.targets      = "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,time_emb_proj";
    s.beta         = 2000;              /* what leaving the model that was costs: less learns faster, and breaks more */
    s.lr           = 5e-4f;
    return s;
}

typedef struct judge judge;

/* What a run knows so far.  All memory in it belongs to the context and goes with it. */
typedef struct {
    settings     s;
    const judge *j;
    dpo_ctx     *c;
    dpo_model   *m;
    int          size;                  /* pixels a side */
    double       start;                 /* dpo_seconds() */
    char         folder[1024];          /* quickstart-out */
    const char **prompt;                /* in random order: EVAL to compare on, then pair_prompts to make pairs of */
    int          pairs;                 /* that the judge could decide */
    uint8_t     *before, *after;        /* [EVAL*EACH, size, size, 3] */
    double       score_before[EVAL * EACH], score_after[EVAL * EACH];
    float       *loss, *accuracy;       /* [steps] */
    double       seconds[3];            /* what pairs, training and comparing took */
} run;

/* ---- Words: what goes wrong, and how it goes -------------------------------------------------------------------- */

/* One line for what went wrong.  Returns 0, so that a function can say: return fail(...).
   What the library could not do needs no such call: the context keeps it, and main says it, once. */
static int fail(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("quickstart: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return 0;
}

/* One line of progress, with the time since the start. */
static void say(const run *r, const char *format, ...)
{
    va_list args;
    printf("%5.1f s  ", dpo_seconds() - r->start);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
}

/* ---- Judges: a number for a picture, higher wins ---------------------------------------------------------------- */

struct judge {
    const char *name, *wants;
    double    (*score)(dpo_ctx *c, const dpo_image *x);
};

/* Mean of R - B.  Whole numbers are summed, so that equal pictures tie exactly. */
static double warm(dpo_ctx *c, const dpo_image *x)
{
    int64_t sum = 0, n = (int64_t)x->width * x->height;
    (void)c;
    for (int64_t i = 0; i < n; i++) sum += x->rgb[3*i] - x->rgb[3*i + 2];
    return (double)sum / (double)n;
}

/* Minus the mean of |difference| between each pixel and its neighbours on the right and below, over the channels. */
static double soft(dpo_ctx *c, const dpo_image *x)
{
    int64_t sum = 0, n = 0, row = 3 * (int64_t)x->width;
    (void)c;
    for (int64_t y = 0; y < x->height; y++)
        for (int64_t i = 0; i < row; i++) {
            const uint8_t *p = x->rgb + y*row + i;
            if (i + 3 < row)       { sum += abs(p[0] - p[3]);   n++; }
            if (y + 1 < x->height) { sum += abs(p[0] - p[row]); n++; }
        }
    return n ? -(double)sum / (double)n : 0;
}

/* Minus the bytes of the picture as a PNG: the simpler one wins. */
static double compact(dpo_ctx *c, const dpo_image *x)
{
    size_t   bytes = 0;
    uint8_t *png = dpo_png_encode(c, x, &bytes);
    dpo_png_free(c, png, bytes);
    return -(double)bytes;
}

static const judge judges[] = {
    { "warm",    "more red than blue",              warm    },
    { "soft",    "small steps from pixel to pixel", soft    },
    { "compact", "few bytes as a PNG",              compact },
};
enum { JUDGES = sizeof judges / sizeof judges[0] };

static const judge *find_judge(const char *name)
{
    for (int i = 0; i < JUDGES; i++) if (!strcmp(name, judges[i].name)) return &judges[i];
    fail("there is no judge \"%.40s\"; choose warm, soft or compact", name);
    return NULL;
}

/* Picture i of rgb [n, size, size, 3], in place. */
static dpo_image picture(const run *r, uint8_t *rgb, int i)
{
    dpo_image x = { r->size, r->size, rgb + (size_t)i * 3 * (size_t)r->size * (size_t)r->size };
    return x;
}

static void score_all(const run *r, uint8_t *rgb, int n, double *score)
{
    for (int i = 0; i < n; i++) {
        dpo_image x = picture(r, rgb, i);
        score[i] = r->j->score(r->c, &x);
    }
}

/* ---- Files: they appear under their names when they are complete ------------------------------------------------ */

typedef struct { char name[1200], aside[1208]; FILE *f; } output;

static int output_open(output *o, const char *folder, const char *file)
{
    snprintf(o->name, sizeof o->name, "%s/%s", folder, file);
    snprintf(o->aside, sizeof o->aside, "%s.tmp", o->name);
    o->f = fopen(o->aside, "wb");
    return o->f ? 1 : fail("cannot write %s: %s", o->name, strerror(errno));
}

/* A full disk may show only when the last bytes leave the buffer: fclose must be asked as well. */
static int output_close(output *o)
{
    int broken = ferror(o->f), error = errno;
    if (fclose(o->f) && !broken) { broken = 1; error = errno; }
    if (!broken && rename(o->aside, o->name)) { broken = 1; error = errno; }
    if (!broken) return 1;
    remove(o->aside);
    return fail("cannot write %s: %s", o->name, strerror(error));
}

/* A JSON string: UTF-8 stays as it is. */
static void put_json(FILE *f, const char *text)
{
    fputc('"', f);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fputc('\\', f);
        if ((unsigned char)*text < 32) fprintf(f, "\\u%04x", *text);
        else fputc(*text, f);
    }
    fputc('"', f);
}

/* Picture i of prompt k, as kind_kkk_i.png.  dpo_image_save would do it, but waits until the disk has it: too long for
   hundreds of small files. */
static int save_picture(const run *r, const char *kind, int k, int i, uint8_t *rgb)
{
    char      name[64];
    output    o;
    dpo_image x = picture(r, rgb, EACH*k + i);
    size_t    bytes = 0;
    uint8_t  *png = dpo_png_encode(r->c, &x, &bytes);
    int       ok = 0;
    snprintf(name, sizeof name, "%s_%03d_%d.png", kind, k, i);
    if (png && output_open(&o, r->folder, name)) {
        fwrite(png, 1, bytes, o.f);
        ok = output_close(&o);
    }
    dpo_png_free(r->c, png, bytes);
    return ok;
}

/* ---- Prompts: the captions that the model knows, in an order that the seed decides ------------------------------ */

typedef struct { uint64_t order; const char *text; } caption;

/* FNV-1a of the text, then the mixer of splitmix64, so that every bit of seed and text moves the order. */
static uint64_t hash(const char *text, uint64_t seed)
{
    uint64_t h = 14695981039346656037u;
    while (*text) h = (h ^ (unsigned char)*text++) * 1099511628211u;
    h += seed * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
    h = (h ^ h >> 27) * 0x94d049bb133111ebu;
    return h ^ h >> 31;
}

static int by_order(const void *a, const void *b)
{
    const caption *x = (const caption *)a, *y = (const caption *)b;
    return x->order < y->order ? -1 : x->order > y->order ? 1 : strcmp(x->text, y->text);
}

/* One line of captions.jsonl: {"caption": ...}. */
static int read_caption(run *r, const char *path, const char *line, caption *out)
{
    size_t      n = 0;
    dpo_json   *row = dpo_json_parse(r->c, line, strlen(line), path);
    const char *text = dpo_json_text(dpo_json_get(row, "caption"), &n);
    char       *copy = text ? (char *)dpo_scope_alloc(r->c, n + 1) : NULL;
    if (row && !text) fail("%s: a line without a caption", path);
    if (copy) {
        memcpy(copy, text, n);
        out->text = copy;
        out->order = hash(copy, r->s.seed);
    }
    dpo_json_free(row);
    return copy != NULL;
}

/* How many captions the list got; 0 on failure. */
static int read_captions(run *r, caption *list)
{
    char  path[1200], line[4096];
    int   n = 0, ok = 1;
    FILE *f;
    snprintf(path, sizeof path, "%s/captions.jsonl", r->s.model);
    if (!(f = fopen(path, "rb"))) return fail("cannot read %s: %s", path, strerror(errno));
    while (ok && n < CAPTIONS && fgets(line, sizeof line, f)) ok = read_caption(r, path, line, &list[n++]);
    if (ok && fgetc(f) != EOF) ok = fail("%s: more than %d lines", path, (int)CAPTIONS);
    fclose(f);
    return ok ? n : 0;
}

/* Sorted by hash, equal captions are neighbours: all but one go, for no prompt may stand on both sides. */
static int choose_prompts(run *r)
{
    caption *list = (caption *)dpo_scope_alloc(r->c, CAPTIONS * sizeof *list);
    int      n = list ? read_captions(r, list) : 0, wanted = EVAL + r->s.pair_prompts, found = 0;
    if (n < 1) return 0;
    r->prompt = (const char **)dpo_scope_alloc(r->c, (size_t)n * sizeof *r->prompt);
    if (!r->prompt) return 0;
    qsort(list, (size_t)n, sizeof *list, by_order);
    for (int i = 0; i < n; i++)
        if (i == 0 || strcmp(list[i].text, list[i - 1].text)) r->prompt[found++] = list[i].text;
    return found >= wanted ? 1 : fail("%s: %d captions, %d are needed", r->s.model, found, wanted);
}

static int save_prompts(const run *r)
{
    output o;
    if (!output_open(&o, r->folder, "prompts.jsonl")) return 0;
    for (int k = 0; k < EVAL + r->s.pair_prompts; k++) {
        fputs("{\"prompt\": ", o.f);
        put_json(o.f, r->prompt[k]);
        fprintf(o.f, ", \"split\": \"%s\"}\n", k < EVAL ? "eval" : "pairs");
    }
    return output_close(&o);
}

/* ---- Step 1: pairs ---------------------------------------------------------------------------------------------- */

/* Called after each step of a batch; only whole batches are worth a line. */
static int while_drawing(void *user, const dpo_sample_progress *p)
{
    int done = p->first + p->count;
    if (p->step == p->steps && (done % 64 == 0 || done == p->n))
        say((const run *)user, "  %d of %d pictures", done, p->n);
    return 0;
}

/* EACH pictures for each of n prompts, [n*EACH, size, size, 3], or NULL.  A picture's noise comes from the seed and its
   key alone, so the same prompts drawn twice, without and with adapters, start from the same noise. */
static uint8_t *draw(run *r, int first, int n, int adapters_off)
{
    int             total = n * EACH;
    const char    **prompts = (const char **)dpo_scope_alloc(r->c, (size_t)total * sizeof *prompts);
    int32_t        *keys = (int32_t *)dpo_scope_alloc(r->c, (size_t)total * sizeof *keys);
    uint8_t        *rgb = (uint8_t *)dpo_scope_alloc(r->c, (size_t)total * 3 * (size_t)r->size * (size_t)r->size);
    dpo_sample_desc d;
    if (!rgb || !keys || !prompts) return NULL;
    for (int i = 0; i < total; i++) {
        prompts[i] = r->prompt[first + i/EACH];
        keys[i] = EACH*first + i;
    }
    memset(&d, 0, sizeof d);            /* zeros are the model's own size */
    d.sampler = DPO_DPMPP_2M;           /* ten steps of DDIM leave noise on the white */
    d.n = total;
    d.prompts = prompts;
    d.keys = keys;
    d.seed = r->s.seed;
    d.steps = r->s.sample_steps;
    d.batch = r->s.batch;
    d.guidance = r->s.guidance;
    d.adapters_off = adapters_off;
    d.on_step = while_drawing;
    d.user = r;
    return dpo_sample(r->m, &d, rgb) ? rgb : NULL;
}

/* One line of pairs.jsonl: picture `chosen` of prompt k against the other. */
static void put_pair(FILE *f, const char *prompt, int k, int chosen)
{
    fputs("{\"prompt\": ", f);
    put_json(f, prompt);
    fprintf(f, ", \"chosen\": \"pair_%03d_%d.png\", \"rejected\": \"pair_%03d_%d.png\"}\n", k, chosen, k, 1 - chosen);
}

/* Pictures that the judge finds equally good teach nothing and make no pair. */
static int judge_pairs(run *r, uint8_t *rgb, FILE *manifest)
{
    int     n = r->s.pair_prompts;
    double *score = (double *)dpo_scope_alloc(r->c, (size_t)n * EACH * sizeof *score);
    if (!score) return 0;
    score_all(r, rgb, n * EACH, score);
    for (int k = 0; k < n; k++) {
        double a = score[EACH*k], b = score[EACH*k + 1];
        if (a == b) continue;
        if (!save_picture(r, "pair", k, 0, rgb) || !save_picture(r, "pair", k, 1, rgb)) return 0;
        put_pair(manifest, r->prompt[EVAL + k], k, b > a);
        r->pairs++;
    }
    return 1;
}

static int make_pairs(run *r)
{
    output   manifest;
    uint8_t *rgb;
    int      ok;
    say(r, "drawing two pictures for each of %d prompts", r->s.pair_prompts);
    if (!(rgb = draw(r, EVAL, r->s.pair_prompts, 1))) return 0;
    if (!output_open(&manifest, r->folder, "pairs.jsonl")) return 0;
    ok = judge_pairs(r, rgb, manifest.f);
    if (!output_close(&manifest) || !ok) return 0;
    say(r, "judge %s (%s) picked one of the two %d times", r->j->name, r->j->wants, r->pairs);
    return r->pairs ? 1 : fail("judge %s sees no difference between any two pictures", r->j->name);
}

/* ---- Step 2: training ------------------------------------------------------------------------------------------- */

/* Adapters start as doing nothing, so they may be there from the beginning; after zero steps they still do nothing. */
static int add_adapters(run *r)
{
    dpo_adapter_desc d;
    memset(&d, 0, sizeof d);
    d.rank = r->s.rank;
    d.alpha = (float)r->s.rank;         /* their strength is alpha/rank: 1 */
    d.targets = r->s.targets;
    d.seed = r->s.seed;
    return dpo_adapter_new(dpo_model_unet(r->m), &d);
}

/* In the first step every pair is still a tie, and counts half, as a tie of the judge's does. */
static int while_training(void *user, const dpo_progress *p)
{
    run   *r = (run *)user;
    double pairs_left = (double)(p->steps - p->step) * r->s.pairs_a_step;
    r->loss[p->step - 1] = p->loss;
    r->accuracy[p->step - 1] = p->step == 1 ? 0.5f : p->implicit_acc;
    if (p->step % 5 == 0 || p->step == p->steps)
        say(r, "  step %d of %d  loss %.3f  implicit accuracy %.2f  %.1f pairs/s  %.0f s left", (int)p->step,
            (int)p->steps, p->loss, p->implicit_acc, p->pairs_per_second, pairs_left / p->pairs_per_second);
    return 0;
}

/* The library's recipe for small models, and what the settings change in it. */
static dpo_train_desc recipe(run *r)
{
    dpo_train_desc t = dpo_recipe_small();
    t.steps   = r->s.steps;
    t.batch   = r->s.pairs_a_step;
    t.beta    = r->s.beta;
    t.lr      = r->s.lr;
    t.rank    = 0;                      /* no new adapters: those that the model has */
    t.seed    = r->s.seed;
    t.on_step = while_training;
    t.user    = r;
    return t;
}

/* dpo_train would do begin, step and end in one call; this is the loop of a host that keeps its own. */
static int train(run *r)
{
    char           path[1200];
    dpo_train_desc t = recipe(r);
    dpo_pairs     *pairs;
    dpo_trainer   *trainer;
    snprintf(path, sizeof path, "%s/pairs.jsonl", r->folder);
    pairs = dpo_pairs_load(r->c, path);
    if (!pairs || r->s.steps == 0) return pairs != NULL;
    say(r, "training adapters of rank %d: %d steps of %d pairs", r->s.rank, r->s.steps, r->s.pairs_a_step);
    trainer = dpo_train_begin(r->m, pairs, &t);
    while (dpo_train_step(trainer, NULL)) continue;
    return dpo_train_end(trainer);
}

static int save_adapters(run *r)
{
    char path[1200];
    snprintf(path, sizeof path, "%s/adapter.safetensors", r->folder);
    return dpo_adapter_save(dpo_model_unet(r->m), path, DPO_F32);
}

/* ---- Step 3: before against after ------------------------------------------------------------------------------- */

static int draw_both(run *r)
{
    say(r, "drawing %d other prompts, two pictures each, without and with the adapters", (int)EVAL);
    if (!(r->before = draw(r, 0, EVAL, 1)) || !(r->after = draw(r, 0, EVAL, 0))) return 0;
    score_all(r, r->before, EVAL*EACH, r->score_before);
    score_all(r, r->after,  EVAL*EACH, r->score_after);
    for (int k = 0; k < EVAL; k++)
        for (int i = 0; i < EACH; i++)
            if (!save_picture(r, "base", k, i, r->before) || !save_picture(r, "aligned", k, i, r->after)) return 0;
    return 1;
}

typedef struct {
    double rate, low, high;             /* win rate and its 95 % interval */
    double before, after, effect;       /* the judge's mean, and how far it moved in standard deviations of `before` */
} verdict;

static double mean(const double *x, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum / n;
}

static double variance(const double *x, int n)
{
    double sum = 0, m = mean(x, n);
    for (int i = 0; i < n; i++) sum += (x[i] - m) * (x[i] - m);
    return sum / (n - 1);
}

/* Wilson's interval for a share p of n tosses; unlike p +- 2 s it is never empty and never leaves 0..1. */
static void wilson(double p, double n, double *low, double *high)
{
    double z = 1.959964, half = z * sqrt(p*(1 - p)/n + z*z/(4*n*n)), all = 1 + z*z/n;
    *low  = fmax(0, (p + z*z/(2*n) - half) / all);
    *high = fmin(1, (p + z*z/(2*n) + half) / all);
}

/* Of a prompt: the share of its pictures that the judge likes better after; a tie counts half. */
static double share_won(const run *r, int k)
{
    double won = 0;
    for (int i = EACH*k; i < EACH*(k + 1); i++) {
        if (r->score_after[i] >  r->score_before[i]) won += 1;
        if (r->score_after[i] == r->score_before[i]) won += 0.5;
    }
    return won / EACH;
}

/* The interval is over prompts, for pictures of one prompt are alike: EVAL shares of variance v, their mean p, say as
   much as EVAL p(1-p)/v tosses of a coin, but not more than there are pictures. */
static verdict compare(const run *r)
{
    verdict v;
    double  share[EVAL], tosses = EVAL, spread;
    for (int k = 0; k < EVAL; k++) share[k] = share_won(r, k);
    v.rate = mean(share, EVAL);
    spread = variance(share, EVAL);
    if (spread > 0) tosses = fmin(EVAL*EACH, fmax(EVAL, EVAL * v.rate * (1 - v.rate) / spread));
    wilson(v.rate, tosses, &v.low, &v.high);
    v.before = mean(r->score_before, EVAL*EACH);
    v.after  = mean(r->score_after, EVAL*EACH);
    spread   = sqrt(variance(r->score_before, EVAL*EACH));
    v.effect = spread > 0 ? (v.after - v.before) / spread : 0;
    return v;
}

/* ---- The page --------------------------------------------------------------------------------------------------- */

#include "quickstart_page.h"

static int save_page(const run *r, const verdict *v)
{
    output o;
    if (!output_open(&o, r->s.out, "quickstart.html")) return 0;
    put_page(r, o.f, v);
    return output_close(&o);
}

/* ---- The program ------------------------------------------------------------------------------------------------ */

static int whole_number(const char *name, const char *text, int64_t high, int64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoll(text, &end, 10);
    if (*text && !*end && !errno && *out >= 0 && *out <= high) return 1;
    return fail("%s wants a whole number from 0 to %lld, not \"%.40s\"", name, (long long)high, text);
}

static int find_isa(const char *name, int *isa)
{
    static const char *const names[] = { "plain", "avx2", "avx512" };
    static const int         isas[]  = { DPO_ISA_PLAIN, DPO_ISA_AVX2, DPO_ISA_AVX512 };
    for (int i = 0; i < 3; i++) if (!strcmp(name, names[i])) { *isa = isas[i]; return 1; }
    return fail("--isa is plain, avx2 or avx512, not \"%.40s\"", name);
}

/* cuda: in builds with -DDIFFDPO_CUDA and diffdpo_cuda.cu, see there; 2: each call is compared with the CPU's. */
static int find_device(const char *name, int *cuda)
{
    *cuda = !strcmp(name, "check") ? 2 : !strcmp(name, "cuda");
#ifndef DIFFDPO_CUDA
    if (*cuda) return fail("this build has no CUDA; diffdpo_cuda.cu says how to make one");
#endif
    return *cuda || !strcmp(name, "cpu") ? 1 : fail("--device is cpu, cuda or check, not \"%.40s\"", name);
}

static int set_option(run *r, const char *name, const char *value)
{
    settings *s = &r->s;
    int64_t   n = 0;
    int       ok;
    if (!strcmp(name, "--judge")) return (r->j = find_judge(value)) != NULL;
    if (!strcmp(name, "--device")) return find_device(value, &s->cuda);
    if (!strcmp(name, "--isa"))   return find_isa(value, &s->isa);
    if (!strcmp(name, "--model")) return strlen(s->model = value) < 1000 ? 1 : fail("--model: this path is too long");
    if (!strcmp(name, "--out"))   return strlen(s->out = value) < 1000 ? 1 : fail("--out: this path is too long");
    if (!strcmp(name, "--seed"))    { ok = whole_number(name, value, INT64_MAX, &n); s->seed = (uint64_t)n; return ok; }
    if (!strcmp(name, "--steps"))   { ok = whole_number(name, value, 100000, &n);    s->steps = (int)n;     return ok; }
    if (!strcmp(name, "--threads")) { ok = whole_number(name, value, 1024, &n);      s->threads = (int)n;   return ok; }
    return fail("unknown option %.40s; there are --judge --seed --steps --model --out --threads --isa --device", name);
}

static int read_options(run *r, int argc, char **argv)
{
    r->s = defaults();
    r->j = &judges[0];
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc) return fail("%.40s: a value is missing", argv[i]);
        if (!set_option(r, argv[i], argv[i + 1])) return 0;
    }
    return 1;
}

/* Whatever may be missing or closed to us is found here, before the long work starts. */
static int prepare(run *r)
{
    dpo_desc d;
    size_t   bytes = ((size_t)r->s.steps + 1) * sizeof(float);
    memset(&d, 0, sizeof d);
    d.threads = r->s.threads;
    d.isa = r->s.isa;
#ifdef DIFFDPO_CUDA
    if (r->s.cuda) d.backend = dpo_cuda_open(0, DIFFDPO_VERSION);
    if (r->s.cuda > 1) d.backend = dpo_check_open(d.backend, dpo_cpu_open(NULL), 1e-4f);
#endif
    if (!(r->c = dpo_open(&d))) return fail("out of memory");
    r->m = dpo_model_load(r->c, r->s.model, DPO_F32);
    if (!r->m || !add_adapters(r) || !choose_prompts(r)) return 0;
    r->size = dpo_model_describe(r->m).size;
    r->loss = (float *)dpo_scope_alloc(r->c, bytes);
    r->accuracy = (float *)dpo_scope_alloc(r->c, bytes);
    snprintf(r->folder, sizeof r->folder, "%s/quickstart-out", r->s.out);
    return r->loss && r->accuracy && dpo_make_folder(r->c, r->folder) && save_prompts(r);
}

/* One phase, and how long it took. */
static int timed(run *r, int phase, int (*work)(run *r))
{
    double start = dpo_seconds();
    int    ok = work(r);
    r->seconds[phase] = dpo_seconds() - start;
    return ok;
}

static int quickstart(run *r)
{
    verdict v;
    if (!prepare(r)) return 0;
    if (!timed(r, 0, make_pairs) || !timed(r, 1, train) || !save_adapters(r) || !timed(r, 2, draw_both)) return 0;
    v = compare(r);
    if (!save_page(r, &v)) return 0;
    say(r, "the judge's mean moved from %.2f to %.2f: %+.2f standard deviations over the base's pictures", v.before,
        v.after, v.effect);
    say(r, "see %s/quickstart.html; what it was computed from is in %s", r->s.out, r->folder);
    printf("win rate %.2f (95%% CI %.2f-%.2f) over %d held-out prompts, judge %s, %.0f s\n", v.rate, v.low, v.high,
           (int)EVAL, r->j->name, dpo_seconds() - r->start);
    return fflush(stdout) == 0 ? 1 : fail("cannot write the output: %s", strerror(errno));
}

int main(int argc, char **argv)
{
    static run r;                       /* zeros; too large for some stacks */
    int        ok;
    r.start = dpo_seconds();
    ok = read_options(&r, argc, argv) && quickstart(&r);
    if (r.c && dpo_error(r.c)) ok = fail("%s", dpo_error(r.c));
    dpo_close(r.c);                     /* frees the model, the pairs and all memory of the run */
    return !ok;
}
