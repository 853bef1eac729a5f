/* emoji_quality.c - how good is the emoji model?  Its pictures against the real ones, and its denoising error.

   build   cc -O2 examples/emoji_quality.c -o build/emoji_quality -lm -lpthread
   data    build/emoji_data emoji-data --size 32                    (see emoji_data.c)
   run     build/emoji_quality examples/emoji emoji-data [--adapter FILE] [--steps 10] [--guidance 2] [--seed 1]
                               [--grid FILE.png]
   prints  top1, top10   for 200 captions that it was trained on: how often the training picture nearest to the one
                         it draws, and one of the ten nearest, has that caption; L2 after averaging to 16x16
           error         mean squared error of its predictions on real pictures, over fixed draws of (t, noise): those
                         that it was trained on, and those whose captions were left out
           With --adapter the pictures are drawn with it, and both errors are printed without and with it. */
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
    PICTURES = 4096,                    /* most that the data may have                                     */
    ASKED    = 200,                     /* captions to draw                                                */
    DRAWS    = 16,                      /* of (t, noise) a picture for the error; t is spread evenly       */
    BATCH    = 16,
    SMALL    = 16,                      /* pictures are compared at this size: shapes count, pixels do not */
    TINY     = SMALL * SMALL * 3
};

typedef struct {
    const char *caption;
    uint64_t    order;                  /* a hash of the caption: the choice depends on nothing else */
    int         held;
    uint8_t    *rgb;                    /* [size, size, 3] */
} item;

typedef struct {
    const char *model, *data;           /* folders */
    const char *adapter, *grid;         /* files, or NULL */
    int         steps;                  /* of drawing */
    float       guidance;
    uint64_t    seed;                   /* of drawing; the error has draws of its own */
    dpo_ctx    *c;
    dpo_model  *m;
    int         size, n, trained;       /* pixels a side; pictures in all; of these, trained on */
    item        list[PICTURES];         /* those trained on first, then by order */
} quality;

/* One line for what went wrong.  Returns 0. */
static int fail(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("emoji_quality: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return 0;
}

/* ---- The data --------------------------------------------------------------------------------------------------- */

/* FNV-1a, 64 bits, and the mixer of splitmix64, so that sorting by it shuffles. */
static uint64_t hash(const char *text)
{
    uint64_t h = 14695981039346656037u;
    while (*text) h = (h ^ (unsigned char)*text++) * 1099511628211u;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
    h = (h ^ h >> 27) * 0x94d049bb133111ebu;
    return h ^ h >> 31;
}

static int by_order(const void *a, const void *b)
{
    const item *x = (const item *)a, *y = (const item *)b;
    if (x->held != y->held) return x->held - y->held;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* Memory that lives as long as the context. */
static char *copy_text(dpo_ctx *c, const char *text)
{
    char *copy = (char *)dpo_scope_alloc(c, strlen(text) + 1);
    if (copy) memcpy(copy, text, strlen(text));
    return copy;
}

/* In the model's size; emoji_data has made it so, as a rule. */
static int load_picture(quality *q, const char *name, item *x)
{
    char      path[1200];
    dpo_image file, fitted;
    size_t    bytes = 3 * (size_t)q->size * (size_t)q->size;
    snprintf(path, sizeof path, "%s/%s", q->data, name);
    if (!dpo_image_load(q->c, path, &file) || !dpo_image_fit(q->c, &file, q->size, q->size, &fitted)) return 0;
    if ((x->rgb = (uint8_t *)dpo_scope_alloc(q->c, bytes)) != NULL) memcpy(x->rgb, fitted.rgb, bytes);
    dpo_image_free(q->c, &file);
    dpo_image_free(q->c, &fitted);
    return x->rgb != NULL;
}

/* One line of captions.jsonl: {"image": .., "caption": .., "split": "train" or "held"}. */
static int read_item(quality *q, const char *path, const char *line, item *x)
{
    dpo_json   *row = dpo_json_parse(q->c, line, strlen(line), path);
    const char *caption = dpo_json_text(dpo_json_get(row, "caption"), NULL);
    const char *image = dpo_json_text(dpo_json_get(row, "image"), NULL);
    const char *split = dpo_json_text(dpo_json_get(row, "split"), NULL);
    int         ok = caption && image && split;
    if (row && !ok) fail("%s: a line without caption, image or split", path);
    if (ok) {
        x->caption = copy_text(q->c, caption);
        x->order = hash(caption);
        x->held = strcmp(split, "train") != 0;
        ok = x->caption && load_picture(q, image, x);
    }
    dpo_json_free(row);
    return ok;
}

/* Sorted, so that the first ASKED of the list are a random choice of those trained on, the same every time. */
static int read_data(quality *q)
{
    char  path[1200], line[4096];
    int   ok = 1;
    FILE *f;
    snprintf(path, sizeof path, "%s/captions.jsonl", q->data);
    if (!(f = fopen(path, "rb"))) return fail("cannot read %s: %s; emoji_data makes it", path, strerror(errno));
    while (ok && q->n < PICTURES && fgets(line, sizeof line, f)) ok = read_item(q, path, line, &q->list[q->n++]);
    if (ok && fgetc(f) != EOF) ok = fail("%s: more than %d lines", path, (int)PICTURES);
    fclose(f);
    if (!ok) return 0;
    qsort(q->list, (size_t)q->n, sizeof *q->list, by_order);
    while (q->trained < q->n && !q->list[q->trained].held) q->trained++;
    printf("%d pictures, %d of them with captions that were left out of training\n", q->n, q->n - q->trained);
    return q->trained >= ASKED ? 1 : fail("%s: %d training pictures, %d are needed", path, q->trained, (int)ASKED);
}

/* ---- Which real picture is nearest? ----------------------------------------------------------------------------- */

/* How much of pixel i, which covers [i, i+1], lies in [from, to]. */
static double overlap(double from, double to, int i)
{
    double low = fmax(from, i), high = fmin(to, i + 1);
    return high > low ? high - low : 0;
}

/* Mean colours of SMALL x SMALL fields: rgb [size, size, 3] -> small [SMALL, SMALL, 3].  Where SMALL does not divide
   the size, a pixel counts for as much of it as lies in the field. */
static void shrink(const uint8_t *rgb, int size, float *small)
{
    double step = (double)size / SMALL;
    memset(small, 0, TINY * sizeof *small);
    for (int i = 0; i < SMALL * SMALL; i++) {
        double top = i / SMALL * step, left = i % SMALL * step;
        for (int y = (int)top; y < top + step && y < size; y++)
            for (int x = (int)left; x < left + step && x < size; x++) {
                double         part = overlap(top, top + step, y) * overlap(left, left + step, x) / (step*step);
                const uint8_t *p = rgb + 3 * (y*size + x);
                for (int k = 0; k < 3; k++) small[3*i + k] += (float)(part * p[k]);
            }
    }
}

/* L2, squared: only the order matters. */
static double distance(const float *a, const float *b)
{
    double sum = 0;
    for (int i = 0; i < TINY; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

/* How many training pictures are nearer to `drawn` than the k-th, whose caption was asked for.  real [trained, TINY] */
static int rank_of(const quality *q, const float *real, const float *drawn, int k)
{
    double own = distance(real + (size_t)k * TINY, drawn);
    int    nearer = 0;
    for (int i = 0; i < q->trained; i++) nearer += i != k && distance(real + (size_t)i * TINY, drawn) < own;
    return nearer;
}

/* The share of captions with rank 0, and with a rank below 10. */
static int rank_all(const quality *q, const uint8_t *drawn, double *top1, double *top10)
{
    size_t bytes = 3 * (size_t)q->size * (size_t)q->size;
    float  small[TINY], *real = (float *)dpo_scope_alloc(q->c, (size_t)q->trained * TINY * sizeof *real);
    if (!real) return 0;
    for (int i = 0; i < q->trained; i++) shrink(q->list[i].rgb, q->size, real + (size_t)i * TINY);
    *top1 = *top10 = 0;
    for (int k = 0; k < ASKED; k++) {
        int rank;
        shrink(drawn + (size_t)k * bytes, q->size, small);
        rank = rank_of(q, real, small, k);
        *top1  += (rank < 1) / (double)ASKED;
        *top10 += (rank < 10) / (double)ASKED;
    }
    return 1;
}

/* One picture for each of the first ASKED captions: [ASKED, size, size, 3], freed with the context. */
static uint8_t *draw(const quality *q)
{
    const char     *prompts[ASKED];
    uint8_t        *rgb = (uint8_t *)dpo_scope_alloc(q->c, (size_t)ASKED * 3 * (size_t)q->size * (size_t)q->size);
    dpo_sample_desc d;
    for (int i = 0; i < ASKED; i++) prompts[i] = q->list[i].caption;
    memset(&d, 0, sizeof d);
    d.n = ASKED;
    d.prompts = prompts;
    d.seed = q->seed;
    d.steps = q->steps;
    d.batch = BATCH;
    d.guidance = q->guidance;
    return rgb && dpo_sample(q->m, &d, rgb) ? rgb : NULL;
}

/* For looking at: pairs of (real, drawn), ten pairs a row, a frame of white around each. */
static int save_grid(const quality *q, const uint8_t *drawn)
{
    enum { COLUMNS = 20, ROWS = (2*ASKED + COLUMNS - 1) / COLUMNS };
    int       pitch = q->size + 2;
    size_t    line = 3 * (size_t)q->size;
    dpo_image sheet;
    if (!dpo_image_new(q->c, COLUMNS * pitch, ROWS * pitch, &sheet)) return 0;
    memset(sheet.rgb, 255, 3 * (size_t)sheet.width * (size_t)sheet.height);
    for (int i = 0; i < 2*ASKED; i++) {
        const uint8_t *from = i % 2 ? drawn + (size_t)(i/2) * line * (size_t)q->size : q->list[i/2].rgb;
        int            left = i % COLUMNS * pitch + 1, top = i / COLUMNS * pitch + 1;
        for (int y = 0; y < q->size; y++)
            memcpy(sheet.rgb + 3 * ((size_t)(top + y) * (size_t)sheet.width + (size_t)left), from + (size_t)y * line,
                   line);
    }
    return dpo_image_save(q->c, q->grid, &sheet);
}

/* ---- The denoising error ---------------------------------------------------------------------------------------- */

/* Pictures and captions of items first ... first+n-1, and their timesteps at draw d.  The range of t is cut into DRAWS
   parts; a picture has the same place in each, from its caption: the same draws for every model. */
typedef struct {
    uint8_t    *rgb;                    /* [n, size, size, 3] */
    const char *prompt[BATCH];
    int32_t     key[BATCH], t[BATCH];   /* of the noise; of the schedule */
    float       time[BATCH];            /* t, as the UNet is told */
} batch;

static int fill_batch(const quality *q, batch *b, int T, int first, int n, int d)
{
    size_t bytes = 3 * (size_t)q->size * (size_t)q->size;
    if (!(b->rgb = (uint8_t *)dpo_scope_alloc(q->c, (size_t)n * bytes))) return 0;
    for (int i = 0; i < n; i++) {
        const item *x = &q->list[first + i];
        memcpy(b->rgb + (size_t)i * bytes, x->rgb, bytes);
        b->prompt[i] = x->caption;
        b->key[i] = (int32_t)(x->order >> 33);
        b->t[i] = (int32_t)(T * (d + (double)(x->order & 0xffff) / 65536) / DRAWS);
        b->time[i] = (float)b->t[i];
    }
    return 1;
}

/* The sum over a batch of mean squared errors, -1 on failure:
     x_t = noise_add(x0, z, t)    error = mean (unet(x_t, t, text) - target(x0, z, t))^2    all [n, size, size, 3]    */
static double batch_error(const quality *q, const dpo_noise *noise, int first, int n, int d, int adapters_off)
{
    int64_t     shape[3] = { q->size, q->size, 3 }, count = n, scope = dpo_scope(q->c);
    float       error[BATCH];
    double      sum = 0;
    batch       b;
    dpo_unet_in in;
    if (!fill_batch(q, &b, noise->T, first, n, d)) return -1;
    memset(&in, 0, sizeof in);
    dpo_tensor *x0 = dpo_from_rgb(q->c, b.rgb, n, q->size, q->size);
    dpo_tensor *t = dpo_tensor_from(q->c, DPO_I32, 1, &count, b.t);
    dpo_tensor *key = dpo_tensor_from(q->c, DPO_I32, 1, &count, b.key);
    dpo_tensor *z = dpo_randn(q->c, 1, 0, (uint32_t)d, key, 3, shape);
    in.x = dpo_noise_add(noise, x0, z, t);
    in.t = dpo_tensor_from(q->c, DPO_F32, 1, &count, b.time);
    in.emb = dpo_encode_text(q->m, b.prompt, n, NULL);
    in.adapters_off = adapters_off;
    dpo_tensor *answer = dpo_unet(dpo_model_unet(q->m), &in);
    if (!dpo_read(dpo_mse(q->c, answer, dpo_noise_target(noise, x0, z, t)), error)) return -1;
    for (int i = 0; i < n; i++) sum += error[i];
    dpo_scope_end(q->c, scope, NULL);
    return sum;
}

/* Mean over the pictures first ... first+n-1 and DRAWS draws; 0 on failure. */
static double mean_error(const quality *q, const dpo_noise *noise, int first, int n, int adapters_off)
{
    double sum = 0;
    for (int d = 0; d < DRAWS; d++)
        for (int i = 0; i < n; i += BATCH) {
            double e = batch_error(q, noise, first + i, n - i < BATCH ? n - i : BATCH, d, adapters_off);
            if (e < 0) return 0;
            sum += e;
        }
    return n ? sum / n / DRAWS : 0;
}

/* On the n pictures from the first on, without the adapters and, where there are some, with them. */
static double report_error(const quality *q, const dpo_noise *noise, const char *what, int first, int n)
{
    double base = mean_error(q, noise, first, n, 1), aligned = q->adapter ? mean_error(q, noise, first, n, 0) : base;
    printf("error on %d pictures %s: %.5f", n, what, base);
    if (q->adapter && base > 0) printf(", with the adapters %.5f, change %+.2f %%", aligned, 100 * (aligned/base - 1));
    putchar('\n');
    return aligned;
}

/* ---- The program ------------------------------------------------------------------------------------------------ */

static int read_options(quality *q, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if      (!strcmp(argv[i], "--adapter"))  { q->adapter = value; i++; }
        else if (!strcmp(argv[i], "--grid"))     { q->grid = value; i++; }
        else if (!strcmp(argv[i], "--steps"))    { q->steps = atoi(value); i++; }
        else if (!strcmp(argv[i], "--guidance")) { q->guidance = (float)atof(value); i++; }
        else if (!strcmp(argv[i], "--seed"))     { q->seed = (uint64_t)atoll(value); i++; }
        else if (argv[i][0] == '-') return fail("unknown option %s", argv[i]);
        else if (!q->model) q->model = argv[i];
        else if (!q->data) q->data = argv[i];
        else return fail("one argument too many: %s", argv[i]);
    }
    if (q->data) return 1;
    return fail("usage: emoji_quality MODEL DATA [--adapter FILE] [--steps N] [--guidance G] [--seed N] [--grid FILE]");
}

static int open_model(quality *q)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    if (!(q->c = dpo_open(&d))) return fail("out of memory");
    dpo_no_grad(q->c, +1);              /* nothing is trained: the tape stays empty */
    if (!(q->m = dpo_model_load(q->c, q->model, DPO_F32))) return 0;
    q->size = dpo_model_describe(q->m).size;
    return !q->adapter || dpo_adapter_load(dpo_model_unet(q->m), q->adapter);
}

static int measure(quality *q)
{
    double     top1 = 0, top10 = 0, trained, held;
    uint8_t   *drawn;
    dpo_noise *noise;
    if (!open_model(q) || !read_data(q) || !(drawn = draw(q)) || !rank_all(q, drawn, &top1, &top10)) return 0;
    if (q->grid && !save_grid(q, drawn)) return 0;
    noise   = dpo_noise_new(q->c, dpo_model_schedule(q->m));
    trained = report_error(q, noise, "trained on", 0, ASKED);
    held    = report_error(q, noise, "left out", q->trained, q->n - q->trained);
    if (dpo_status(q->c) != DPO_OK) return 0;
    printf("top1 %.2f top10 %.2f  error trained %.5f held %.5f\n", top1, top10, trained, held);
    return 1;
}

int main(int argc, char **argv)
{
    static quality q;                   /* zeros; too large for some stacks */
    int            ok;
    q.steps = 10;
    q.guidance = 2;
    q.seed = 1;
    ok = read_options(&q, argc, argv) && measure(&q);
    if (q.c && dpo_error(q.c)) ok = fail("%s", dpo_error(q.c));
    dpo_close(q.c);
    return !ok;
}
