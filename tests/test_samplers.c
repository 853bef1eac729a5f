/* test_samplers.c - names and parts of samplers, pictures from pictures, masks, refiners, text in PNGs, Adafactor; that all
   of it is the same for any number of threads and batch, and every allocation made to fail in turn.  That samplers compute
   what diffusers computes is build/parity's to say.

   build   cc -O2 tests/test_samplers.c -o build/test_samplers -lm -lpthread
   run     build/test_samplers [every]     from the project's folder; every: let each allocation fail, not one in some */
#define main tiny_model_main
#include "tiny_model.c"
#undef main
#include "dpo_test.h"
#include "failing_alloc.h"

#define FOLDER "build/test_samplers.tmp"
#define TINY   FOLDER "/tiny"

enum { SIDE = 8, BYTES = SIDE*SIDE*3 };   /* of the tiny model's pictures */

static const char *why(dpo_ctx *c) { return dpo_error(c) ? dpo_error(c) : "no error"; }

static dpo_ctx *open_threads(int threads)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.threads = threads;
    return dpo_open(&d);
}

/* ---- names, configurations ------------------------------------------------------------------------------------------ */

static void test_names(void)
{
    static const struct { const char *name; int sampler; } others[] = {
        { "DPM++ 2M Karras", DPO_DPMPP_2M | DPO_KARRAS }, { "dpmpp_2m", DPO_DPMPP_2M }, { "k_euler_a", DPO_EULER_A },
        { "Euler a", DPO_EULER_A }, { "DDIM", DPO_DDIM }, { "dpm++2m-sde-karras", DPO_DPMPP_2M_SDE | DPO_KARRAS },
        { "automatic", -1 }, { "", -1 }, { "ddim2", -1 }, { "dd", -1 }, { NULL, -1 }
    };
    char        list[256], *word;
    int         count = 0;
    snprintf(list, sizeof list, "%s", dpo_sampler_list());
    for (word = strtok(list, " "); word; word = strtok(NULL, " "), count++) {
        int s = dpo_sampler_named(word);
        CHECK(s >= 0 && (s == DPO_SAMPLER_AUTO || dpo_sampler_named(dpo_sampler_name(s)) == s), "the sampler %s", word);
    }
    CHECK(count == 10, "%d samplers", count);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        CHECK(dpo_sampler_named(others[i].name) == others[i].sampler, "%s is %d", others[i].name ? others[i].name : "NULL",
              dpo_sampler_named(others[i].name));
}

/* What a class becomes, and that a schedule comes back from the file that it was saved to. */
static void test_configs(dpo_ctx *c)
{
    static const struct { const char *text; int sampler, solver; } good[] = {
        { "\"DDPMScheduler\", \"variance_type\": \"fixed_large\"", DPO_DDPM, 0 },
        { "\"PNDMScheduler\", \"skip_prk_steps\": true, \"use_karras_sigmas\": true", DPO_DDIM, 0 },
        { "\"EulerDiscreteScheduler\", \"use_karras_sigmas\": true, \"timestep_type\": \"continuous\"", DPO_EULER | DPO_KARRAS, 0 },
        { "\"EulerAncestralDiscreteScheduler\", \"rescale_betas_zero_snr\": true", DPO_EULER_A, 0 },
        { "\"DPMSolverMultistepScheduler\", \"use_karras_sigmas\": true, \"lambda_min_clipped\": -5.1, \"variance_type\": null",
          DPO_DPMPP_2M | DPO_KARRAS, 0 },
        { "\"DPMSolverMultistepScheduler\", \"algorithm_type\": \"sde-dpmsolver++\", \"solver_order\": 1, "
          "\"lower_order_final\": false, \"euler_at_final\": true, \"solver_type\": \"heun\", \"final_sigmas_type\": \"sigma_min\"",
          DPO_DPMPP_2M_SDE, DPO_FIRST_ORDER | DPO_HEUN | DPO_NO_LOWER_FINAL | DPO_EULER_FINAL },
        { "\"DPMSolverMultistepScheduler\", \"solver_order\": 3, \"algorithm_type\": \"dpmsolver\"", DPO_DPMPP_2M, 0 },
        { "\"UniPCMultistepScheduler\", \"solver_order\": 3", DPO_DPMPP_2M, 0 },
        { "\"HeunDiscreteScheduler\"", DPO_EULER, 0 }
    };
    static const char *const bad[] = {
        "\"LCMScheduler\"", "\"EulerDiscreteScheduler\", \"use_beta_sigmas\": true", "\"DDPMScheduler\", \"variance_type\": \"learned\"",
        "\"EulerDiscreteScheduler\", \"interpolation_type\": \"log_linear\"", "\"DPMSolverMultistepScheduler\", \"use_lu_lambdas\": true",
        "\"EulerDiscreteScheduler\", \"sigma_max\": 700", "\"DPMSolverMultistepScheduler\", \"solver_order\": 4",
        "\"EulerDiscreteScheduler\", \"final_sigmas_type\": \"last\"", "\"DDIMScheduler\", \"thresholding\": true"
    };
    dpo_schedule s, u;
    char         text[512];
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        snprintf(text, sizeof text, "{\"_class_name\": %s}", good[i].text);
        CHECK(put(FOLDER, "s.json", text) && dpo_schedule_load(c, FOLDER "/s.json", &s) && s.sampler == good[i].sampler &&
              s.solver == good[i].solver, "%s: sampler %d: %s", good[i].text, s.sampler, why(c));
        memset(&u, 0, sizeof u);
        CHECK(dpo_schedule_save(c, FOLDER "/u.json", &s) && dpo_schedule_load(c, FOLDER "/u.json", &u) && !memcmp(&s, &u, sizeof s),
              "%s, saved and read again: %s", good[i].text, why(c));
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(text, sizeof text, "{\"_class_name\": %s}", bad[i]);
        CHECK(put(FOLDER, "s.json", text) && !dpo_schedule_load(c, FOLDER "/s.json", &s) && strstr(why(c), "s.json"),
              "%s was taken: %s", bad[i], why(c));
        dpo_clear_error(c);
    }
}

/* ---- parts of the way ------------------------------------------------------------------------------------------------ */

/* A stand-in for a network, and the sampler's steps from `first` of the whole way on. */
static dpo_tensor *walk(dpo_ctx *c, const dpo_schedule *s, const dpo_sampler_desc *d, dpo_tensor *x, int *taken)
{
    dpo_sampler *p = dpo_sampler_new(c, s, d);
    int64_t      one = 1;
    int32_t      key = 3;
    for (int k = 0; p && k < p->steps; k++) {
        dpo_tensor *z = dpo_randn(c, 5, 9, (uint32_t)(p->first + k), dpo_tensor_from(c, DPO_I32, 1, &one, &key), 3, x->shape + 1);
        dpo_tensor *y = dpo_affine(c, dpo_sampler_input(p, k, x), 0.3f, 0.001f * p->t[k]);
        x = dpo_sampler_step(p, k, x, y, z);
    }
    if (p) *taken += p->steps;
    dpo_sampler_free(p);
    return p ? x : NULL;
}

/* Where steps know nothing of each other, two parts are the whole, to the bit; DPM-Solver starts anew in each. */
static void test_parts(dpo_ctx *c)
{
    dpo_schedule s = dpo_schedule_sd();
    int64_t      shape[4] = { 1, 3, 5, 2 }, scope = dpo_scope(c);
    float        v[30], whole[30], parts[30];
    for (int i = 0; i < 30; i++) v[i] = (float)sin(i);
    for (s.spacing = DPO_LEADING; s.spacing <= DPO_LINSPACE; s.spacing++)
        for (int kind = 1; kind < DPO_SAMPLERS; kind++) {
            dpo_sampler_desc d;
            dpo_tensor      *x = dpo_tensor_from(c, DPO_F32, 4, shape, v), *y, *z;
            int              all = 0, taken = 0;
            memset(&d, 0, sizeof d);
            d.sampler = kind;
            d.steps = 11;
            d.eta = 0.7f;
            y = walk(c, &s, &d, x, &all);
            d.to = 0.62;
            z = walk(c, &s, &d, x, &taken);
            d.from = d.to;
            d.to = 0;
            z = walk(c, &s, &d, z, &taken);
            CHECK(all == 11 && taken == all, "%s: %d steps in two parts", dpo_sampler_name(kind), taken);
            CHECK(y && z && dpo_read(y, whole) && dpo_read(z, parts), "%s: %s", dpo_sampler_name(kind), why(c));
            CHECK(!memcmp(whole, parts, sizeof whole) == (kind != DPO_DPMPP_2M && kind != DPO_DPMPP_2M_SDE),
                  "%s: two parts of the way and the whole", dpo_sampler_name(kind));
        }
    dpo_scope_end(c, scope, NULL);
}

/* How many steps a strength leaves is int(steps*strength) in doubles, as in Python. */
static void test_strength(dpo_ctx *c)
{
    static const struct { int steps; double strength; int left; } cases[] = {
        { 10, 0.7, 7 }, { 100, 0.29, 28 }, { 30, 0.6, 18 }, { 7, 0.5, 3 }, { 5, 1, 5 }, { 20, 0, 20 }
    };
    dpo_schedule s = dpo_schedule_sd();
    int64_t      shape[4] = { 1, 1, 1, 2 }, scope = dpo_scope(c);
    float        x0[2] = { 0.5f, -0.25f }, z[2] = { 2, 1 }, y[2], abar[1000];
    dpo_schedule_alphas(c, &s, abar);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dpo_sampler_desc d;
        dpo_sampler     *p;
        memset(&d, 0, sizeof d);
        d.steps = cases[i].steps;
        d.strength = cases[i].strength;
        p = dpo_sampler_new(c, &s, &d);
        CHECK(p && p->steps == cases[i].left, "%d steps at strength %g: %d", d.steps, d.strength, p ? p->steps : -1);
        if (!p) continue;
        dpo_read(dpo_sampler_noisy(p, 0, dpo_tensor_from(c, DPO_F32, 4, shape, x0), dpo_tensor_from(c, DPO_F32, 4, shape, z)), y);
        for (int k = 0; k < 2; k++) {
            double a = abar[(int)p->t[0]];
            CHECK_CLOSE(y[k], sqrt(a)*x0[k] + sqrt(1 - a)*z[k], 1e-6);
        }
        dpo_read(dpo_sampler_noisy(p, p->steps, dpo_tensor_from(c, DPO_F32, 4, shape, x0), dpo_tensor_from(c, DPO_F32, 4, shape, z)), y);
        CHECK(y[0] == x0[0] && y[1] == x0[1], "after the last step there is noise left");
        dpo_sampler_free(p);
    }
    dpo_scope_end(c, scope, NULL);
}

static void refuse(dpo_ctx *c, const dpo_schedule *s, const dpo_sampler_desc *d, const char *says)
{
    CHECK(!dpo_sampler_new(c, s, d) && strstr(why(c), says), "\"%s\" does not say \"%s\"", why(c), says);
    dpo_clear_error(c);
}

static void test_refusals(dpo_ctx *c)
{
    dpo_schedule     s = dpo_schedule_sd();
    dpo_sampler_desc d;
    memset(&d, 0, sizeof d);
    d.sampler = 77;                       refuse(c, &s, &d, "there is no sampler 77");
    d.sampler = DPO_DDIM | DPO_KARRAS;    refuse(c, &s, &d, "not for DDIM");
    d.sampler = DPO_KARRAS;               refuse(c, &s, &d, "there is no sampler");
    d.sampler = 0;  d.steps = 5;  d.strength = 0.1;       refuse(c, &s, &d, "none is left");
    d.strength = NAN;                     refuse(c, &s, &d, "between 0 and 1");
    d.strength = 0;  d.from = 1;          refuse(c, &s, &d, "between 0 and 1");
    d.from = 0.8;  d.to = 0.7;            refuse(c, &s, &d, "none is left");
    d.from = d.to = 0;  d.steps = 1001;   refuse(c, &s, &d, "1 to 1000 steps");
    d.steps = 1000;  s.steps_offset = 1;  refuse(c, &s, &d, "leave the schedule");
}

/* ---- pictures --------------------------------------------------------------------------------------------------------- */

static const char *const prompts[4] = { "thing 1", "thing 2", "a", "" };

static dpo_sample_desc some(int n)
{
    dpo_sample_desc d;
    memset(&d, 0, sizeof d);
    d.n = n;
    d.prompts = prompts;
    d.steps = 6;
    d.seed = 3;
    d.guidance = 3;
    return d;
}

static int same(const uint8_t *a, const uint8_t *b, int n) { return !memcmp(a, b, (size_t)n); }

static double apart(const uint8_t *a, const uint8_t *b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += abs(a[i] - b[i]);
    return sum / n;
}

/* Little strength stays near the picture; a mask's dark part stays the picture to the byte; batches change nothing. */
static void test_from_pictures(dpo_ctx *c, dpo_model *m)
{
    uint8_t         image[4*BYTES], mask[4*SIDE*SIDE], all[4*BYTES], some_of[4*BYTES], two[4*BYTES];
    dpo_sample_desc d = some(4);
    uint64_t        state = 8;
    int             kept = 0, dark = 0, changed = 0;
    for (int i = 0; i < 4*BYTES; i++) image[i] = (uint8_t)(test_random(&state) & 255);
    for (int i = 0; i < 4*SIDE*SIDE; i++) mask[i] = i % 3 ? 127 : 128;
    d.image = image;
    for (d.sampler = 1; d.sampler < DPO_SAMPLERS; d.sampler++) {
        const char *name = dpo_sampler_name(d.sampler);
        d.strength = 1;
        CHECK(dpo_sample(m, &d, all), "%s: %s", name, why(c));
        d.strength = 0.2;
        CHECK(dpo_sample(m, &d, some_of), "%s: %s", name, why(c));
        CHECK(apart(some_of, image, 4*BYTES) < apart(all, image, 4*BYTES), "%s: strength 0.2 is %g away, 1 %g", name,
              apart(some_of, image, 4*BYTES), apart(all, image, 4*BYTES));
    }
    d.sampler = DPO_EULER_A;
    d.mask = mask;
    for (d.strength = 0; d.strength < 1; d.strength += 0.6) {
        d.batch = 0;
        CHECK(dpo_sample(m, &d, all), "%s", why(c));
        d.batch = 3;
        CHECK(dpo_sample(m, &d, two) && same(all, two, 4*BYTES), "a picture depends on its batch: %s", why(c));
        for (int i = 0; i < 4*BYTES; i++) {
            dark += mask[i/3] < 128;
            if (mask[i/3] < 128) kept += all[i] == image[i]; else changed += all[i] != image[i];
        }
    }
    CHECK(kept == dark, "%d of %d bytes under the mask were kept", kept, dark);
    CHECK(changed > 4*BYTES/3, "%d bytes changed where the mask is bright", changed);
}

static int steps_told, last_told;

static int count_steps(void *user, const dpo_sample_progress *p)
{
    steps_told++;
    last_told = p->steps;
    return user != NULL && p->step == 2;
}

/* A model that refines itself gives what it gives alone; one that goes on by hand, too; cancelling stops. */
static void test_refiner(dpo_ctx *c, dpo_model *m)
{
    uint8_t         alone[4*BYTES], both[4*BYTES];
    dpo_sample_desc d = some(4);
    dpo_model      *other = dpo_model_create(c, TINY, 77);
    int64_t         scope = dpo_scope(c);
    dpo_tensor     *x, *y;
    d.sampler = DPO_EULER;
    d.on_step = count_steps;
    CHECK(dpo_sample(m, &d, alone), "%s", why(c));
    d.refiner = m;
    d.refine = 0.5;
    steps_told = 0;
    CHECK(dpo_sample(m, &d, both) && same(alone, both, 4*BYTES), "a model that refines itself: %s", why(c));
    CHECK(steps_told == 6 && last_told == 6, "%d of %d steps were told", steps_told, last_told);
    d.refiner = other;
    CHECK(dpo_sample(m, &d, both) && !same(alone, both, 4*BYTES), "another model refines nothing: %s", why(c));
    d.refiner = NULL;
    x = dpo_sample_latents(m, &d);
    d.to = 0.5;
    y = dpo_sample_latents(m, &d);
    d.to = 0;
    d.from = 0.5;
    d.latents = y;
    y = dpo_sample_latents(m, &d);
    CHECK(x && y && !memcmp(x->data, y->data, (size_t)dpo_count(x)*4), "two parts by hand: %s", why(c));
    d = some(4);
    d.on_step = count_steps;
    d.user = &d;
    CHECK(!dpo_sample(m, &d, both) && dpo_status(c) == DPO_CANCELLED, "%s", why(c));
    dpo_clear_error(c);
    dpo_scope_end(c, scope, NULL);
}

/* e (r std(c)/std(e) + 1 - r): at 1 the answer has the deviation of the prompt's own. */
static void test_rescale(dpo_ctx *c, dpo_model *m)
{
    uint8_t         plain[4*BYTES], half[4*BYTES], none[4*BYTES];
    dpo_sample_desc d = some(4);
    CHECK(dpo_sample(m, &d, plain), "%s", why(c));
    d.rescale = 0.5f;
    CHECK(dpo_sample(m, &d, half) && !same(plain, half, 4*BYTES), "rescale changes nothing: %s", why(c));
    d.guidance = 1;
    CHECK(dpo_sample(m, &d, half), "%s", why(c));
    d.rescale = 0;
    CHECK(dpo_sample(m, &d, none) && same(half, none, 4*BYTES), "rescale without guidance: %s", why(c));
}

static void refuse_sample(dpo_ctx *c, dpo_model *m, const dpo_sample_desc *d, const char *says)
{
    uint8_t rgb[4*BYTES];
    CHECK(!dpo_sample(m, d, rgb) && strstr(why(c), says), "\"%s\" does not say \"%s\"", why(c), says);
    dpo_clear_error(c);
}

static void test_bad_requests(dpo_ctx *c, dpo_model *m)
{
    uint8_t         mask[4*SIDE*SIDE] = { 0 };
    dpo_ctx        *stranger = open_threads(1);
    int64_t         shape[4] = { 1, SIDE, SIDE, 3 }, scope = dpo_scope(c);
    dpo_sample_desc d = some(4);
    d.mask = mask;                        refuse_sample(c, m, &d, "the picture that it keeps");
    d = some(4);  d.from = 0.5;           refuse_sample(c, m, &d, "the state to go on from");
    d = some(4);  d.strength = 1.5;       refuse_sample(c, m, &d, "strength");
    d = some(4);  d.rescale = -1;         refuse_sample(c, m, &d, "rescale");
    d = some(4);  d.batch = 65;           refuse_sample(c, m, &d, "batches");
    d = some(0);                          refuse_sample(c, m, &d, "prompts");
    d = some(4);  d.sampler = 99;         refuse_sample(c, m, &d, "there is no sampler");
    d = some(4);  d.refine = 1.5;  d.refiner = m;          refuse_sample(c, m, &d, "a refiner");
    d = some(4);  d.refiner = dpo_model_create(stranger, TINY, 1);             refuse_sample(c, m, &d, "a refiner");
    d = some(4);  d.latents = dpo_tensor_new(c, DPO_F32, 4, shape);            refuse_sample(c, m, &d, "starts from");
    CHECK(!dpo_sample(NULL, &d, mask) && !dpo_sample(m, NULL, mask) && !dpo_sample(m, &d, NULL) && !dpo_error(c), "NULL");
    dpo_scope_end(c, scope, NULL);
    dpo_close(stranger);
}

/* ---- text in a PNG ---------------------------------------------------------------------------------------------------- */

static uint32_t big_endian(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }

/* By table, from the polynomial in its other order of bits. */
static uint32_t crc_of(const uint8_t *p, size_t n)
{
    uint32_t table[256], crc = 0xffffffffu;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int k = 0; k < 8; k++) table[i] = (table[i] >> 1) ^ (0xedb88320u & (0u - (table[i] & 1)));
    }
    while (n--) crc = table[(crc ^ *p++) & 255] ^ crc >> 8;
    return ~crc;
}

/* The data of the first chunk of a type, all chunks checked; NULL if there is none or the file is broken. */
static const uint8_t *chunk_of(const uint8_t *png, size_t size, const char *type, uint32_t *n)
{
    const uint8_t *found = NULL;
    size_t         at = 8;
    while (at + 12 <= size) {
        uint32_t length = big_endian(png + at);
        if (length > size - at - 12 || crc_of(png + at + 4, length + 4) != big_endian(png + at + 8 + length)) return NULL;
        if (!memcmp(png + at + 4, type, 4) && !found) { found = png + at + 8; *n = length; }
        at += 12 + (size_t)length;
    }
    return at == size ? found : NULL;
}

static void test_png_text(dpo_ctx *c)
{
    static const char *const bad_keys[] = { "", "tab\t", "k\xc3\xa9y", NULL };
    static uint8_t file[1 << 16];
    const uint8_t *data;
    uint32_t       n = 0;
    size_t         size;
    FILE          *f;
    dpo_image      x, y;
    CHECK(dpo_image_new(c, 5, 3, &x), "%s", why(c));
    for (int i = 0; i < 45; i++) x.rgb[i] = (uint8_t)(i*5);
    for (int wide = 0; wide < 2; wide++) {
        const char *text = wide ? "a fox \xf0\x9f\xa6\x8a\nSteps: 1" : "caf\xc3\xa9\nNegative prompt: x";
        const char *want = wide ? "parameters\0\0\0\0\0a fox \xf0\x9f\xa6\x8a\nSteps: 1" : "parameters\0caf\xe9\nNegative prompt: x";
        uint32_t    bytes = wide ? 11 + 4 + (uint32_t)strlen(text) : 11 + (uint32_t)strlen(text) - 1;
        CHECK(dpo_image_save_text(c, FOLDER "/text.png", &x, "parameters", text), "%s", why(c));
        f = fopen(FOLDER "/text.png", "rb");
        size = f ? fread(file, 1, sizeof file, f) : 0;
        if (f) fclose(f);
        data = chunk_of(file, size, wide ? "iTXt" : "tEXt", &n);
        CHECK(data && n == bytes && !memcmp(data, want, n), "the text is not there, %u bytes of %u", (unsigned)n, (unsigned)bytes);
        CHECK(chunk_of(file, size, "IHDR", &n) == file + 16, "the header is not the first chunk");
        CHECK(dpo_image_load(c, FOLDER "/text.png", &y) && y.width == 5 && !memcmp(x.rgb, y.rgb, 45), "the picture changed: %s", why(c));
        dpo_image_free(c, &y);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(!dpo_image_save_text(c, FOLDER "/bad.png", &x, bad_keys[i], "text") && strstr(why(c), "a key of 1 to 79"), "%s", why(c));
        dpo_clear_error(c);
    }
    CHECK(!dpo_image_save_text(c, FOLDER "/bad.png", &x, "k", "\xff") && strstr(why(c), "not UTF-8"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_image_save_text(c, FOLDER "/nowhere/bad.png", &x, "k", "v") && strstr(why(c), "nowhere"), "%s", why(c));
    dpo_clear_error(c);
    f = fopen(FOLDER "/bad.png", "rb");
    CHECK(!f, "a file was left behind");
    if (f) fclose(f);
    dpo_image_free(c, &x);
}

/* ---- Adafactor -------------------------------------------------------------------------------------------------------- */

/* A weight as PyTorch has it: `outer` blocks of [rows,cols], whose squares are factored over the block, or in full. */
typedef struct { const char *name; int kind, rank; int64_t shape[4]; } weight;

static const weight weights[] = {                         /* kind: 0 plain, 1 table, 2 dpo_weight_new */
    { "vector", 0, 1, { 37, 1, 1, 1 } },   { "table", 1, 2, { 21, 6, 1, 1 } },   { "linear", 2, 2, { 35, 9, 1, 1 } },
    { "conv3x3", 2, 4, { 18, 3, 3, 5 } },  { "conv1x1", 2, 4, { 17, 1, 1, 6 } }, { "conv1x3", 2, 4, { 5, 1, 3, 4 } }
};
enum { WEIGHTS = sizeof weights / sizeof *weights, WIDEST = 18*3*3*5 };

/* Where element e of [O,kh,kw,I] lies among PyTorch's blocks: [o,i] of [kh,kw]; of other weights e itself. */
static void place(const weight *w, int64_t e, int64_t *block, int64_t *row, int64_t *col)
{
    int64_t I = w->shape[3], kw = w->shape[2], kh = w->shape[1];
    *block = 0;  *row = e / w->shape[1];  *col = e % w->shape[1];
    if (w->rank == 1) { *row = 0; *col = e; }
    if (w->rank == 4) { *block = e / (kh*kw*I) * I + e % I;  *row = e / (kw*I) % kh;  *col = e / I % kw; }
}

/* What Adafactor keeps, in double. */
typedef struct { double row[512][64], col[512][64], full[WIDEST], w[WIDEST]; } factors;

/* One step of transformers' Adafactor, from its text. */
static void oracle(const weight *w, factors *f, const double *g, int64_t n, int k, const dpo_adafactor_desc *d, double lr)
{
    static double u[WIDEST], row[512][64], col[512][64];
    int64_t b, r, q, rows = w->rank == 4 ? w->shape[1] : w->rank == 1 ? 1 : w->shape[0];
    int64_t cols = w->rank == 4 ? w->shape[2] : w->rank == 1 ? w->shape[0] : w->shape[1];
    double  beta = 1 - pow(k, -0.8), sum = 0;
    memset(row, 0, sizeof row);
    memset(col, 0, sizeof col);
    for (int64_t e = 0; e < n; e++) {
        place(w, e, &b, &r, &q);
        if (w->rank > 1) { row[b][r] += (g[e]*g[e] + 1e-30)/(double)cols;  col[b][q] += (g[e]*g[e] + 1e-30)/(double)rows; }
        f->full[e] = beta*f->full[e] + (1 - beta)*(g[e]*g[e] + 1e-30);
    }
    for (int i = 0; i < 512; i++)
        for (int j = 0; j < 64; j++) {
            f->row[i][j] = beta*f->row[i][j] + (1 - beta)*row[i][j];
            f->col[i][j] = beta*f->col[i][j] + (1 - beta)*col[i][j];
        }
    for (int64_t e = 0; e < n; e++) {
        double mean = 0;
        place(w, e, &b, &r, &q);
        for (int64_t i = 0; i < rows && w->rank > 1; i++) mean += f->row[b][i]/(double)rows;
        u[e] = w->rank == 1 ? g[e]/sqrt(f->full[e]) : g[e]/sqrt(f->row[b][r]/mean*f->col[b][q]);
        sum += u[e]*u[e];
    }
    sum = sqrt(sum/(double)n)/(d->clip > 0 ? d->clip : 1);
    for (int64_t e = 0; e < n; e++) f->w[e] -= lr*(d->weight_decay*f->w[e] + u[e]/(sum > 1 ? sum : 1));
}

static void make_weights(dpo_ctx *c, dpo_tensor **x, uint64_t seed)
{
    float v[WIDEST];
    for (int i = 0; i < WEIGHTS; i++) {
        const weight *w = &weights[i];
        x[i] = w->kind == 2 ? dpo_weight_new(c, DPO_F32, w->rank, w->shape, w->name) : dpo_param_new(c, DPO_F32, w->rank, w->shape, w->name);
        for (int64_t e = 0; e < dpo_count(x[i]); e++) v[e] = (float)test_normal(&seed);
        dpo_write(x[i], v);
        x[i]->needs_grad = 1;
    }
}

/* A gradient of step k, set by hand: weights in panels go through no op but products.  Rows and columns differ in size. */
static void gradient(dpo_ctx *c, dpo_tensor *x, int i, int k, double *g, float bad)
{
    float    v[WIDEST];
    uint64_t seed = (uint64_t)(100*k + i);
    for (int64_t e = 0; e < dpo_count(x); e++) v[e] = (float)(g[e] = test_normal(&seed) * pow(3, (double)(e % 5) - 2) * 0.1);
    if (bad != 0) v[0] = bad;
    if (!x->grad) {
        int64_t shape[4];
        memcpy(shape, x->shape, sizeof shape);
        x->grad = x->panel ? dpo_weight_new(c, DPO_F32, 4, shape, NULL) : dpo_param_new(c, DPO_F32, x->rank, shape, NULL);
    }
    for (int64_t e = 0; e < dpo_count(x); e++) g[e] = v[e];
    dpo_write(x->grad, v);
}

static void test_adafactor(void)
{
    static factors     f[WEIGHTS];
    static double      g[WEIGHTS][WIDEST];
    static float       got[WEIGHTS][WIDEST], again[WIDEST];
    dpo_adafactor_desc d;
    dpo_adamw_desc     a;
    int64_t            skipped = -1;
    float              norm;
    memset(&d, 0, sizeof d);
    memset(&a, 0, sizeof a);
    d.weight_decay = 0.01f;
    d.max_norm = 1;
    for (int threads = 1; threads <= 2; threads++) {
        dpo_ctx    *c = open_threads(threads);
        dpo_tensor *x[WEIGHTS];
        dpo_optim  *o, *other;
        make_weights(c, x, 4);
        if (threads == 1)
            for (int i = 0; i < WEIGHTS; i++) {
                memset(&f[i], 0, sizeof f[i]);
                dpo_read(x[i], again);
                for (int64_t e = 0; e < dpo_count(x[i]); e++) f[i].w[e] = again[e];
            }
        o = dpo_adafactor_new(c, x, WEIGHTS, &d);
        for (int k = 1; k <= 4; k++) {
            double sum = 0;
            for (int i = 0; i < WEIGHTS; i++) {
                gradient(c, x[i], i, k, g[i], 0);
                for (int64_t e = 0; e < dpo_count(x[i]); e++) sum += g[i][e]*g[i][e];
            }
            sum = sqrt(sum) > 1 ? 1/(sqrt(sum) + 1e-6) : 1;
            CHECK(dpo_optim_step(o, 0.02f), "%s", why(c));
            for (int i = 0; i < WEIGHTS && threads == 1; i++) {
                double worst = 0;
                for (int64_t e = 0; e < dpo_count(x[i]); e++) g[i][e] *= sum;
                oracle(&weights[i], &f[i], g[i], dpo_count(x[i]), k, &d, 0.02);
                dpo_read(x[i], got[i]);
                for (int64_t e = 0; e < dpo_count(x[i]); e++) worst = fmax(worst, fabs(got[i][e] - f[i].w[e]));
                CHECK(worst < 3e-6, "step %d of %s is off by %g", k, weights[i].name, worst);
            }
            if (k == 2) CHECK(dpo_optim_save(o, FOLDER "/adafactor.safetensors"), "%s", why(c));
        }
        for (int i = 0; i < WEIGHTS; i++) {
            dpo_read(x[i], again);
            CHECK(!memcmp(again, got[i], (size_t)dpo_count(x[i])*4), "%s depends on the threads", weights[i].name);
            gradient(c, x[i], i, 9, g[i], i == 2 ? INFINITY : 0);
        }
        CHECK(dpo_optim_step(o, 0.02f) && dpo_optim_read(o, &norm, &skipped) && skipped == 1, "%d skipped", (int)skipped);
        for (int i = 0; i < WEIGHTS; i++) {
            dpo_read(x[i], again);
            CHECK(!memcmp(again, got[i], (size_t)dpo_count(x[i])*4), "a skipped step moved %s", weights[i].name);
        }
        other = dpo_adafactor_new(c, x, WEIGHTS, &d);
        CHECK(dpo_optim_load(other, FOLDER "/adafactor.safetensors") && dpo_optim_count(other) == 2, "%s", why(c));
        for (int k = 3; k <= 4; k++) {
            for (int i = 0; i < WEIGHTS; i++) gradient(c, x[i], i, k, g[i], 0);
            dpo_optim_step(other, 0.02f);
        }
        for (int i = 0; i < WEIGHTS; i++) {
            dpo_read(x[i], again);
            CHECK(!memcmp(again, got[i], (size_t)dpo_count(x[i])*4), "%s: a run that was loaded goes on differently", weights[i].name);
        }
        other = dpo_adamw_new(c, x, WEIGHTS, &a);
        CHECK(!dpo_optim_load(other, FOLDER "/adafactor.safetensors") && strstr(why(c), "another run"), "%s", why(c));
        dpo_clear_error(c);
        d.clip = -1;
        CHECK(!dpo_adafactor_new(c, x, WEIGHTS, &d) && strstr(why(c), "Adafactor"), "%s", why(c));
        d.clip = 0;
        dpo_close(c);
    }
}

/* ---- failing allocations ---------------------------------------------------------------------------------------------- */

/* Everything of this file once. */
static void all_of_it(dpo_ctx *c)
{
    static uint8_t     image[2*BYTES], mask[2*SIDE*SIDE], rgb[2*BYTES];
    static double      g[WIDEST];
    dpo_model         *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_sample_desc    d = some(2);
    dpo_adafactor_desc a;
    dpo_tensor        *x[WEIGHTS];
    dpo_optim         *o;
    dpo_image          picture = { SIDE, SIDE, rgb };
    if (!failing) failing_from = allocations;         /* a model's creation is let fail in test_models */
    memset(&a, 0, sizeof a);
    memset(mask, 200, sizeof mask);
    d.image = image;
    d.mask = mask;
    d.steps = 2;
    d.refiner = m;
    d.refine = 0.4;
    d.rescale = 0.5f;
    d.sampler = DPO_DPMPP_2M_SDE | DPO_KARRAS;
    if (!m || !dpo_sample(m, &d, rgb) || !dpo_image_save_text(c, FOLDER "/oom.png", &picture, "parameters", "\xe2\x82\xac")) return;
    for (int i = 0; i < WEIGHTS; i++) {
        const weight *w = &weights[i];
        x[i] = w->kind == 2 ? dpo_weight_new(c, DPO_F32, w->rank, w->shape, w->name) : dpo_param_new(c, DPO_F32, w->rank, w->shape, w->name);
        if (!x[i]) return;
        gradient(c, x[i], i, 1, g, 0);
        if (!x[i]->grad) return;
    }
    o = dpo_adafactor_new(c, x, WEIGHTS, &a);
    if (dpo_optim_step(o, 0.1f)) dpo_optim_save(o, FOLDER "/oom.safetensors");
}

int main(int argc, char **argv)
{
    dpo_ctx   *c = open_threads(2);
    dpo_model *m;
    CHECK(dpo_make_folder(c, TINY) && make(c, TINY), "%s", why(c));
    test_names();
    test_configs(c);
    test_parts(c);
    test_strength(c);
    test_refusals(c);
    m = dpo_model_create(c, TINY, 3);
    test_from_pictures(c, m);
    test_refiner(c, m);
    test_rescale(c, m);
    test_bad_requests(c, m);
    test_png_text(c);
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
    test_adafactor();
    test_failing(all_of_it, argc > 1 && !strcmp(argv[1], "every"), 600);
    return test_report();
}
