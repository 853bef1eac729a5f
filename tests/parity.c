/* parity.c - does diffdpo.h compute what diffusers, transformers and PyTorch compute?

   build   cc -O2 tests/parity.c -o build/parity -lm -lpthread
   run     build/parity DIR [--isa plain|avx2|avx512] [--threads N] [--device cpu|cuda|check]
           cuda: built with -DDIFFDPO_CUDA and diffdpo_cuda.cu; check: every call of it beside the CPU's
   DIR     a folder that make_golden.py wrote: a pipeline case, schedules, or scorer
   output  a line a check: name  error  tolerance  ok | FAIL, or name  skip  reason; exit status 1 on a failure

   The error is max|a-b| / max|b| over a tensor unless said otherwise.  Files hold PyTorch's layouts, tensors have
   channels last: this program turns one into the other where it reads. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"

static dpo_desc    desc;                  /* from the command line */
static const char *dir;
static int         checks, failures, skips, cuda;

static dpo_ctx *open_context(void)
{
#ifdef DIFFDPO_CUDA
    if (cuda) desc.backend = dpo_cuda_open(0, DIFFDPO_VERSION);
    if (cuda > 1) desc.backend = dpo_check_open(desc.backend, dpo_cpu_open(NULL), 1e-4f);
#endif
    return dpo_open(&desc);
}

/* ----------------------------------------------------------------------------------------------- reporting */

static void check(const char *name, double error, double tolerance)
{
    int ok = error <= tolerance;          /* NaN fails */
    printf("%-72s %.2e  %.0e  %s\n", name, error, tolerance, ok ? "ok" : "FAIL");
    checks++;
    failures += !ok;
}

static void skip(const char *name, const char *reason)
{
    printf("%-72s skip  %s\n", name, reason);
    skips++;
}

/* What the context says went wrong counts as a failure of `name`. */
static void check_context(dpo_ctx *c, const char *name)
{
    if (!dpo_error(c)) return;
    printf("%s: %s\n", name, dpo_error(c));
    check(name, NAN, 0);
}

/* a and b joined; the text lasts until sixteen more were made. */
static const char *join(const char *a, const char *b)
{
    static char buffers[16][512];
    static int  k;
    char       *text = buffers[k++ % 16];
    size_t      n = strlen(a), m = strlen(b);
    if (n > 500) n = 500;
    if (m > 511 - n) m = 511 - n;
    memcpy(text, a, n);
    memcpy(text + n, b, m);
    text[n + m] = 0;
    return text;
}

static const char *numbered(const char *a, int i, const char *b)
{
    char digits[16];
    snprintf(digits, sizeof digits, "%d", i);
    return join(join(a, digits), b);
}

static const char *path(const char *name) { return join(join(dir, "/"), name); }

static int exists(const char *name)
{
    FILE *f = fopen(path(name), "rb");
    if (f) fclose(f);
    return f != NULL;
}

/* ----------------------------------------------------------------------------------------------- tensors */

/* The values of an entry with [N,C,...] turned into [N,...,C] where `turn` is set; NULL if it is not there. */
static float *values_of(dpo_entry *e, int turn)
{
    int64_t N, C, P;
    float  *x, *y;
    if (!e || !(x = (float *)malloc(((size_t)e->count + 1) * sizeof *x))) return NULL;
    if (!dpo_entry_floats(e, 0, e->count, x)) { free(x); return NULL; }
    if (!turn || e->rank < 3) return x;
    N = e->shape[0];
    C = e->shape[1];
    P = e->count / (N * C);
    y = (float *)malloc(((size_t)e->count + 1) * sizeof *y);
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < C; k++)
            for (int64_t p = 0; p < P; p++) y[(n*P + p)*C + k] = x[(n*C + k)*P + p];
    free(x);
    return y;
}

/* The file DIR/<name><end>, NULL if there is none. */
static dpo_file *open_case(dpo_ctx *c, const char *name, const char *end)
{
    return exists(join(name, end)) ? dpo_safetensors_open(c, path(join(name, end))) : NULL;
}

/* An entry as a tensor; images are [N,H,W,C] then. */
static dpo_tensor *tensor_of(dpo_ctx *c, dpo_file *f, const char *name, int image)
{
    dpo_entry  *e = dpo_file_find(f, name);
    float      *x = values_of(e, image);
    int64_t     shape[4];
    dpo_tensor *t = NULL;
    if (!x || e->rank > 4) { free(x); return NULL; }
    for (int i = 0; i < 4; i++) shape[i] = e->shape[i];
    if (image) { shape[1] = e->shape[2]; shape[2] = e->shape[3]; shape[3] = e->shape[1]; }
    t = dpo_tensor_from(c, DPO_F32, e->rank, shape, x);
    free(x);
    return t;
}

/* Whole numbers as I32. */
static dpo_tensor *ints_of(dpo_ctx *c, dpo_file *f, const char *name)
{
    dpo_entry  *e = dpo_file_find(f, name);
    int64_t    *x;
    int32_t    *y;
    dpo_tensor *t = NULL;
    if (!e) return NULL;
    x = (int64_t *)malloc((size_t)e->count * sizeof *x);
    y = (int32_t *)malloc((size_t)e->count * sizeof *y);
    if (dpo_entry_ints(e, 0, e->count, x)) {
        for (int64_t i = 0; i < e->count; i++) y[i] = (int32_t)x[i];
        t = dpo_tensor_from(c, DPO_I32, e->rank, e->shape, y);
    }
    free(x);
    free(y);
    return t;
}

static double error_of(const float *a, const float *b, int64_t n)
{
    double worst = 0, most = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;     /* a NaN stays */
        if (fabs((double)b[i]) > most) most = fabs((double)b[i]);
    }
    return most > 0 ? worst / most : worst;
}

/* Error of a tensor against an entry; turn: the entry has channels second. */
static double compare(dpo_tensor *t, dpo_entry *e, int turn)
{
    double error = NAN;
    float *a, *b;
    if (!t || !e || dpo_count(t) != e->count) return NAN;
    a = (float *)malloc((size_t)e->count * sizeof *a);
    b = values_of(e, turn);
    if (b && dpo_read(t, a)) error = error_of(a, b, e->count);
    free(a);
    free(b);
    return error;
}

/* ----------------------------------------------------------------------------------------------- text */

static void check_tokens(dpo_model *m, int which)
{
    dpo_ctx        *c = dpo_model_text(m, which) ? dpo_net_params(dpo_model_text(m, which), NULL)[0]->ctx : NULL;
    const char     *name = numbered("tokens_", which + 1, ".json");
    dpo_json       *v;
    const dpo_json *prompts, *rows;
    int64_t         wrong = 0;
    if (!exists(name)) return;
    v = dpo_json_load(c, path(name));
    prompts = dpo_json_get(v, "prompts");
    rows = dpo_json_get(v, "ids");
    for (int64_t i = 0; i < dpo_json_count(prompts); i++) {
        const char *text = dpo_json_text(dpo_json_at(prompts, i), NULL);
        dpo_tensor *t = dpo_tokens(m, which, &text, 1);
        int64_t     n = dpo_count(t), want;
        int32_t    *ids = (int32_t *)calloc((size_t)n + 1, sizeof *ids);
        if (!t || n != dpo_json_count(dpo_json_at(rows, i)) || !dpo_read(t, ids)) wrong += 77;
        else for (int64_t k = 0; k < n; k++)
            wrong += !dpo_json_int(dpo_json_at(dpo_json_at(rows, i), k), &want) || want != ids[k];
        free(ids);
    }
    check(numbered("tokens.", which + 1, ""), v ? (double)wrong : NAN, 0);
    dpo_json_free(v);
}

static void check_text(dpo_ctx *c, dpo_model *m, int which, dpo_file *f)
{
    const char *in = numbered("text", which + 1, "."), *out = numbered("text.", which + 1, ".");
    dpo_tensor *ids = ints_of(c, f, join(in, "ids")), *pooled = NULL, *x;
    if (!ids) return;
    x = dpo_text_forward(dpo_model_text(m, which), ids, 0, &pooled);
    check(join(out, "last"), compare(x, dpo_file_find(f, join(in, "last")), 0), 1e-5);
    x = dpo_text_forward(dpo_model_text(m, which), ids, 1, NULL);
    check(join(out, "penultimate"), compare(x, dpo_file_find(f, join(in, "penultimate")), 0), 1e-5);
    check(join(out, "pooled"), compare(pooled, dpo_file_find(f, join(in, "pooled")), 0), 1e-5);
}

static void check_texts(dpo_ctx *c, dpo_model *m)
{
    dpo_file *f = open_case(c, "text", ".safetensors");
    for (int i = 0; i < 2; i++) {
        int64_t scope = dpo_scope(c);
        check_tokens(m, i);
        if (f) check_text(c, m, i, f);
        dpo_scope_end(c, scope, NULL);
    }
    dpo_file_close(f);
}

/* ----------------------------------------------------------------------------------------------- VAE */

/* Files hold the posterior as the network gives it, and latents before they are scaled. */
static dpo_tensor *unscaled(dpo_ctx *c, dpo_model *m, dpo_tensor *mean)
{
    return dpo_affine(c, mean, 1/dpo_model_describe(m).latent_scale, 0);
}

static dpo_tensor *scaled(dpo_ctx *c, dpo_model *m, dpo_tensor *z)
{
    return dpo_affine(c, z, dpo_model_describe(m).latent_scale, 0);
}

/* One file of images, posteriors, latents and what is decoded from them. */
static void check_vae(dpo_ctx *c, dpo_model *m, const char *name)
{
    int64_t     scope = dpo_scope(c);
    dpo_file   *f = open_case(c, name, ".safetensors");
    dpo_tensor *mean, *logvar, *y;
    if (!f) return;
    dpo_no_grad(c, 1);
    mean = dpo_encode_images(m, tensor_of(c, f, "image", 1), &logvar);
    check(join(name, ".mean"), compare(unscaled(c, m, mean), dpo_file_find(f, "mean"), 1), 1e-5);
    check(join(name, ".logvar"), compare(logvar, dpo_file_find(f, "logvar"), 1), 1e-5);
    y = dpo_decode_latents(m, scaled(c, m, tensor_of(c, f, "latents", 1)));
    check(join(name, ".decoded"), compare(y, dpo_file_find(f, "decoded"), 1), 1e-5);
    dpo_no_grad(c, -1);
    dpo_file_close(f);
    dpo_scope_end(c, scope, NULL);
}

/* Gradients of both halves with respect to what goes in, not recomputed and recomputed. */
static void check_vae_gradients(dpo_ctx *c, dpo_model *m, int checkpoint)
{
    int64_t     scope = dpo_scope(c);
    dpo_file   *f = open_case(c, "vae_gradients", ".safetensors");
    dpo_tensor *x, *z, *mean, *logvar, *dmean, *dlogvar;
    if (!f) return;
    dpo_model_vae_options(m, 0, checkpoint);
    x = tensor_of(c, f, "image", 1);
    z = tensor_of(c, f, "latents", 1);
    if (x && z) x->needs_grad = z->needs_grad = 1;
    mean = unscaled(c, m, dpo_encode_images(m, x, &logvar));
    dmean = dpo_binary(c, DPO_MUL, mean, tensor_of(c, f, "dmean", 1));
    dlogvar = dpo_binary(c, DPO_MUL, logvar, tensor_of(c, f, "dlogvar", 1));
    dpo_backward(dpo_sum(c, dpo_binary(c, DPO_ADD, dmean, dlogvar), -1));
    dpo_backward_from(dpo_decode_latents(m, scaled(c, m, z)), tensor_of(c, f, "ddecoded", 1));
    check(checkpoint ? "vae.dimage, recomputed" : "vae.dimage",
          compare(x ? x->grad : NULL, dpo_file_find(f, "dimage"), 1), 5e-5);
    check(checkpoint ? "vae.dlatents, recomputed" : "vae.dlatents",
          compare(z ? z->grad : NULL, dpo_file_find(f, "dlatents"), 1), 5e-5);
    dpo_model_vae_options(m, 0, 0);
    dpo_file_close(f);
    dpo_scope_end(c, scope, NULL);
}

/* diffusers' tiled_encode and tiled_decode, with tiles of the size that the file's one number `tile` says. */
static void check_vae_tiled(dpo_ctx *c, dpo_model *m)
{
    dpo_file *f = open_case(c, "vae_tiled", ".safetensors");
    float     tile = 0;
    if (!f) return;
    dpo_entry_floats(dpo_file_find(f, "tile"), 0, 1, &tile);
    dpo_file_close(f);
    if (dpo_model_vae_options(m, (int)tile, 0)) check_vae(c, m, "vae_tiled");
    else check("vae_tiled", NAN, 0);
    dpo_model_vae_options(m, 0, 0);
}

/* ----------------------------------------------------------------------------------------------- UNet */

static dpo_unet_in unet_input(dpo_ctx *c, dpo_file *f)
{
    dpo_unet_in in;
    memset(&in, 0, sizeof in);
    in.x = tensor_of(c, f, "x", 1);
    in.t = tensor_of(c, f, "t", 0);
    in.emb = tensor_of(c, f, "emb", 0);
    in.pooled = tensor_of(c, f, "pooled", 0);
    in.time_ids = tensor_of(c, f, "time_ids", 0);
    return in;
}

static void check_unet_output(dpo_ctx *c, dpo_model *m, const char *name)
{
    int64_t     scope = dpo_scope(c);
    dpo_file   *f = open_case(c, name, ".safetensors");
    dpo_unet_in in;
    if (!f) return;
    in = unet_input(c, f);
    dpo_no_grad(c, 1);
    check(join(name, ".y"), compare(dpo_unet(dpo_model_unet(m), &in), dpo_file_find(f, "y"), 1), 1e-5);
    dpo_no_grad(c, -1);
    dpo_file_close(f);
    dpo_scope_end(c, scope, NULL);
}

/* Output and every gradient; with checkpoint set, the recomputed ones, which must be the same numbers. */
static void check_unet(dpo_ctx *c, dpo_model *m, int checkpoint)
{
    int64_t     scope = dpo_scope(c);
    int         count;
    dpo_net    *unet = dpo_model_unet(m);
    dpo_tensor **params = dpo_net_params(unet, &count), *y;
    dpo_file   *f = open_case(c, "unet", ".safetensors");
    dpo_unet_in in;
    double      worst = 0;
    if (!f) return;
    in = unet_input(c, f);
    in.checkpoint = checkpoint;
    if (in.x) in.x->needs_grad = 1;
    if (in.emb) in.emb->needs_grad = 1;
    dpo_net_trainable(unet, 1);
    y = dpo_unet(unet, &in);
    if (!checkpoint) check("unet.y", compare(y, dpo_file_find(f, "y"), 1), 1e-5);
    dpo_backward_from(y, tensor_of(c, f, "dy", 1));
    if (!checkpoint) check("unet.dx", compare(in.x ? in.x->grad : NULL, dpo_file_find(f, "dx"), 1), 5e-5);
    if (!checkpoint) check("unet.demb", compare(in.emb ? in.emb->grad : NULL, dpo_file_find(f, "demb"), 0), 5e-5);
    for (int i = 0; i < count; i++) {
        dpo_entry *e = dpo_file_find(f, join("grad.", params[i]->name));
        double     error = compare(params[i]->grad, e, 1);
        if (e) e->taken = 1;
        if (!checkpoint) check(join("unet.grad.", params[i]->name), error, 5e-5);
        else if (!(error <= worst)) worst = error;
    }
    if (checkpoint) check("unet.checkpointed (the worst gradient)", worst, 5e-5);
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        dpo_entry *e = dpo_file_entry(f, i);
        if (!checkpoint && strncmp(e->name, "grad.", 5) == 0 && !e->taken) check(join("unet.", e->name), NAN, 5e-5);
    }
    for (int i = 0; i < count; i++) dpo_zero_grad(params[i]);
    dpo_net_trainable(unet, 0);
    dpo_file_close(f);
    dpo_scope_end(c, scope, NULL);
}

/* ----------------------------------------------------------------------------------------------- sampling */

typedef struct sampling { const char *name; dpo_file *f; int steps; } sampling;

static int on_sample_step(void *user, const dpo_sample_progress *p)
{
    sampling  *s = (sampling *)user;
    dpo_entry *e = dpo_file_find(s->f, numbered("latents_after", p->step - 1, ""));
    if (e) e->taken = 1;
    check(numbered(join(s->name, ".step."), p->step - 1, ""), compare(p->x, e, 1), 1e-4);
    s->steps++;
    return 0;
}

/* time_ids of the JSON, [1,6]; NULL where it has none. */
static dpo_tensor *sample_ids(dpo_ctx *c, const dpo_json *v)
{
    float   ids[8];
    int64_t shape[2], n = dpo_json_count(v);
    if (n < 1 || n > 8) return NULL;
    for (int64_t i = 0; i < n; i++) {
        double x = 0;
        dpo_json_double(dpo_json_at(v, i), &x);
        ids[i] = (float)x;
    }
    shape[0] = 1;
    shape[1] = n;
    return dpo_tensor_from(c, DPO_F32, 2, shape, ids);
}

/* Numbers from 0 to 255 in PyTorch's layout as bytes with channels last, to be freed; NULL where there are none. */
static uint8_t *bytes_of(dpo_entry *e)
{
    float   *x = values_of(e, 1);
    uint8_t *y = x ? (uint8_t *)malloc((size_t)e->count) : NULL;
    for (int64_t i = 0; y && i < e->count; i++) y[i] = (uint8_t)x[i];
    free(x);
    return y;
}

/* One sampled picture: from noise, or from a picture, perhaps under a mask; with the pipeline's scheduler or another. */
static void check_sample(dpo_ctx *c, dpo_model *m, const char *name)
{
    int64_t         scope = dpo_scope(c);
    dpo_json       *v;
    sampling        s;
    dpo_sample_desc d;
    dpo_schedule    schedule;
    const char     *prompt;
    dpo_entry      *image;
    dpo_tensor     *x;
    uint8_t        *picture, *mask;
    if (!exists(join(name, ".json"))) return;
    memset(&d, 0, sizeof d);
    v = dpo_json_load(c, path(join(name, ".json")));
    s.name = name;
    s.f = dpo_safetensors_open(c, path(join(name, ".safetensors")));
    s.steps = 0;
    image = dpo_file_find(s.f, "image");
    prompt = dpo_json_want_text(v, "prompt", "");
    d.n = 1;
    d.prompts = &prompt;
    d.steps = (int)dpo_json_want_int(v, "steps", 0, 1, 1000);
    d.guidance = (float)dpo_json_want_double(v, "guidance_scale", 1, 0, 100);
    d.rescale = (float)dpo_json_want_double(v, "guidance_rescale", 0, 0, 1);
    d.strength = dpo_json_want_double(v, "strength", 0, 0, 1);
    d.refine = dpo_json_want_double(v, "refine", 0, 0, 1);
    if (dpo_json_get(v, "refiner")) d.refiner = dpo_model_load(c, path(dpo_json_want_text(v, "refiner", "")), DPO_F32);
    d.start = tensor_of(c, s.f, "latents", 1);
    d.time_ids = sample_ids(c, dpo_json_get(v, "time_ids"));
    d.height = image ? (int)image->shape[2] : 0;
    d.width = image ? (int)image->shape[3] : 0;
    d.image = picture = bytes_of(dpo_file_find(s.f, "picture"));
    d.mask = mask = bytes_of(dpo_file_find(s.f, "mask"));
    d.on_step = on_sample_step;
    d.user = &s;
    if (dpo_json_get(v, "config") && dpoi_schedule_read(c, name, dpo_json_want_text(v, "scheduler", ""),
                                                        dpo_json_get(v, "config"), &schedule)) d.schedule = &schedule;
    x = dpo_sample_latents(m, &d);
    if (s.steps != dpo_json_want_int(v, "taken", d.steps, 1, 1000)) check(join(name, ".steps"), s.steps, 0);
    x = dpo_decode_latents(m, x);         /* a model of pixels gives them back as they are */
    check(join(name, ".image"), compare(dpo_clamp(c, dpo_affine(c, x, 0.5f, 0.5f), 0, 1), image, 1), 1e-4);
    dpo_file_close(s.f);
    dpo_json_free(v);
    free(picture);
    free(mask);
    dpo_scope_end(c, scope, NULL);
}

/* ----------------------------------------------------------------------------------------------- training */

static double number_at(const dpo_json *v, const char *key)
{
    double x = NAN;
    dpo_json_double(dpo_json_get(v, key), &x);
    return x;
}

static double relative(double a, double b) { return fabs(a - b) / fabs(b); }

static dpo_draw draw_of(dpo_ctx *c, dpo_file *f, int k)
{
    dpo_draw d;
    memset(&d, 0, sizeof d);
    d.x0 = tensor_of(c, f, numbered("step", k, ".x0"), 1);
    d.noise = tensor_of(c, f, numbered("step", k, ".noise"), 1);
    d.t = ints_of(c, f, numbered("step", k, ".t"));
    d.emb = tensor_of(c, f, numbered("step", k, ".emb"), 0);
    d.pooled = tensor_of(c, f, numbered("step", k, ".pooled"), 0);
    d.time_ids = tensor_of(c, f, numbered("step", k, ".time_ids"), 0);
    return d;
}

/* The values of all parameters, one array each. */
static float **snapshot(dpo_tensor **params, int count)
{
    float **all = (float **)calloc((size_t)count + 1, sizeof *all);
    for (int i = 0; i < count; i++) {
        all[i] = (float *)calloc((size_t)dpo_count(params[i]) + 1, sizeof **all);
        dpo_read(params[i], all[i]);
    }
    return all;
}

static void snapshot_free(float **all, int count)
{
    for (int i = 0; i < count; i++) free(all[i]);
    free(all);
}

static double distance(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sqrt(sum);
}

/* A parameter's name as the JSON has it: adapters carry peft's names there. */
static const char *peft_name(const char *name)
{
    const char *down = strstr(name, ".lora_down."), *up = strstr(name, ".lora_up."), *end = down ? down : up;
    static char text[512];
    if (!end) return name;
    snprintf(text, sizeof text, "%.*s.%s.default.weight", (int)(end - name), name, down ? "lora_A" : "lora_B");
    return text;
}

/* How far every parameter moved, against the reference; the worst relative difference. */
static void check_moved(const char *name, dpo_tensor **params, int count, float **start, const dpo_json *moved)
{
    float **end = snapshot(params, count);
    double  worst = dpo_json_count(moved) == count ? 0 : NAN;
    for (int i = 0; i < count; i++) {
        double way = distance(end[i], start[i], dpo_count(params[i]));
        double error = relative(way, number_at(moved, peft_name(params[i]->name)));
        if (!(error <= worst)) worst = error;
    }
    check(join(name, ".moved"), worst, 3e-3);
    snapshot_free(end, count);
}

/* The parameters that a run trains: the adapters, where there are some. */
static dpo_tensor **trained(dpo_net *unet, int *count)
{
    dpo_tensor **adapters = dpo_adapter_params(unet, count);
    return *count ? adapters : dpo_net_params(unet, count);
}

/* The gradients of the first step, before clipping. */
static void check_first_gradients(const char *name, dpo_net *unet, const dpo_json *norms)
{
    int          count;
    dpo_tensor **params = trained(unet, &count);
    double       worst = 0;
    for (int i = 0; i < count; i++) {
        int64_t n = dpo_count(params[i]);
        float  *g = (float *)calloc((size_t)n + 1, sizeof *g), *zero = (float *)calloc((size_t)n + 1, sizeof *zero);
        double  error = NAN;
        if (params[i]->grad && dpo_read(params[i]->grad, g))
            error = relative(distance(g, zero, n), number_at(norms, peft_name(params[i]->name)));
        if (!(error <= worst)) worst = error;
        free(g);
        free(zero);
    }
    check(join(name, ".gradients (the worst norm)"), worst, 3e-3);
}

/* One step: loss, logits and gradient norm; norms: of every gradient, or NULL. */
static void check_train_step(const char *name, dpo_net *unet, const dpo_noise *noise, const dpo_objective *o,
                             dpo_optim *optim, float lr, const dpo_draw *d, const dpo_json *want, const dpo_json *norms)
{
    dpo_terms       terms;
    float           loss = NAN, norm = NAN, inside[64];
    double          error = 0;
    int64_t         skipped, n;
    const dpo_json *logits = dpo_json_get(want, "inside");
    dpo_tensor     *l = dpo_diffusion_loss(unet, noise, d, o, &terms);
    if (!l) { check(join(name, ".loss"), NAN, 1e-3); return; }
    n = dpo_count(terms.inside);
    dpo_read(l, &loss);
    check(join(name, ".loss"), relative(loss, number_at(want, "loss")), 1e-3);
    if (n == dpo_json_count(logits) && n <= 64 && dpo_read(terms.inside, inside))
        for (int64_t i = 0; i < n; i++) {
            double x = NAN;
            dpo_json_double(dpo_json_at(logits, i), &x);
            if (!(fabs(inside[i] - x) <= error)) error = fabs(inside[i] - x);
        }
    else error = NAN;
    check(join(name, ".inside"), error, 1e-3);
    dpo_backward(l);
    if (norms) check_first_gradients(name, unet, norms);
    dpo_optim_step(optim, lr);
    dpo_optim_read(optim, &norm, &skipped);
    check(join(name, ".grad_norm"), relative(norm, number_at(want, "grad_norm")), 1e-3);
}

/* The adapters of a run as they start. */
static int lora_start(dpo_net *unet, const char *name, const dpo_json *v)
{
    dpo_adapter_desc a;
    memset(&a, 0, sizeof a);
    a.rank = (int)dpo_json_want_int(v, "lora_rank", 4, 1, 4096);
    a.alpha = (float)dpo_json_want_double(v, "lora_alpha", 8, 0, 1e6);   /* the file with peft's names holds none */
    return dpo_adapter_new(unet, &a) && dpo_adapter_load(unet, path(join(name, "_start.safetensors")));
}

static void train_steps(dpo_ctx *c, const char *name, dpo_model *m, const dpo_json *v, dpo_file *f)
{
    dpo_net        *unet = dpo_model_unet(m);
    const dpo_json *steps = dpo_json_get(v, "steps");
    int             lora = dpo_json_type(dpo_json_get(v, "lora_rank")) == DPO_JSON_NUMBER, count;
    dpo_tensor    **params;
    dpo_noise      *noise = dpo_noise_new(c, dpo_model_schedule(m));
    int             factored = strcmp(dpo_json_want_text(v, "optimizer", "adamw"), "adafactor") == 0;
    dpo_adamw_desc  a;
    dpo_adafactor_desc b;
    dpo_objective   o;
    dpo_optim      *optim;
    float         **start;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    memset(&o, 0, sizeof o);
    a.weight_decay = b.weight_decay = (float)number_at(v, "weight_decay");
    a.max_norm = b.max_norm = (float)number_at(v, "max_grad_norm");
    o.beta = (float)number_at(v, "beta");
    if (lora) lora_start(unet, name, v);
    else { o.reference = dpo_net_copy(unet, DPO_F32); dpo_net_trainable(unet, 1); }
    params = trained(unet, &count);
    start = snapshot(params, count);
    optim = factored ? dpo_adafactor_new(c, params, count, &b) : dpo_adamw_new(c, params, count, &a);
    for (int k = 0; k < (int)dpo_json_count(steps) && !dpo_error(c); k++) {
        int64_t  scope = dpo_scope(c);
        dpo_draw d = draw_of(c, f, k);
        check_train_step(numbered(join(name, ".step."), k, ""), unet, noise, &o, optim, (float)number_at(v, "lr"), &d,
                         dpo_json_at(steps, k), k ? NULL : dpo_json_get(v, "first_grad_norm_by_parameter"));
        dpo_scope_end(c, scope, NULL);
    }
    check_moved(name, params, count, start, dpo_json_get(v, "moved_by_parameter"));
    snapshot_free(start, count);
}

/* The adapters after the run, value by value. */
static void check_lora_final(dpo_ctx *c, const char *name, dpo_net *unet)
{
    dpo_file    *f = open_case(c, name, "_final.safetensors");
    int          count;
    dpo_tensor **params = dpo_adapter_params(unet, &count);
    double       worst = 0;
    for (int i = 0; f && i < count; i++) {
        double error = compare(params[i], dpo_file_find(f, peft_name(params[i]->name)), 1);
        if (!(error <= worst)) worst = error;
    }
    if (f) check(join(name, ".final (the worst adapter)"), worst, 3e-3);
    dpo_file_close(f);
}

static void check_train(const char *run)
{
    char        name[64];
    dpo_ctx    *c;
    dpo_model  *m;
    dpo_json   *v;
    dpo_file   *f;
    snprintf(name, sizeof name, "train_%s", run);
    if (!exists(join(name, ".json"))) return;
    c = open_context();
    m = dpo_model_load(c, path("pipeline"), DPO_F32);
    v = dpo_json_load(c, path(join(name, ".json")));
    f = dpo_safetensors_open(c, path(join(name, ".safetensors")));
    if (m && f) {
        train_steps(c, name, m, v, f);
        if (strcmp(run, "lora") == 0) check_lora_final(c, name, dpo_model_unet(m));
    }
    check_context(c, name);
    dpo_close(c);
}

static void check_pipeline(void)
{
    static const char *const samples[] = {
        "sample", "img2img", "img2img_all", "inpaint", "inpaint_some", "rescaled", "refined"
    };
    dpo_ctx   *c = open_context();
    dpo_model *m = dpo_model_load(c, path("pipeline"), DPO_F32);
    if (m) {
        check_texts(c, m);
        check_vae(c, m, "vae");
        check_vae(c, m, "vae_small");
        check_vae_tiled(c, m);
        check_vae_gradients(c, m, 0);
        check_vae_gradients(c, m, 1);
        check_unet(c, m, 0);
        check_unet(c, m, 1);
        check_unet_output(c, m, "unet_oblong");
        check_unet_output(c, m, "unet_faint");
        for (size_t i = 0; i < sizeof samples / sizeof *samples; i++) check_sample(c, m, samples[i]);
    }
    check_context(c, "pipeline");
    dpo_close(c);
    check_train("adamw");
    check_train("lora");
    check_train("adafactor");
}

/* ----------------------------------------------------------------------------------------------- schedules */

static int one_of(const char *text, const char *const *names, int n)
{
    for (int i = 0; text && i < n; i++) if (strcmp(text, names[i]) == 0) return i;
    return 0;
}

static const char *const beta_names[] = { "linear", "scaled_linear", "squaredcos_cap_v2" };     /* DPO_LINEAR ... */

static void check_tables(dpo_ctx *c)
{
    dpo_file *f = dpo_safetensors_open(c, path("alphas_cumprod.safetensors"));
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        dpo_entry   *e = dpo_file_entry(f, i);
        dpo_schedule s = dpo_schedule_sd();
        float       *a = (float *)calloc((size_t)e->count + 1, sizeof *a), *b = values_of(e, 0);
        double       worst = 0;
        for (int k = 0; k < 3; k++)
            if (strncmp(e->name + 4, beta_names[k], strlen(beta_names[k])) == 0) s.beta_schedule = k;
        s.zero_terminal_snr = strstr(e->name, ".zero_snr") != NULL;
        s.T = (int)e->count;
        if (!dpo_schedule_alphas(c, &s, a)) worst = NAN;
        for (int64_t k = 0; k < e->count; k++) {         /* a zero may be off by 1e-9, which counts as the tolerance */
            double error = b[k] != 0 ? relative(a[k], b[k]) : fabs((double)a[k]) / 1e-9 * 1e-5;
            if (!(error <= worst)) worst = error;
        }
        check(e->name, worst, 1e-5);
        free(a);
        free(b);
    }
    dpo_file_close(f);
}

/* All steps of one sampler on the stand-in model eps(x, t) = 0.3 x + 0.1 sin(t/100); the worst step. */
static double sampler_error(dpo_ctx *c, const char *name, const dpo_schedule *s, const dpo_sampler_desc *d, dpo_file *f)
{
    dpo_sampler *sampler = dpo_sampler_new(c, s, d);
    dpo_tensor  *x = tensor_of(c, f, join(name, ".x_init"), 1), *known = tensor_of(c, f, join(name, ".known"), 1);
    double       worst = sampler && x ? 0 : NAN;
    if (known)                            /* it starts from a picture */
        worst = compare(dpo_sampler_noisy(sampler, 0, known, tensor_of(c, f, join(name, ".start_noise"), 1)),
                        dpo_file_find(f, join(name, ".x_init")), 1);
    for (int k = 0; sampler && x && k < sampler->steps; k++) {
        double      error, t = sampler->t[k];
        dpo_entry  *want = dpo_file_find(f, numbered(join(name, ".x"), k, ""));
        dpo_tensor *z = sampler->wants_noise ? tensor_of(c, f, numbered(join(name, ".noise"), k, ""), 1) : NULL;
        dpo_tensor *p = dpo_affine(c, dpo_sampler_input(sampler, k, x), 0.3f, (float)(0.1 * sin(t / 100)));
        x = dpo_sampler_step(sampler, k, x, p, z);
        error = compare(x, want, 1);
        if (!(error <= worst)) worst = error;
    }
    if (sampler) {
        dpo_entry *e = dpo_file_find(f, join(name, ".timesteps"));
        float     *t = values_of(e, 0);
        double     error = t && e->count == sampler->steps ? error_of(sampler->t, t, e->count) : NAN;
        if (!(error <= worst)) worst = error;
        free(t);
    }
    dpo_sampler_free(sampler);
    return worst;
}

/* A file that Python wrote, which has -Infinity where JSON has no word for it; null stands there afterwards. */
static dpo_json *python_json(dpo_ctx *c, const char *name)
{
    FILE     *f = fopen(path(name), "rb");
    size_t    n;
    char     *text = (char *)calloc(1, 1 << 20), *at;
    dpo_json *v;
    if (!f || !text) { if (f) fclose(f); free(text); return NULL; }
    n = fread(text, 1, (1 << 20) - 1, f);
    fclose(f);
    while ((at = strstr(text, "-Infinity")) != NULL) memcpy(at, "null     ", 9);
    v = dpo_json_parse(c, text, n, name);
    free(text);
    return v;
}

/* Each case's configuration is read as a scheduler_config.json of its class would be, and AUTO must take its sampler. */
static void check_samplers(dpo_ctx *c)
{
    dpo_json       *v = python_json(c, "samplers.json");
    dpo_file       *f = dpo_safetensors_open(c, path("samplers.safetensors"));
    const dpo_json *cases = dpo_json_get(v, "cases");
    for (int64_t i = 0; i < dpo_json_count(cases); i++) {
        const dpo_json  *one = dpo_json_at(cases, i);
        const char      *name = dpo_json_want_text(one, "name", ""), *kind = dpo_json_want_text(one, "class", "");
        dpo_schedule     s;
        dpo_sampler_desc d;
        int64_t          scope = dpo_scope(c);
        double           error = NAN;
        memset(&d, 0, sizeof d);
        d.steps = (int)dpo_json_want_int(one, "steps", 0, 1, 1000);
        d.strength = dpo_json_want_double(one, "strength", 0, 0, 1);
        d.eta = (float)dpo_json_want_double(dpo_json_get(one, "step"), "eta", 0, 0, 1);
        if (dpoi_schedule_read(c, name, kind, dpo_json_get(one, "config"), &s)) error = sampler_error(c, name, &s, &d, f);
        check_context(c, name);
        dpo_clear_error(c);
        check(join("sampler.", name), error, 1e-5);
        dpo_scope_end(c, scope, NULL);
    }
    dpo_file_close(f);
    dpo_json_free(v);
}

static void check_schedules(void)
{
    dpo_ctx *c = open_context();
    if (exists("alphas_cumprod.safetensors")) check_tables(c);
    if (exists("samplers.json")) check_samplers(c);
    check_context(c, "schedules");
    dpo_close(c);
}

static void check_scorer(void)
{
    static const char *const names[] = {
        "pixel_values", "image_embeds", "text_embeds", "cosine", "aesthetic", "d_cosine_d_pixels"
    };
    for (int i = 0; i < 6; i++) skip(join("scores.", names[i]), "CLIP's picture tower is not there yet");
}

/* ----------------------------------------------------------------------------------------------- program */

static int usage(void)
{
    fprintf(stderr, "usage: parity DIR [--isa plain|avx2|avx512] [--threads N] [--device cpu|cuda|check]\n");
    return 2;
}

int main(int argc, char **argv)
{
    static const char *const isas[] = { "best", "plain", "avx2", "avx512" };
    desc.log = dpo_log_stderr;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--isa") == 0 && i + 1 < argc) {
            if (!(desc.isa = one_of(argv[++i], isas, 4)) && strcmp(argv[i], "best") != 0) return usage();
        } else if (strcmp(argv[i], "--device") == 0 && i + 1 < argc) {
            cuda = strcmp(argv[++i], "check") == 0 ? 2 : strcmp(argv[i], "cuda") == 0;
            if (!cuda && strcmp(argv[i], "cpu") != 0) return usage();
        } else if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) desc.threads = atoi(argv[++i]);
        else if (argv[i][0] != '-' && !dir) dir = argv[i];
        else return usage();
    }
    if (!dir) return usage();
#ifndef DIFFDPO_CUDA
    if (cuda) { fprintf(stderr, "parity: this build has no CUDA; see the build line of diffdpo_cuda.cu\n"); return 2; }
#endif
    if (exists("pipeline/model_index.json")) check_pipeline();
    if (exists("alphas_cumprod.safetensors") || exists("samplers.json")) check_schedules();
    if (exists("scores.json")) check_scorer();
    if (!checks && !skips) {
        fprintf(stderr, "parity: %s holds no reference case\n", dir);
        return 1;
    }
    printf("%d passed, %d failed, %d skipped\n", checks - failures, failures, skips);
    return failures != 0;
}
