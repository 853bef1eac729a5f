/* sample.c - pictures from a prompt, with Stable Diffusion 1.x, 2.x, XL or the emoji model.

   need    apt-get install gcc libc6-dev libstb-dev
   build   cc -O2 examples/sample.c -o build/sample -lm -lpthread
   run     build/sample MODEL "prompt" [-o out.png] [-n 4] [--negative "..."] [--steps 30] [--cfg 7] [--seed 1]
                        [--size 512x512] [--sampler dpmpp2m_karras] [--eta 0] [--rescale 0.7] [--lora FILE:0.8]
                        [--init in.png --strength 0.6] [--mask mask.png] [--refiner MODEL --refine 0.8]
                        [--dtype f32|bf16|f16] [--batch N] [--tile 512] [--threads N] [--device cpu|cuda]
                        [--tokenizer FOLDER] [--config FOLDER]
   MODEL   a folder as diffusers writes it, or one .safetensors file.  Such a file has no vocabulary: CLIP's vocab.json
           and merges.txt lie in a folder "tokenizer" beside it, or --tokenizer names theirs
   result  out.png, with the settings in its text "parameters" as A1111 writes them; with -n 4 out-1.png ... out-4.png,
           of which picture i is the one that --seed s+i-1 makes alone

   Without --size the model's own size is taken, with --init its number of pixels in the picture's shape.  --init paints
   over a picture, the more the greater the strength; with --mask only where the mask is bright.  --lora may be given
   several times.  A refiner (SDXL's) goes on from where the model stops, at --refine of the way.  --config names a
   pipeline folder whose configurations hold for a single file that is no published model. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"

enum { LORAS = 8, MOST = 1000 };        /* adapters; pictures of one call */

/* Everything that the command line can say. */
typedef struct {
    const char *model, *prompt, *out, *negative, *init, *mask, *refiner, *tokenizer, *config;
    const char *lora[LORAS];
    int         loras, n, steps, seed, width, height, sampler, dtype, batch, tile, threads, cuda;
    double      cfg, eta, rescale, strength, refine;
    double      start, told;            /* dpo_seconds(), at the last line of progress, too */
    dpo_ctx    *c;
} settings;

/* One line for what went wrong.  Returns 0, so that a function can say: return fail(...).
   What the library could not do needs no such call: the context keeps it, and main says it, once. */
static int fail(const char *format, ...)
{
    va_list args;
    fputs("sample: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return 0;
}

/* What the library says on the way: a scheduler that another stands in for.  Errors come through main. */
static void on_log(void *user, int level, const char *text)
{
    (void)user;
    if (level == DPO_LOG_WARNING) fprintf(stderr, "sample: %s\n", text);
}

/* ---- The command line -------------------------------------------------------------------------------------------- */

/* cuda: in builds with -DDIFFDPO_CUDA and diffdpo_cuda.cu, see there. */
static int device(const char *text, int *cuda)
{
    *cuda = !strcmp(text, "cuda");
#ifndef DIFFDPO_CUDA
    if (*cuda) return fail("this build has no CUDA; diffdpo_cuda.cu says how to make one");
#endif
    return *cuda || !strcmp(text, "cpu") ? 1 : fail("--device is cpu or cuda, not \"%.40s\"", text);
}

static int whole(const char *option, const char *text, int low, int high, int *out)
{
    char *end;
    long  v = strtol(text, &end, 10);
    if (end == text || *end || v < low || v > high)
        return fail("%s wants a whole number from %d to %d, not \"%.40s\"", option, low, high, text);
    *out = (int)v;
    return 1;
}

static int number(const char *option, const char *text, double low, double high, double *out)
{
    char *end;
    *out = strtod(text, &end);
    if (end != text && !*end && *out >= low && *out <= high) return 1;
    return fail("%s wants a number from %g to %g, not \"%.40s\"", option, low, high, text);
}

/* 512x768: width, height. */
static int size_of(settings *s, const char *text)
{
    char extra;
    if (sscanf(text, "%dx%d%c", &s->width, &s->height, &extra) == 2 && s->width > 0 && s->height > 0) return 1;
    return fail("--size wants WIDTHxHEIGHT, not \"%.40s\"", text);
}

static int sampler_of(settings *s, const char *text)
{
    s->sampler = dpo_sampler_named(text);
    return s->sampler >= 0 ? 1 : fail("there is no sampler \"%.40s\"; choose from: %s", text, dpo_sampler_list());
}

static int dtype_of(settings *s, const char *text)
{
    static const char *const names[] = { "f32", "bf16", "f16" };        /* DPO_F32 ... */
    for (s->dtype = 0; s->dtype < 3; s->dtype++) if (!strcmp(text, names[s->dtype])) return 1;
    return fail("--dtype is f32, bf16 or f16, not \"%.40s\"", text);
}

static int lora_of(settings *s, const char *text)
{
    if (s->loras == LORAS) return fail("at most %d times --lora", (int)LORAS);
    s->lora[s->loras++] = text;
    return 1;
}

/* One option with its value. */
static int option(settings *s, const char *name, const char *v)
{
    if (!v) return fail("%s: a value is missing", name);
    if (!strcmp(name, "-o"))         { s->out = v;      return 1; }
    if (!strcmp(name, "--negative")) { s->negative = v; return 1; }
    if (!strcmp(name, "--init"))     { s->init = v;     return 1; }
    if (!strcmp(name, "--mask"))     { s->mask = v;     return 1; }
    if (!strcmp(name, "--refiner"))  { s->refiner = v;  return 1; }
    if (!strcmp(name, "--tokenizer")) { s->tokenizer = v; return 1; }
    if (!strcmp(name, "--config"))   { s->config = v;   return 1; }
    if (!strcmp(name, "--lora"))     return lora_of(s, v);
    if (!strcmp(name, "--size"))     return size_of(s, v);
    if (!strcmp(name, "--sampler"))  return sampler_of(s, v);
    if (!strcmp(name, "--dtype"))    return dtype_of(s, v);
    if (!strcmp(name, "-n"))         return whole(name, v, 1, MOST, &s->n);
    if (!strcmp(name, "--steps"))    return whole(name, v, 1, 1000, &s->steps);
    if (!strcmp(name, "--seed"))     return whole(name, v, 0, 0x7fffffff - MOST, &s->seed);
    if (!strcmp(name, "--batch"))    return whole(name, v, 1, 64, &s->batch);
    if (!strcmp(name, "--tile"))     return whole(name, v, 0, 1 << 15, &s->tile);
    if (!strcmp(name, "--device"))   return device(v, &s->cuda);
    if (!strcmp(name, "--threads"))  return whole(name, v, 0, 1024, &s->threads);
    if (!strcmp(name, "--cfg"))      return number(name, v, 0, 100, &s->cfg);
    if (!strcmp(name, "--eta"))      return number(name, v, 0, 1, &s->eta);
    if (!strcmp(name, "--rescale"))  return number(name, v, 0, 1, &s->rescale);
    if (!strcmp(name, "--strength")) return number(name, v, 0.001, 1, &s->strength);
    if (!strcmp(name, "--refine"))   return number(name, v, 0.001, 0.999, &s->refine);
    return fail("unknown option %.40s", name);
}

static int parse(settings *s, int argc, char **argv)
{
    s->out = "out.png";
    s->n = 1;
    s->steps = 30;
    s->seed = 1;
    s->cfg = 7;
    s->tile = 512;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-' && argv[i][1]) {
            if (!option(s, argv[i], i + 1 < argc ? argv[i + 1] : NULL)) return 0;
            i++;
        } else if (!s->model) s->model = argv[i];
        else if (!s->prompt) s->prompt = argv[i];
        else return fail("one model and one prompt, not also \"%.40s\"", argv[i]);
    }
    if (!s->model || !s->prompt) return fail("usage: sample MODEL \"prompt\" [-o out.png] [options]; see sample.c");
    if ((s->mask || s->strength > 0) && !s->init) return fail("--mask and --strength need --init");
    return 1;
}

/* ---- Models and pictures ----------------------------------------------------------------------------------------- */

/* FILE:STRENGTH, where what follows the last colon is a number; else all of it is the file, at strength 1. */
static double split_lora(const char *text, char *file, size_t size)
{
    const char *colon = strrchr(text, ':');
    char       *end = NULL;
    double      strength = colon ? strtod(colon + 1, &end) : 1;
    int         numbered = colon && end != colon + 1 && !*end;
    snprintf(file, size, "%.*s", numbered ? (int)(colon - text) : (int)strlen(text), text);
    return numbered ? strength : 1;
}

/* Adapters go into the weights: several add up, and a step costs no more than without. */
static int merge(dpo_net *net, float strength)
{
    int count = 0;
    dpo_adapter_params(net, &count);
    dpo_adapter_strength(net, strength);
    return count == 0 || dpo_adapter_merge(net);
}

static int add_loras(const settings *s, dpo_model *m)
{
    for (int i = 0; i < s->loras; i++) {
        char  file[4096];
        float strength = (float)split_lora(s->lora[i], file, sizeof file);
        if (!dpo_model_adapter_load(m, file) || !merge(dpo_model_unet(m), strength) ||
            !merge(dpo_model_text(m, 0), strength) || !merge(dpo_model_text(m, 1), strength)) return 0;
    }
    return 1;
}

static dpo_model *load(const settings *s, const char *path)
{
    dpo_load_desc d = { 0 };
    dpo_model    *m;
    d.dtype = s->dtype;
    d.tokenizer = s->tokenizer;
    d.config = s->config;
    m = dpo_model_load_with(s->c, path, &d);
    if (m && dpo_model_vae(m)) dpo_model_vae_options(m, s->tile, 0);
    return m;
}

/* The model's number of pixels in the picture's shape, in whole latents. */
static void shape_of(settings *s, const dpo_model_info *info, const dpo_image *x)
{
    double side = info->size * sqrt((double)x->width / x->height);
    s->width = (int)(side / info->factor + 0.5) * info->factor;
    s->height = (int)((double)info->size * info->size / side / info->factor + 0.5) * info->factor;
    if (s->width < info->factor) s->width = info->factor;
    if (s->height < info->factor) s->height = info->factor;
}

/* A picture file in the size of the result, n times over, [n,height,width,3]; NULL on failure. */
static uint8_t *pixels_of(const settings *s, const char *path)
{
    size_t    bytes = (size_t)s->width * (size_t)s->height * 3;
    dpo_image x, y;
    uint8_t  *all = (uint8_t *)dpo_scope_alloc(s->c, bytes * (size_t)s->n);
    if (!all || !dpo_image_load(s->c, path, &x) || !dpo_image_fit(s->c, &x, s->width, s->height, &y)) return NULL;
    for (int i = 0; i < s->n; i++) memcpy(all + bytes * (size_t)i, y.rgb, bytes);
    dpo_image_free(s->c, &x);
    dpo_image_free(s->c, &y);
    return all;
}

/* [n,height,width] grey of [n,height,width,3], in place: Rec. 601, as Pillow does it. */
static uint8_t *grey_of(const settings *s, uint8_t *rgb)
{
    size_t n = (size_t)s->n * (size_t)s->width * (size_t)s->height;
    for (size_t i = 0; rgb && i < n; i++)
        rgb[i] = (uint8_t)((299 * rgb[3*i] + 587 * rgb[3*i + 1] + 114 * rgb[3*i + 2]) / 1000);
    return rgb;
}

/* ---- Results ----------------------------------------------------------------------------------------------------- */

/* One line that counts; small models would write it a thousand times a second. */
static int on_step(void *user, const dpo_sample_progress *p)
{
    settings *s = (settings *)user;
    double    now = dpo_seconds();
    int       last = p->step == p->steps && p->first + p->count == p->n;
    if (now - s->told < 0.2 && !last) return 0;
    s->told = now;
    fprintf(stderr, "\rpicture %d of %d  step %d of %d  %.1f s ", p->first + p->count, p->n, p->step, p->steps,
            now - s->start);
    if (last) fputc('\n', stderr);
    return 0;
}

/* The name of a file or folder without what stands around it. */
static void put_name(char *out, size_t size, const char *path)
{
    size_t n = strlen(path), from, to;
    while (n && (path[n - 1] == '/' || path[n - 1] == '\\')) n--;
    for (from = n; from && path[from - 1] != '/' && path[from - 1] != '\\';) from--;
    to = n > from + 12 && !strncmp(path + n - 12, ".safetensors", 12) ? n - 12 : n;
    snprintf(out, size, "%.*s", (int)(to - from), path + from);
}

/* Adds to the text at *n, which holds at most `size` bytes. */
static void put(char *text, size_t size, size_t *n, const char *format, ...)
{
    va_list args;
    int     more;
    va_start(args, format);
    more = vsnprintf(text + *n, size - *n, format, args);
    va_end(args);
    *n = more < 0 || *n + (size_t)more >= size ? size - 1 : *n + (size_t)more;
}

/* A1111's infotext: prompt with its adapters, negative prompt, settings.  Values hold no comma, or are quoted. */
static void describe(const settings *s, dpo_model *m, int i, char *text, size_t size)
{
    size_t n = 0;
    char   name[512], file[4096];
    put(text, size, &n, "%s", s->prompt);
    for (int k = 0; k < s->loras; k++) {
        double strength = split_lora(s->lora[k], file, sizeof file);
        put_name(name, sizeof name, file);
        put(text, size, &n, " <lora:%s:%g>", name, strength);
    }
    if (s->negative) put(text, size, &n, "\nNegative prompt: %s", s->negative);
    put_name(name, sizeof name, s->model);
    put(text, size, &n, "\nSteps: %d, Sampler: %s, CFG scale: %g, Seed: %d, Size: %dx%d, Model: %s%s%s", s->steps,
        dpo_sampler_name(s->sampler ? s->sampler : dpo_model_schedule(m)->sampler), s->cfg, s->seed + i, s->width,
        s->height, strpbrk(name, ",:") ? "\"" : "", name, strpbrk(name, ",:") ? "\"" : "");
    if (s->init) put(text, size, &n, ", Denoising strength: %g", s->strength > 0 ? s->strength : s->mask ? 1 : 0.8);
    if (s->eta > 0) put(text, size, &n, ", Eta: %g", s->eta);
    if (s->rescale > 0) put(text, size, &n, ", CFG Rescale: %g", s->rescale);
    if (s->refiner) {
        put_name(name, sizeof name, s->refiner);
        put(text, size, &n, ", Refiner: %s, Refiner switch at: %g", name, s->refine > 0 ? s->refine : 0.8);
    }
    put(text, size, &n, ", Version: diffdpo %d.%d.%d", DIFFDPO_VERSION >> 16, DIFFDPO_VERSION >> 8 & 255,
        DIFFDPO_VERSION & 255);
}

/* out.png, or of several out-1.png, out-2.png ... */
static int save(const settings *s, dpo_model *m, uint8_t *rgb)
{
    static char text[1 << 16];
    char        path[4096];
    const char *dot = strrchr(s->out, '.');
    int         stem = dot && !strpbrk(dot, "/\\") ? (int)(dot - s->out) : (int)strlen(s->out);
    for (int i = 0; i < s->n; i++) {
        dpo_image x = { s->width, s->height, rgb + (size_t)i * (size_t)s->width * (size_t)s->height * 3 };
        if (s->n == 1) snprintf(path, sizeof path, "%s", s->out);
        else snprintf(path, sizeof path, "%.*s-%d%s", stem, s->out, i + 1, s->out + stem);
        describe(s, m, i, text, sizeof text);
        if (!dpo_image_save_text(s->c, path, &x, "parameters", text)) return 0;
        printf("%s\n", path);
    }
    return 1;
}

/* ---- All of it --------------------------------------------------------------------------------------------------- */

static int run(settings *s)
{
    static const char *prompts[MOST], *negative[MOST];
    static int32_t     keys[MOST];
    dpo_model         *m = load(s, s->model);
    dpo_model_info     info = dpo_model_describe(m);
    dpo_sample_desc    d;
    dpo_image          x;
    uint8_t           *rgb;
    memset(&d, 0, sizeof d);
    if (!m || !add_loras(s, m) || (s->refiner && !(d.refiner = load(s, s->refiner)))) return 0;
    if (!s->width && !s->init) s->width = s->height = info.size;
    if (!s->width) {
        if (!dpo_image_size(s->c, s->init, &x.width, &x.height)) return 0;
        shape_of(s, &info, &x);
    }
    if (s->width % info.factor || s->height % info.factor)
        return fail("--size %dx%d: this model's sizes are multiples of %d", s->width, s->height, info.factor);
    for (int i = 0; i < s->n; i++) {
        prompts[i] = s->prompt;
        negative[i] = s->negative;
        keys[i] = s->seed + i;          /* the noise follows from the key alone: picture i is seed + i's */
    }
    d.batch = s->batch ? s->batch : info.factor > 1 ? 1 : 16;           /* pixels are small, latents' networks large */
    d.n = s->n;               d.steps = s->steps;    d.sampler = s->sampler;
    d.width = s->width;       d.height = s->height;  d.keys = keys;           d.prompts = prompts;
    d.negative = negative;    d.strength = s->strength;                       d.refine = s->refine;
    d.guidance = (float)s->cfg;                      d.eta = (float)s->eta;   d.rescale = (float)s->rescale;
    d.on_step = on_step;      d.user = s;
    if (s->init && !(d.image = pixels_of(s, s->init))) return 0;
    if (s->mask && !(d.mask = grey_of(s, pixels_of(s, s->mask)))) return 0;
    rgb = (uint8_t *)dpo_scope_alloc(s->c, (size_t)s->n * (size_t)s->width * (size_t)s->height * 3);
    s->start = dpo_seconds();
    return rgb && dpo_sample(m, &d, rgb) && save(s, m, rgb);
}

int main(int argc, char **argv)
{
    settings s;
    dpo_desc desc;
    int      ok;
    memset(&s, 0, sizeof s);
    memset(&desc, 0, sizeof desc);
    if (!parse(&s, argc, argv)) return 1;
    desc.threads = s.threads;
    desc.log = on_log;
#ifdef DIFFDPO_CUDA
    if (s.cuda) desc.backend = dpo_cuda_open(0, DIFFDPO_VERSION);
#endif
    if (!(s.c = dpo_open(&desc))) return !fail("no memory");
    ok = run(&s);
    if (dpo_error(s.c)) fail("%s", dpo_error(s.c));
    dpo_close(s.c);
    return !ok;
}
