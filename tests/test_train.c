/* test_train.c - schedules, samplers, images, losses, optimizer, pairs and the trainer: known numbers, the same bits for
   any number of threads, in two contexts at once and after a resume, and every allocation made to fail in turn.

   build   cc -O2 tests/test_train.c -o build/test_train -lm -lpthread
   run     build/test_train [every]     from the project's folder; every: let each allocation fail, not one in some */
#define main tiny_model_main
#include "tiny_model.c"
#undef main
#include "dpo_test.h"

#define FOLDER "build/test_train.tmp"
#define TINY   FOLDER "/tiny"

/* ---- contexts and a small run ----------------------------------------------------------------------------------- */

/* The context's error, or nothing. */
static const char *why(dpo_ctx *c) { return dpo_error(c) ? dpo_error(c) : "no error"; }

static dpo_ctx *open_isa(int threads, int isa)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.threads = threads;
    d.isa = isa;
    return dpo_open(&d);
}

static dpo_ctx *open_threads(int threads) { return open_isa(threads, DPO_ISA_BEST); }

/* Pictures that differ from pair to pair: the chosen bright, the rejected dark. */
static void fill_picture(dpo_image *x, int seed, int dark)
{
    uint64_t state = (uint64_t)seed;
    for (int i = 0; i < x->width * x->height * 3; i++) x->rgb[i] = (uint8_t)(test_random(&state) % 160 + (dark ? 0 : 95));
}

static dpo_pairs *some_pairs(dpo_ctx *c, int n)
{
    dpo_pairs *p = dpo_pairs_new(c);
    for (int i = 0; i < n; i++) {
        dpo_image a, b;
        char      prompt[32];
        snprintf(prompt, sizeof prompt, "thing %d", i / 2);
        if (!dpo_image_new(c, 8, 8, &a)) return NULL;
        if (!dpo_image_new(c, 8, 8, &b)) { dpo_image_free(c, &a); return NULL; }
        fill_picture(&a, 2*i, 0);
        fill_picture(&b, 2*i + 1, 1);
        dpo_pairs_add(p, prompt, &a, &b, 1);
        dpo_image_free(c, &a);
        dpo_image_free(c, &b);
    }
    return p;
}

static dpo_train_desc small_run(int rank)
{
    dpo_train_desc d = dpo_recipe_small();
    d.steps = 4;
    d.batch = 2;
    d.accumulation = 2;
    d.rank = rank;
    d.beta = 200;
    d.empty_prompts = 0.3f;
    d.flip = 1;
    d.seed = 7;
    return d;
}

typedef struct { float *v; int64_t n; } numbers;

/* All values of the trained tensors, one after another. */
static numbers weights_of(dpo_model *m)
{
    numbers      out = { NULL, 0 };
    int          n = 0;
    dpo_tensor **x = dpo_adapter_params(dpo_model_unet(m), &n);
    if (!n) x = dpo_net_params(dpo_model_unet(m), &n);
    for (int i = 0; i < n; i++) {
        out.v = (float *)realloc(out.v, (size_t)(out.n + dpo_count(x[i])) * sizeof(float));
        dpo_read(x[i], out.v + out.n);
        out.n += dpo_count(x[i]);
    }
    return out;
}

static int same(numbers a, numbers b) { return a.n > 0 && a.n == b.n && !memcmp(a.v, b.v, (size_t)a.n * sizeof(float)); }

/* Open, make the model, train as d says, return the weights. */
static numbers trained(int threads, dpo_train_desc d, dpo_progress *last)
{
    numbers      out = { NULL, 0 };
    dpo_ctx     *c = open_threads(threads);
    dpo_model   *m = dpo_model_create(c, TINY, 3);
    dpo_pairs   *p = some_pairs(c, 7);
    dpo_trainer *t = dpo_train_begin(m, p, &d);
    dpo_progress e;
    memset(&e, 0, sizeof e);
    while (dpo_train_step(t, &e)) { }
    CHECK(dpo_train_end(t), "training failed: %s", why(c));
    if (!dpo_error(c)) out = weights_of(m);
    if (last) *last = e;
    dpo_close(c);
    return out;
}

/* ---- noise ------------------------------------------------------------------------------------------------------ */

static void test_schedules(dpo_ctx *c)
{
    dpo_schedule s = dpo_schedule_sd();
    float        a[1000];
    CHECK(dpo_schedule_alphas(c, &s, a), "%s", why(c));
    CHECK_CLOSE(a[0], 0.999149978, 1e-7);                 /* formats.md, section 3 */
    CHECK_CLOSE(a[499], 0.27766943, 1e-7);
    CHECK(fabs(a[999] / 0.00466009509 - 1) < 1e-6, "abar[999] = %.9g", a[999]);
    s.zero_terminal_snr = 1;
    CHECK(dpo_schedule_alphas(c, &s, a), "%s", why(c));
    CHECK_CLOSE(a[500], 0.241018549, 1e-7);
    CHECK(fabs(a[998] / 1.968e-7 - 1) < 1e-3 && a[999] == 0, "abar ends %.9g, %.9g", a[998], a[999]);
    s.T = 1;
    CHECK(!dpo_schedule_alphas(c, &s, a) && dpo_error(c), "a schedule of one step was accepted");
    dpo_clear_error(c);
}

/* The answer of a network that knows x0, for a state of `noise` parts of noise. */
static dpo_tensor *oracle(dpo_ctx *c, const dpo_schedule *s, dpo_tensor *x, double signal, double noise, const float *x0)
{
    float v[48];
    dpo_read(x, v);
    for (int i = 0; i < 48; i++) {
        double eps = (v[i] - signal*x0[i]) / noise;
        v[i] = (float)(s->prediction == DPO_EPSILON ? eps : signal*eps - noise*x0[i]);
    }
    return dpo_tensor_from(c, DPO_F32, x->rank, x->shape, v);
}

/* Whatever the sampler, spacing and prediction: with a network that knows x0 the end is x0. */
static void check_sampler(dpo_ctx *c, const dpo_schedule *s, const dpo_sampler_desc *d)
{
    dpo_sampler *p = dpo_sampler_new(c, s, d);
    float        x0[48], a[1000], y[48];
    int64_t      shape[4] = { 1, 4, 4, 3 }, scope = dpo_scope(c);
    uint64_t     state = 5;
    dpo_tensor  *x, *key, *z;
    int32_t      zero = 0;
    double       worst = 0;
    for (int i = 0; i < 48; i++) x0[i] = (float)(0.9 * sin(i));
    dpo_schedule_alphas(c, s, a);
    for (int i = 0; i < 48; i++) y[i] = (float)test_normal(&state) * (p ? p->init_sigma : 0);
    x = dpo_tensor_from(c, DPO_F32, 4, shape, y);
    key = dpo_tensor_from(c, DPO_I32, 1, shape, &zero);
    for (int k = 0; p && k < p->steps; k++) {
        dpo_tensor *in = dpo_sampler_input(p, k, x);
        double      abar = a[(int)(p->t[k] + 0.5f)], signal = sqrt(abar), noise = sqrt(1 - abar);
        if (p->rows[0] && in != x && s->spacing == DPO_LINSPACE) {       /* Euler between two timesteps */
            float  t = p->t[k], low = a[(int)t], high = a[(int)t < 999 ? (int)t + 1 : 999];
            double sigma = sqrt((1 - low) / low) + (t - (int)t) * (sqrt((1 - high) / high) - sqrt((1 - low) / low));
            signal = 1 / sqrt(sigma*sigma + 1);
            noise = sigma * signal;
        }
        z = p->wants_noise ? dpo_randn(c, 3, 9, (uint32_t)k, key, 3, shape + 1) : NULL;
        x = dpo_sampler_step(p, k, x, oracle(c, s, in, signal, noise, x0), z);
    }
    CHECK(x && dpo_read(x, y), "sampler %d: %s", d->sampler, why(c));
    for (int i = 0; i < 48; i++) if (fabs(y[i] - x0[i]) > worst) worst = fabs(y[i] - x0[i]);
    CHECK(worst < 2e-4, "sampler %d, spacing %d, prediction %d, eta %g: %g off", d->sampler, s->spacing, s->prediction, d->eta, worst);
    dpo_scope_end(c, scope, NULL);
    dpo_sampler_free(p);
}

static void test_samplers(dpo_ctx *c)
{
    dpo_schedule     s = dpo_schedule_sd();
    dpo_sampler_desc d;
    dpo_sampler     *p;
    memset(&d, 0, sizeof d);
    d.steps = 20;
    p = dpo_sampler_new(c, &s, &d);
    CHECK(p && p->t[0] == 951 && p->t[19] == 1 && p->init_sigma == 1, "DDIM's timesteps, leading");
    dpo_sampler_free(p);
    d.sampler = DPO_EULER;
    p = dpo_sampler_new(c, &s, &d);
    CHECK(p && fabs(p->init_sigma - 11.07358) < 1e-5, "Euler starts from %g", p ? p->init_sigma : 0);
    dpo_sampler_free(p);
    s.spacing = DPO_TRAILING;
    p = dpo_sampler_new(c, &s, &d);
    CHECK(p && p->t[0] == 999 && p->t[19] == 49 && fabs(p->init_sigma - 14.61465) < 1e-5, "Euler, trailing");
    dpo_sampler_free(p);
    s.set_alpha_to_one = 1;
    d.steps = 8;                          /* divides 1000: else trailing DDIM ends at timestep 0, not before it */
    for (s.spacing = DPO_LEADING; s.spacing <= DPO_LINSPACE; s.spacing++)
        for (s.prediction = DPO_EPSILON; s.prediction <= DPO_V_PREDICTION; s.prediction++)
            for (d.sampler = DPO_DDIM; d.sampler < DPO_SAMPLERS; d.sampler++) {
                d.eta = 0;
                check_sampler(c, &s, &d);
                d.eta = 1;
                if (d.sampler == DPO_DDIM) check_sampler(c, &s, &d);
            }
    s.clip_sample = 1;
    s.spacing = DPO_LEADING;
    s.prediction = DPO_V_PREDICTION;
    d.sampler = DPO_DDIM;
    check_sampler(c, &s, &d);
    s.zero_terminal_snr = 1;
    s.prediction = DPO_EPSILON;
    s.spacing = DPO_TRAILING;
    CHECK(!dpo_sampler_new(c, &s, &d) && dpo_status(c) == DPO_UNSUPPORTED, "epsilon prediction without signal was accepted");
    dpo_clear_error(c);
}

static int config_says(dpo_ctx *c, const char *text, dpo_schedule *s)
{
    int ok = put(FOLDER, "scheduler.json", text) && dpo_schedule_load(c, FOLDER "/scheduler.json", s);
    dpo_clear_error(c);
    return ok;
}

static void test_configs(dpo_ctx *c)
{
    dpo_schedule s, u;
    CHECK(config_says(c, "{\"_class_name\": \"DDIMScheduler\"}", &s) && s.T == 1000 && s.clip_sample && s.set_alpha_to_one &&
          s.beta_schedule == DPO_LINEAR && s.beta_start == 0.0001 && s.spacing == DPO_LEADING, "DDIM's defaults");
    CHECK(config_says(c, "{\"_class_name\": \"PNDMScheduler\", \"steps_offset\": 1}", &s) && !s.set_alpha_to_one && !s.clip_sample &&
          s.steps_offset == 1 && s.sampler == DPO_DDIM, "PNDM's defaults");
    CHECK(config_says(c, "{\"_class_name\": \"DPMSolverMultistepScheduler\", \"lambda_min_clipped\": -Infinity}", &s) &&
          s.spacing == DPO_LINSPACE && s.sampler == DPO_DPMPP_2M, "DPM-Solver's, with Python's infinity");
    CHECK(!config_says(c, "{\"_class_name\": \"DDIMScheduler\", \"prediction_type\": \"sample\"}", &s), "prediction_type sample");
    CHECK(!config_says(c, "{\"_class_name\": \"FlowMatchEulerDiscreteScheduler\"}", &s), "another scheduler");
    CHECK(!config_says(c, "{\"_class_name\": \"DDIMScheduler\", \"beta_start\": 2}", &s), "beta_start 2");
    CHECK(!config_says(c, "{\"_class_name\": \"DDIMScheduler\", \"trained_betas\": [0.1]}", &s), "trained_betas");
    s = dpo_schedule_sd();
    s.prediction = DPO_V_PREDICTION;
    s.clip_sample = 1;
    memset(&u, 0, sizeof u);
    CHECK(dpo_schedule_save(c, FOLDER "/saved.json", &s) && dpo_schedule_load(c, FOLDER "/saved.json", &u) &&
          !memcmp(&s, &u, sizeof s), "a schedule that was saved is read the same: %s", why(c));
}

/* ---- images ----------------------------------------------------------------------------------------------------- */

static void test_images(dpo_ctx *c)
{
    dpo_image   x, y, z;
    dpo_tensor *t;
    int64_t     scope = dpo_scope(c);
    uint8_t    *png;
    size_t      bytes = 0;
    CHECK(dpo_image_new(c, 31, 17, &x), "%s", why(c));
    fill_picture(&x, 1, 0);
    t = dpo_from_rgb(c, x.rgb, 1, 17, 31);
    CHECK(dpo_image_new(c, 31, 17, &y) && dpo_to_rgb(t, y.rgb) && !memcmp(x.rgb, y.rgb, 31*17*3), "bytes to a tensor and back");
    dpo_image_free(c, &y);
    CHECK(dpo_image_fit(c, &x, 31, 17, &y) && !memcmp(x.rgb, y.rgb, 31*17*3), "fitting to its own size changes nothing");
    dpo_image_free(c, &y);
    memset(x.rgb, 77, 31*17*3);
    CHECK(dpo_image_fit(c, &x, 8, 12, &y) && y.width == 8 && y.height == 12 && y.rgb[0] == 77 && y.rgb[8*12*3 - 1] == 77, "grey stays grey");
    CHECK(!dpo_image_new(c, 100000, 2, &z) && dpo_error(c), "a picture 100000 wide");
    dpo_clear_error(c);
    png = dpo_png_encode(c, &y, &bytes);
    if (dpo_status(c) == DPO_UNSUPPORTED) {
        SKIP("images in files: no stb");
        dpo_clear_error(c);
    } else {
        CHECK(png && bytes > 50 && !memcmp(png + 1, "PNG", 3), "PNG in memory: %s", why(c));
        CHECK(dpo_image_save(c, FOLDER "/y.png", &y) && dpo_image_load(c, FOLDER "/y.png", &z) && z.width == 8 &&
              !memcmp(y.rgb, z.rgb, 8*12*3), "PNG to disk and back: %s", why(c));
        CHECK(put(FOLDER, "bad.png", "not a picture") && !dpo_image_load(c, FOLDER "/bad.png", &z) && strstr(dpo_error(c), "bad.png"),
              "text as a picture: %s", why(c));
        dpo_clear_error(c);
        CHECK(put(FOLDER, "huge.ppm", "P6 40000 40000 255\n") && !dpo_image_load(c, FOLDER "/huge.ppm", &z) &&
              strstr(dpo_error(c), "40000x40000"), "a huge picture: %s", why(c));
        dpo_clear_error(c);
    }
    dpo_png_free(c, png, bytes);
    dpo_scope_end(c, scope, NULL);
}

/* ---- losses and optimizer --------------------------------------------------------------------------------------- */

static double preference(int kind, double u, double s)
{
    if (kind == DPO_PREF_HINGE) return u < 1 ? 1 - u : 0;
    if (kind == DPO_PREF_IPO)   return (u - 0.5) * (u - 0.5);
    return (1 - s) * log(1 + exp(-u)) + s * log(1 + exp(u));
}

static void test_losses(dpo_ctx *c)
{
    float       L[6] = { 0.50f, 0.31f, 0.40f, 0.45f, 0.30f, 0.42f }, R[6] = { 0.52f, 0.30f, 0.40f, 0.44f, 0.33f, 0.38f }, w[3] = { 1, 2, 0.5f };
    float       got, inside[3], grad[6];
    int64_t     two[1] = { 6 }, one[1] = { 3 };
    double      beta = 30, smoothing = 0.1;
    for (int kind = DPO_PREF_SIGMOID; kind <= DPO_PREF_IPO; kind++) {
        int64_t     scope = dpo_scope(c);
        dpo_tensor *policy = dpo_tensor_from(c, DPO_F32, 1, two, L), *reference = dpo_tensor_from(c, DPO_F32, 1, two, R), *in, *loss;
        double      want = 0, h = 1e-6;
        policy->needs_grad = 1;
        loss = dpo_preference_loss(c, policy, reference, dpo_tensor_from(c, DPO_F32, 1, one, w), kind, (float)beta, (float)smoothing, &in);
        for (int b = 0; b < 3; b++) want += w[b] / 3 * preference(kind, 0.5*beta*((R[b] - L[b]) - (R[3+b] - L[3+b])), smoothing);
        CHECK(loss && dpo_read(loss, &got) && dpo_read(in, inside) && dpo_backward(loss) && dpo_read(policy->grad, grad), "%s", why(c));
        CHECK_CLOSE(got, want, 1e-5);
        for (int b = 0; b < 3; b++) {
            double u = 0.5*beta*((R[b] - L[b]) - (R[3+b] - L[3+b]));
            double slope = w[b] / 3 * (preference(kind, u + h, smoothing) - preference(kind, u - h, smoothing)) / (2*h);
            CHECK_CLOSE(inside[b], u, 1e-5);
            CHECK_CLOSE(grad[b], -0.5*beta*slope, 1e-4);
            CHECK_CLOSE(grad[3+b], 0.5*beta*slope, 1e-4);
        }
        dpo_scope_end(c, scope, NULL);
    }
}

/* y = sum of x * k has the gradient k. */
static void set_grad(dpo_ctx *c, dpo_tensor *x, const float *k)
{
    int64_t     scope = dpo_scope(c);
    dpo_tensor *y = dpo_sum(c, dpo_binary(c, DPO_MUL, x, dpo_tensor_from(c, DPO_F32, x->rank, x->shape, k)), -1);
    CHECK(dpo_backward(y), "%s", why(c));
    dpo_scope_end(c, scope, NULL);
}

static void test_adamw(dpo_ctx *c)
{
    int64_t        shape[1] = { 5 };
    dpo_tensor    *x = dpo_param_new(c, DPO_F32, 1, shape, "x");
    dpo_adamw_desc d = { 0.9f, 0.99f, 1e-8f, 0.1f, 1.0f };
    dpo_optim     *o, *again;
    double         w[5], m[5] = { 0 }, v[5] = { 0 };
    float          g[5], got[5], norm, bad[5] = { 1, INFINITY, 1, 1, 1 };
    int64_t        skipped = -1;
    for (int i = 0; i < 5; i++) w[i] = got[i] = (float)(i - 2);
    x->needs_grad = 1;
    dpo_write(x, got);
    o = dpo_adamw_new(c, &x, 1, &d);
    for (int k = 1; k <= 4; k++) {
        double sum = 0, factor;
        for (int i = 0; i < 5; i++) { g[i] = (float)sin(k + i) * (k == 2 ? 0.1f : 2); sum += g[i]*g[i]; }
        factor = sqrt(sum) > 1 ? 1 / (sqrt(sum) + 1e-6) : 1;
        set_grad(c, x, g);
        CHECK(dpo_optim_step(o, 0.01f) && dpo_optim_read(o, &norm, &skipped), "%s", why(c));
        CHECK_CLOSE(norm, sqrt(sum), 1e-5);
        for (int i = 0; i < 5; i++) {
            double e = g[i]*factor;
            m[i] = 0.9*m[i] + 0.1*e;
            v[i] = 0.99*v[i] + 0.01*e*e;
            w[i] -= 0.01 * (0.1*w[i] + m[i]/(1 - pow(0.9, k)) / (sqrt(v[i]/(1 - pow(0.99, k))) + 1e-8));
        }
        dpo_read(x, got);
        for (int i = 0; i < 5; i++) CHECK_CLOSE(got[i], w[i], 2e-6);
        if (k == 2) CHECK(dpo_optim_save(o, FOLDER "/optim.safetensors"), "%s", why(c));
    }
    set_grad(c, x, bad);
    CHECK(dpo_optim_step(o, 0.01f) && dpo_optim_read(o, &norm, &skipped) && skipped == 1, "a step with an infinite gradient: %d skipped", (int)skipped);
    dpo_read(x, g);
    CHECK(!memcmp(g, got, sizeof g), "such a step changed weights");
    again = dpo_adamw_new(c, &x, 1, &d);
    CHECK(dpo_optim_load(again, FOLDER "/optim.safetensors") && dpo_optim_count(again) == 2, "%s", why(c));
    for (int k = 3; k <= 4; k++) {
        for (int i = 0; i < 5; i++) g[i] = (float)sin(k + i) * 2;
        set_grad(c, x, g);
        dpo_optim_step(again, 0.01f);
    }
    dpo_read(x, g);
    CHECK(!memcmp(g, got, sizeof g), "an optimizer that was loaded goes on to the bit");
    dpo_optim_free(again);
    dpo_optim_free(o);
    dpo_param_free(x);
}

/* diffusers' get_scheduler, 40 steps of which 4 warm up, at steps 0, 1, 4, 5, 17, 30, 39. */
static void test_rates(void)
{
    static const int    at[7] = { 0, 1, 4, 5, 17, 30, 39 };
    static const double want[DPO_LR_SCHEDULES][7] = {
        { 0, 0.5, 2, 2, 2, 2, 2 },
        { 0, 0.5, 2, 1.9444444444444444, 1.2777777777777777, 0.5555555555555556, 0.05555555555555555 },
        { 0, 0.5, 2, 1.9961946980917455, 1.4226182617406995, 0.35721239031346064, 0.003805301908254455 },
        { 0, 0.5, 2, 1.9659258262890682, 1.9659258262890682, 1.8660254037844388, 0.03407417371093191 },
        { 0, 0.5, 2, 1.890432104243827, 0.8163580838734565, 0.15432107993827163, 0.0015433097993827174 } };
    dpo_lr_desc d;
    memset(&d, 0, sizeof d);
    d.lr = 2;
    d.warmup = 4;
    d.steps = 40;
    for (d.kind = 0; d.kind < DPO_LR_SCHEDULES; d.kind++) {
        d.cycles = d.kind == DPO_LR_RESTARTS ? 3.0f : 0;
        d.power = 2;
        for (int k = 0; k < 7; k++) CHECK_CLOSE(dpo_lr_at(&d, at[k]), want[d.kind][k], 1e-6);
    }
    CHECK_CLOSE(dpo_lr(DPO_LR_CONSTANT, 2, 0, 100, 0), 2, 1e-6);
    CHECK_CLOSE(dpo_lr(DPO_LR_COSINE, 2, 0, 100, 100), 0, 1e-6);
    CHECK_CLOSE(dpo_average_decay(0, 0.99f), 0.1, 1e-6);
    CHECK_CLOSE(dpo_average_decay(100000, 0.99f), 0.99, 1e-6);
}

/* KTO and MaPO: loss and gradient as PyTorch computes them in double. */
static void test_single_losses(dpo_ctx *c)
{
    static const float  L[6] = { 0.11f, 0.24f, 0.31f, 0.105f, 0.26f, 0.29f }, R[6] = { 0.12f, 0.23f, 0.33f, 0.10f, 0.25f, 0.30f };
    static const float  s[6] = { 1, -1, 1, -1, 1, -1 }, w[6] = { 1, 2, 0.5f, 1, 1, 1 };
    static const double kto[7] = { 0.43625750644429356, 3.631583229, -5.770159566, 1.051076877, -3.631583229, 2.885079783, -3.631583229 };
    static const double mapo[7] = { 0.37768310778753783, 6.6601816, 0.798340147, 4.084339653, -6.332217543, -0.131217004, -3.931411814 };
    int64_t six[1] = { 6 }, three[1] = { 3 };
    for (int k = 0; k < 2; k++) {
        int64_t      scope = dpo_scope(c);
        const double *want = k ? mapo : kto;
        dpo_tensor  *x = dpo_tensor_from(c, DPO_F32, 1, six, L), *inside, *loss;
        float        y = 0, g[6] = { 0 }, in[6] = { 0 };
        x->needs_grad = 1;
        loss = k ? dpo_mapo_loss(c, x, dpo_tensor_from(c, DPO_F32, 1, three, w), 0.1f, &inside)
                 : dpo_kto_loss(c, x, dpo_tensor_from(c, DPO_F32, 1, six, R), dpo_tensor_from(c, DPO_F32, 1, six, s),
                                dpo_tensor_from(c, DPO_F32, 1, six, w), 100, NULL, &inside);
        CHECK(loss && dpo_read(loss, &y) && dpo_read(inside, in) && dpo_backward(loss) && dpo_read(x->grad, g), "%s", why(c));
        CHECK_CLOSE(y, want[0], 2e-6);
        for (int i = 0; i < 6; i++) CHECK_CLOSE(g[i], want[1 + i], 2e-5);
        for (int i = 0; i < (k ? 3 : 6); i++)   /* the sign says who is ranked right */
            CHECK((in[i] > 0) == (k ? L[i] < L[3 + i] : s[i] * (R[i] - L[i] - 0.0025) > 0), "kind %d: inside %d is %g", k, i, in[i]);
        dpo_scope_end(c, scope, NULL);
    }
    CHECK_CLOSE(dpo_min_snr(0.9f, DPO_EPSILON, 5), 5.0 / 9, 1e-6);
    CHECK_CLOSE(dpo_min_snr(0.5f, DPO_EPSILON, 5), 1, 1e-6);
    CHECK_CLOSE(dpo_min_snr(0.9f, DPO_V_PREDICTION, 5), 0.5, 1e-6);
    CHECK_CLOSE(dpo_min_snr(1, DPO_EPSILON, 5), 0, 1e-6);
    CHECK_CLOSE(dpo_min_snr(0, DPO_V_PREDICTION, 5), 0, 1e-6);
}

/* The safeguard changes no value, and scales the gradient of each loser by its lambda. */
static void test_safeguard(dpo_ctx *c)
{
    enum { B = 3, P = 10 };
    float      y[2*B*P], g[2*B*P], plain[2*B*P], v[2*B];
    uint64_t   state = 3;
    int64_t    shape[2] = { 2*B, P }, scope = dpo_scope(c);
    dpo_tensor *e, *L, *S;
    for (int i = 0; i < 2*B*P; i++) y[i] = (float)test_normal(&state);
    for (int i = 0; i < P; i++) y[(B + 1)*P + i] = -y[P + i] + 0.1f*y[i];      /* pair 1: against each other */
    for (int i = 0; i < P; i++) y[(B + 2)*P + i] = 0.2f*y[2*P + i];            /* pair 2: along each other */
    for (int k = 0; k < 2; k++) {
        e = dpo_tensor_from(c, DPO_F32, 2, shape, y);
        e->needs_grad = 1;
        L = dpo_mse(c, e, dpo_tensor_new(c, DPO_F32, 2, shape));
        dpo_no_grad(c, 1);
        S = dpo_affine(c, e, 1, 0);
        dpo_no_grad(c, -1);
        if (k) L = dpoi_safeguard(c, S, L, 0.9f);
        CHECK(dpo_read(L, v) && dpo_backward(dpo_sum(c, L, -1)) && dpo_read(e->grad, k ? g : plain), "%s", why(c));
        for (int b = 0; b < 2*B; b++) {
            double sum = 0;
            for (int i = 0; i < P; i++) sum += (double)y[b*P + i]*y[b*P + i]/P;
            CHECK_CLOSE(v[b], sum, 1e-5);
        }
    }
    for (int b = 0; b < B; b++) {
        double ww = 0, wl = 0, lambda;
        for (int i = 0; i < P; i++) { ww += (double)y[b*P + i]*y[b*P + i];  wl += (double)y[b*P + i]*y[(B + b)*P + i]; }
        lambda = wl > 0 ? fmin(1, 0.1*ww/wl) : 1;
        for (int i = 0; i < P; i++) {
            CHECK_CLOSE(g[b*P + i], plain[b*P + i], 1e-6);
            CHECK_CLOSE(g[(B + b)*P + i], lambda*plain[(B + b)*P + i], 1e-5);
        }
    }
    dpo_scope_end(c, scope, NULL);
}

/* Moments of 8 bits: a weight of 5000 numbers goes where AdamW takes it, and a state that was saved goes on to the bit. */
static void test_adamw8(dpo_ctx *c)
{
    enum { N = 5003, STEPS = 60 };
    int64_t        shape[1] = { N };
    dpo_tensor    *x[3];
    dpo_optim     *o[3];
    dpo_adamw_desc d = { 0.9f, 0.999f, 1e-8f, 0.01f, 0 };
    static float   w[3][N], g[N];
    double         off = 0, moved = 0;
    for (int k = 0; k < 3; k++) {
        x[k] = dpo_param_new(c, DPO_F32, 1, shape, "x");
        x[k]->needs_grad = 1;
        for (int i = 0; i < N; i++) w[k][i] = (float)cos(i);
        dpo_write(x[k], w[k]);
    }
    o[0] = dpo_adamw_new(c, &x[0], 1, &d);
    o[1] = dpo_adamw8_new(c, &x[1], 1, &d);
    o[2] = dpo_adamw8_new(c, &x[2], 1, &d);
    for (int step = 1; step <= STEPS; step++)
        for (int k = 0; k < 3; k++) {
            uint64_t state = (uint64_t)step;
            for (int i = 0; i < N; i++) {     /* sizes from 1e-4 to 1e-2 beside each other, signs that mostly stay */
                double size = pow(10, (i % 64) / 32.0 - 4);
                g[i] = (float)(size * (sin(i) + 0.7*test_normal(&state)));
            }
            if (k == 2 && step == 31) {
                CHECK(dpo_optim_save(o[2], FOLDER "/adamw8.safetensors"), "%s", why(c));
                dpo_optim_free(o[2]);
                o[2] = dpo_adamw8_new(c, &x[2], 1, &d);
                CHECK(dpo_optim_load(o[2], FOLDER "/adamw8.safetensors"), "%s", why(c));
            }
            set_grad(c, x[k], g);
            CHECK(dpo_optim_step(o[k], 0.01f), "%s", why(c));
        }
    for (int k = 0; k < 3; k++) dpo_read(x[k], w[k]);
    for (int i = 0; i < N; i++) {
        off += fabs(w[1][i] - w[0][i]) / N;
        moved += fabs(w[0][i] - cos(i)) / N;
    }
    CHECK(off < 0.06*moved && moved > 0.05, "8 bits: weights are %g off on average, which moved by %g", off, moved);
    CHECK(!memcmp(w[1], w[2], sizeof w[1]), "8 bits: a state that was loaded goes on elsewhere");
    CHECK(off > 0, "8 bits are not used");
    for (int k = 0; k < 3; k++) { dpo_optim_free(o[k]); dpo_param_free(x[k]); }
}

/* ---- pairs ------------------------------------------------------------------------------------------------------ */

typedef struct { int lines, with_place; } log_count;

static void count_lines(void *user, int level, const char *text)
{
    log_count *n = (log_count *)user;
    if (level != DPO_LOG_ERROR) return;
    n->lines++;
    n->with_place += strstr(text, "bad.jsonl:") != NULL;
}

static void test_pairs(void)
{
    static const char good[] = "\xef\xbb\xbf{\"prompt\": \"a\", \"chosen\": \"y.png\", \"rejected\": \"y.png\", \"weight\": 2}\r\n\n"
        "{\"caption\": \"b\", \"image_0\": \"y.png\", \"image_1\": \"bad.png\", \"label_0\": 0}\n"
        "{\"caption\": \"b\", \"image_0\": \"y.png\", \"image_1\": \"y.png\", \"label_0\": 0.5}\n";
    static const char bad[] = "{\"prompt\": \"a\", \"chosen\": \"y.png\"\n{\"chosen\": \"y.png\", \"rejected\": \"y.png\"}\n[1]\n"
        "{\"prompt\": \"a\", \"chosen\": \"nowhere.png\", \"rejected\": \"y.png\"}\n{\"prompt\": \"a\", \"chosen\": \"y.png\", \"rejected\": 3}\n"
        "{\"prompt\": \"a\", \"image_0\": \"y.png\", \"image_1\": \"y.png\", \"label_0\": 0.7}\n"
        "{\"prompt\": \"a\", \"chosen\": \"y.png\", \"rejected\": \"y.png\", \"weight\": -1}\n"
        "{\"prompt\": \"a\", \"chosen\": \"y.png\", \"rejected\": \"y.png\"}\n";
    log_count      n = { 0, 0 };
    dpo_desc       d;
    dpo_ctx       *c;
    dpo_pairs     *p;
    const uint8_t *a = NULL, *b = NULL;
    memset(&d, 0, sizeof d);
    d.log = count_lines;
    d.user = &n;
    d.threads = 1;
    c = dpo_open(&d);
    put(FOLDER, "good.jsonl", good);
    put(FOLDER, "bad.jsonl", bad);
    put(FOLDER, "y.png", "");             /* only its being there is looked at here, where there is no stb */
    { dpo_image y; if (dpo_image_new(c, 8, 8, &y)) { fill_picture(&y, 4, 0); dpo_image_save(c, FOLDER "/y.png", &y); } }
    if (dpo_status(c) == DPO_UNSUPPORTED) dpo_clear_error(c);
    n.lines = 0;
    p = dpo_pairs_load(c, FOLDER "/good.jsonl");
    CHECK(p && dpo_pairs_count(p) == 2 && dpo_pairs_ties(p) == 1 && dpo_pairs_weight(p, 0) == 2 && !strcmp(dpo_pairs_prompt(p, 1), "b"),
          "a good manifest: %s", why(c));
    if (dpo_pairs_pixels(p, 0, 8, 8, &a, &b)) CHECK(a && b && !memcmp(a, b, 192), "the same picture twice");
    dpo_clear_error(c);
    CHECK(!dpo_pairs_check(p) && strstr(dpo_error(c), "bad.png"), "a picture that is none: %s", why(c));
    dpo_clear_error(c);
    n.lines = n.with_place = 0;
    CHECK(!dpo_pairs_load(c, FOLDER "/bad.jsonl") && n.with_place >= 7, "seven bad rows, %d errors, %d with a place", n.lines, n.with_place);
    CHECK(dpo_error(c) && strstr(dpo_error(c), "bad.jsonl:1") && strstr(dpo_error(c), "6 more"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_pairs_load(c, FOLDER "/nowhere.jsonl") && dpo_error(c), "no manifest");
    dpo_close(c);
}

/* ---- the trainer ------------------------------------------------------------------------------------------------ */

static void test_threads(void)
{
    for (int rank = 0; rank <= 4; rank += 4) {
        dpo_progress e, f;
        numbers a = trained(1, small_run(rank), &e), b = trained(2, small_run(rank), &f), k;
        dpo_train_desc d = small_run(rank);
        CHECK(same(a, b) && e.loss == f.loss && e.grad_norm == f.grad_norm, "rank %d: one and two threads differ", rank);
        CHECK(e.step == 4 && e.steps == 4 && e.pairs == 16 && e.skipped == 0 && e.loss < 0.7f && e.loss > 0, "rank %d: loss %g", rank, e.loss);
        d.checkpoint = 1;
        k = trained(1, d, &f);
        CHECK(fabs(e.loss - f.loss) < 1e-4, "rank %d: gradient checkpointing changed the loss from %g to %g", rank, e.loss, f.loss);
        d.seed++;
        free(k.v);
        k = trained(1, d, NULL);
        CHECK(!same(a, k), "rank %d: the seed changed nothing", rank);
        free(a.v); free(b.v); free(k.v);
    }
}

typedef struct { int rank; numbers out; } job;

static void train_job(void *arg)
{
    job *j = (job *)arg;
    j->out = trained(1, small_run(j->rank), NULL);
}

static void test_two_contexts(void)
{
#ifdef DPOI_THREADS
    job               j[2] = { { 0, { NULL, 0 } }, { 3, { NULL, 0 } } };
    dpoi_thread_start s[2];
    dpoi_thread       t[2];
    int               on[2];
    for (int i = 0; i < 2; i++) { s[i].fn = train_job; s[i].arg = &j[i]; on[i] = dpoi_thread_open(&t[i], &s[i]); }
    for (int i = 0; i < 2; i++) if (on[i]) dpoi_thread_join(&t[i]);
    for (int i = 0; i < 2; i++) {
        numbers alone = trained(1, small_run(j[i].rank), NULL);
        CHECK(same(alone, j[i].out), "context %d of two at once differs from the one alone", i);
        free(alone.v); free(j[i].out.v);
    }
#else
    SKIP("two contexts in two threads: no threads");
#endif
}

static int stop_at_two(void *user, const dpo_progress *p) { (void)user; return p->step == 2; }

/* Stop after two steps of four, go on in another context. */
static void test_resume(void)
{
    for (int kind = 0; kind < 3; kind++) {
        char           folder[64];
        dpo_train_desc d = small_run(kind == 0 ? 3 : 0);
        numbers        whole, half, rest;
        if (kind == 2) { d.objective = DPO_SFT; d.train_text = 1; d.average = 0.9f; }
        whole = trained(1, d, NULL);
        snprintf(folder, sizeof folder, FOLDER "/run-%d-%llu", kind, (unsigned long long)(dpo_seconds() * 1e6));
        d.output = folder;
        d.resume = 1;
        d.on_step = stop_at_two;
        half = trained(2, d, NULL);
        d.on_step = NULL;
        rest = trained(1, d, NULL);
        CHECK(!same(whole, half) && same(whole, rest), "kind %d: a run that was resumed differs", kind);
        d.seed++;
        {
            dpo_ctx   *c = open_threads(1);
            dpo_model *m = dpo_model_create(c, TINY, 3);
            CHECK(!dpo_train_begin(m, some_pairs(c, 7), &d) && dpo_error(c) && strstr(dpo_error(c), "seed"), "another seed resumed: %s", why(c));
            dpo_close(c);
        }
        free(whole.v); free(half.v); free(rest.v);
    }
}

static int cancel_now(void *user, const dpo_progress *p) { (void)p; dpo_cancel((dpo_ctx *)user); return 0; }

static void test_limits(void)
{
    dpo_ctx       *c = open_threads(1);
    dpo_model     *m = dpo_model_create(c, TINY, 3);
    dpo_pairs     *p = some_pairs(c, 3);
    dpo_train_desc d = small_run(2);
    d.on_step = cancel_now;
    d.user = c;
    CHECK(!dpo_train(m, p, &d) && dpo_status(c) == DPO_CANCELLED, "cancelled: %s", why(c));
    dpo_clear_error(c);
    d.on_step = NULL;
    CHECK(dpo_train(m, p, &d), "after a cancelled run the next one works: %s", why(c));
    d.lr = -1;
    CHECK(!dpo_train(m, p, &d) && dpo_error(c), "a negative learning rate");
    dpo_clear_error(c);
    d = small_run(2);
    CHECK(!dpo_train(m, dpo_pairs_new(c), &d) && dpo_error(c), "no pairs");
    dpo_clear_error(c);
    d.steps = 0;
    CHECK(dpo_train(m, p, &d), "no steps is no error: %s", why(c));
    CHECK(!dpo_train_begin(NULL, NULL, NULL) && !dpo_train_step(NULL, NULL) && !dpo_train_end(NULL), "NULL in, NULL out");
    dpo_close(c);
}

/* The same noise whatever the batch; the base beside the aligned model; reward and preference agree in sign. */
static void test_sampling(void)
{
    const char     *prompts[5] = { "a", "b", "c", "thing 1", "" };
    uint8_t         one[5*192], two[5*192];
    float           reward[2];
    dpo_ctx        *c = open_threads(2);
    dpo_model      *m = dpo_model_create(c, TINY, 3);
    dpo_pairs      *p = some_pairs(c, 1);
    dpo_train_desc  t = small_run(4);
    dpo_sample_desc d;
    dpo_reward_desc r;
    const uint8_t  *w = NULL, *l = NULL;
    memset(&d, 0, sizeof d);
    d.n = 5;
    d.prompts = prompts;
    d.steps = 4;
    d.seed = 11;
    d.guidance = 3;
    CHECK(dpo_sample(m, &d, one), "%s", why(c));
    d.batch = 2;
    CHECK(dpo_sample(m, &d, two) && !memcmp(one, two, sizeof one), "a picture depends on its batch");
    d.sampler = DPO_EULER;
    CHECK(dpo_sample(m, &d, two) && memcmp(one, two, sizeof one), "the sampler changes nothing");
    d.sampler = DPO_DDIM;
    t.steps = 20;
    t.lr = 5e-3f;
    t.empty_prompts = 0;
    t.flip = 0;
    CHECK(dpo_train(m, p, &t) && dpo_sample(m, &d, two) && memcmp(one, two, sizeof one), "training changed nothing: %s", why(c));
    d.adapters_off = 1;
    CHECK(dpo_sample(m, &d, two) && !memcmp(one, two, sizeof one), "without its adapters the model is not the old one");
    memset(&r, 0, sizeof r);
    r.beta = 200;
    prompts[0] = prompts[1] = dpo_pairs_prompt(p, 0);
    CHECK(dpo_pairs_pixels(p, 0, 8, 8, &w, &l), "%s", why(c));
    memcpy(one, w, 192);
    memcpy(one + 192, l, 192);
    CHECK(dpo_implicit_reward(m, &r, prompts, one, 2, reward) && reward[0] > reward[1], "reward %g of the chosen, %g of the rejected",
          reward[0], reward[1]);
    dpo_close(c);
}

/* ---- the trainer's other ways ------------------------------------------------------------------------------------- */

#define LATENTS "tests/golden/latents/pipeline"

/* Bright against dark pictures of three shapes, in files where there is stb; liked: single pictures. */
static dpo_pairs *shaped_pairs(dpo_ctx *c, int n, int single)
{
    static const int size[3][2] = { { 16, 16 }, { 32, 16 }, { 16, 24 } };
    dpo_pairs *p = dpo_pairs_new(c);
    for (int i = 0; i < n; i++) {
        dpo_image a, b;
        char      prompt[32];
        snprintf(prompt, sizeof prompt, "thing %d", i);
        if (!dpo_image_new(c, size[i % 3][0], size[i % 3][1], &a) || !dpo_image_new(c, size[i % 3][0], size[i % 3][1], &b)) return NULL;
        fill_picture(&a, 2*i, 0);
        fill_picture(&b, 2*i + 1, 1);
        if (single) { dpo_pairs_add_single(p, prompt, &a, 1, 1); dpo_pairs_add_single(p, prompt, &b, 0, 1); }
        else dpo_pairs_add(p, prompt, &a, &b, 1);
        dpo_image_free(c, &a);
        dpo_image_free(c, &b);
    }
    return p;
}

/* A run on a folder's model in a context of its own, which it closes; w: its weights after it. */
static dpo_progress run_in(dpo_ctx *c, const char *model, dpo_train_desc d, int single, numbers *w)
{
    dpo_model   *m = dpo_model_load(c, model, DPO_F32);
    dpo_trainer *t = dpo_train_begin(m, shaped_pairs(c, 9, single), &d);
    dpo_progress e;
    memset(&e, 0, sizeof e);
    while (dpo_train_step(t, &e)) { }
    CHECK(dpo_train_end(t), "objective %d: %s", d.objective, why(c));
    if (w) *w = weights_of(m);
    dpo_close(c);
    return e;
}

static dpo_progress run_on(const char *model, dpo_train_desc d, int single, numbers *w)
{
    return run_in(open_threads(1), model, d, single, w);
}

static const char *fresh_folder(char *out, size_t size, const char *name)
{
    snprintf(out, size, FOLDER "/%s-%llu", name, (unsigned long long)(dpo_seconds() * 1e6));
    return out;
}

/* A model of latents in buckets: what is kept in a folder changes no bit, and leaves nothing to encode. */
static void test_latents(void)
{
    char           folder[96];
    dpo_train_desc d = small_run(2);
    dpo_progress   e[3], with;
    numbers        w[3];
    d.width = d.height = 16;
    d.bucket_step = 8;
    d.noise_offset = 0.1f;
    d.input_perturbation = 0.1f;
    d.beside = 1;
    for (int k = 0; k < 3; k++) {
        if (k) d.cache_folder = k == 1 ? fresh_folder(folder, sizeof folder, "cache") : folder;
        e[k] = run_on(LATENTS, d, 0, &w[k]);
    }
    CHECK(same(w[0], w[1]) && same(w[0], w[2]), "a cache changed the weights");
    CHECK(e[1].encoded > 10 && e[2].encoded == 0 && e[2].cached >= e[1].encoded, "%d encoded at first, %d the second time, %d cached",
          (int)e[1].encoded, (int)e[2].encoded, (int)e[2].cached);
    CHECK(e[0].loss == e[2].loss && e[0].reference_w == e[2].reference_w && e[0].reference_w > 0, "reference errors from the cache: %g, %g",
          e[0].reference_w, e[2].reference_w);
    for (int k = 0; k < 3; k++) free(w[k].v);
    with = run_in(open_isa(1, DPO_ISA_PLAIN), LATENTS, d, 0, NULL);        /* fast kernels' scratch would hide it */
    d.drop_encoders = 1;                  /* from the folder, then from memory alone: the same, in less memory */
    for (int k = 1; k < 3; k++) {
        if (k == 2) d.cache_folder = NULL;
        e[k] = run_in(open_isa(1, DPO_ISA_PLAIN), LATENTS, d, 0, NULL);
        CHECK(e[k].loss == with.loss && e[k].memory < with.memory, "without encoders: loss %g, not %g; %zu bytes, not below %zu", e[k].loss,
              with.loss, e[k].memory, with.memory);
    }
    d.drop_encoders = 0;
    d.rest_encoders = 1;
    e[1] = run_in(open_isa(1, DPO_ISA_PLAIN), LATENTS, d, 0, NULL);
    CHECK(e[1].loss == with.loss && e[1].memory < with.memory, "encoders at rest: loss %g, not %g; %zu bytes, not below %zu", e[1].loss,
          with.loss, e[1].memory, with.memory);
    d.cache = 1;                          /* no room for anything: they stay, and each step encodes anew */
    e[2] = run_on(LATENTS, d, 0, &w[2]);
    CHECK(e[2].loss == e[0].loss && e[2].encoded > e[1].encoded, "without room: loss %g, not %g; %d encoded, %d with room", e[2].loss, e[0].loss,
          (int)e[2].encoded, (int)e[1].encoded);
    free(w[2].v);
    d.cache = 0;
    d.rest_encoders = d.beside = 0;
    e[1] = run_on(LATENTS, d, 0, &w[1]);
    CHECK(e[1].loss == e[0].loss, "the thread beside the step changed the loss");
    free(w[1].v);
}

/* All weights: the reference's errors computed ahead are those of a second model. */
static void test_ahead(void)
{
    numbers a, b, half, rest;
    char    folder[96];
    dpo_train_desc d = small_run(0);
    dpo_progress   e, f;
    d.lr = 1e-4f;
    a = trained(1, d, &e);
    d.ahead = 1;
    b = trained(1, d, &f);
    CHECK(same(a, b) && e.loss == f.loss && f.memory < e.memory, "ahead: loss %g, not %g; %zu bytes, not below %zu", f.loss, e.loss, f.memory, e.memory);
    d.output = fresh_folder(folder, sizeof folder, "ahead");
    d.resume = 1;
    d.on_step = stop_at_two;
    half = trained(1, d, NULL);
    d.on_step = NULL;
    rest = trained(1, d, NULL);
    CHECK(!same(a, half) && same(a, rest), "ahead: a run that was resumed differs");
    free(a.v); free(b.v); free(half.v); free(rest.v);
}

/* Every setting changes something: one that were ignored would not. */
static void test_settings(void)
{
    dpo_train_desc d = small_run(2);
    dpo_progress   base, e;
    numbers        w, v;
    d.width = 16;
    d.height = 8;                         /* so that there is something to crop */
    base = run_on(TINY, d, 0, &w);
    for (int k = 0; k < 16; k++) {
        dpo_train_desc x = d;
        switch (k) {
        case 0: x.noise_offset = 0.5f; break;
        case 1: x.input_perturbation = 0.5f; break;
        case 2: x.random_crop = 1; break;
        case 3: x.apart = 1; break;
        case 4: x.levels = 4; break;
        case 5: x.t_limit = 200; break;
        case 6: x.zero_snr = 1; break;
        case 7: x.safeguard = 0.99f; break;
        case 8: x.kind = DPO_PREF_HINGE; break;
        case 9: x.smoothing = 0.2f; break;
        case 10: x.optimizer = DPO_ADAFACTOR; break;
        case 11: x.objective = DPO_MAPO; x.beta = 0.1f; break;
        case 12: x.lr_schedule = DPO_LR_POLYNOMIAL; break;
        case 13: x.bucket_step = 8; break;
        case 14: x.objective = DPO_KTO; break;
        default: x.objective = DPO_SFT; x.min_snr = 1; break;
        }
        e = run_on(TINY, x, 0, &v);
        CHECK(!same(w, v) && v.n == w.n && e.skipped == 0 && e.loss == e.loss, "setting %d changed nothing, or too much: loss %g", k, e.loss);
        CHECK(k != 4 || e.step == base.step, "levels");
        free(v.v);
    }
    d.objective = DPO_SFT;
    base = run_on(TINY, d, 0, NULL);
    d.min_snr = 1;
    e = run_on(TINY, d, 0, NULL);
    CHECK(e.loss < base.loss, "min-SNR weights: loss %g, without %g", e.loss, base.loss);
    free(w.v);
}

/* Single pictures: what was liked grows likelier. */
static void test_kto(void)
{
    dpo_train_desc d = small_run(4);
    dpo_progress   e;
    d.objective = DPO_KTO;
    d.beta = 2000;
    d.steps = 30;
    d.lr = 5e-3f;
    d.batch = 6;
    d.empty_prompts = 0;
    e = run_on(TINY, d, 1, NULL);
    CHECK(e.margin > 0 && e.implicit_acc > 0.6f && e.policy_l > e.reference_l - 1 && e.pairs == 30*12, "KTO: margin %g, accuracy %g", e.margin, e.implicit_acc);
    d.objective = DPO_DPO;
    {
        dpo_ctx *c = open_threads(1);
        CHECK(!dpo_train_begin(dpo_model_load(c, TINY, DPO_F32), shaped_pairs(c, 2, 1), &d) && strstr(why(c), "no rejected picture"), "%s", why(c));
        dpo_close(c);
    }
}

/* Held-out pairs: no prompt on both sides, the same answer each time, above one half after training. */
static void test_held(void)
{
    dpo_train_desc d = small_run(4);
    dpo_ctx       *c = open_threads(1);
    dpo_trainer   *t;
    dpo_held       before, again, after;
    int64_t        pairs;
    d.steps = 40;
    d.lr = 2e-3f;
    d.held_out = 0.4f;
    d.degrading_limit = 0.5f;
    t = dpo_train_begin(dpo_model_load(c, TINY, DPO_F32), shaped_pairs(c, 30, 0), &d);
    CHECK(t && dpo_train_held(t, &before) && dpo_train_held(t, &again), "%s", why(c));
    pairs = dpo_train_count(t);
    CHECK(before.pairs + pairs == 30 && before.pairs > 5 && before.pairs < 20, "%d of 30 held out", (int)before.pairs);
    CHECK(!memcmp(&before, &again, sizeof before) && before.accuracy == 0.5f, "held-out accuracy %g, again %g", before.accuracy, again.accuracy);
    while (dpo_train_step(t, NULL)) { }
    CHECK(dpo_train_held(t, &after) && after.accuracy > 0.7f && after.reference_w == before.reference_w && !after.degrading,
          "held-out accuracy %g after training", after.accuracy);
    CHECK(dpo_train_end(t), "%s", why(c));
    dpo_close(c);
}

/* What a micro-batch is made of, by its formulas: noise + offset a channel, noise that is shown, dropped captions, levels,
   crops; the winner's draws are the loser's. */
static void test_draws(void)
{
    dpo_ctx       *c = open_threads(1);
    dpo_train_desc d = small_run(2);
    dpo_trainer   *t;
    dpo_draw       e;
    int64_t        scope = dpo_scope(c), shape[3] = { 8, 8, 3 }, one[3] = { 1, 1, 3 };
    static float   noise[4*192], shown[4*192], x[4*192], y[4*192], z[4*3];
    int            empty = 0, flips = 0, total = 0;
    d.noise_offset = 0.25f;
    d.input_perturbation = 0.5f;
    d.levels = 4;
    d.empty_prompts = 0.3f;
    t = dpo_train_begin(dpo_model_load(c, TINY, DPO_F32), shaped_pairs(c, 9, 0), &d);
    CHECK(t, "%s", why(c));
    if (!t) { dpo_close(c); return; }
    dpoi_train_plan(t, &t->plan[0], 3, 1);
    CHECK(dpoi_train_gather(t, &t->plan[0], &e) && dpo_read(e.noise, noise) && dpo_read(e.shown, shown), "%s", why(c));
    {
        int64_t     n[1] = { 4 };
        int32_t     keys[4] = { 2, 3, 2, 3 };             /* second micro-batch of two: samples 2 and 3 of their step */
        dpo_tensor *k = dpo_tensor_from(c, DPO_I32, 1, n, keys);
        CHECK(dpo_read(dpo_randn(c, d.seed, DPOI_RANDOM_NOISE, 3, k, 3, shape), x) &&
              dpo_read(dpo_randn(c, d.seed, DPOI_RANDOM_OFFSET, 3, k, 3, one), z) &&
              dpo_read(dpo_randn(c, d.seed, DPOI_RANDOM_PERTURB, 3, k, 3, shape), y), "%s", why(c));
    }
    for (int i = 0; i < 4*192; i++) {
        CHECK_CLOSE(noise[i], x[i] + 0.25*z[i/192*3 + i%3], 1e-6);
        CHECK_CLOSE(shown[i], noise[i] + 0.5*y[i], 1e-6);
    }
    CHECK(!memcmp(noise, noise + 2*192, 2*192*4) && !memcmp(shown, shown + 2*192, 2*192*4), "winner and loser see different noise");
    for (int step = 0; step < 500; step++)
        for (int micro = 0; micro < 2; micro++) {
            dpoi_train_plan(t, &t->plan[0], step, micro);
            for (int b = 0; b < 2; b++, total++) {
                dpoi_seat *q = &t->plan[0].slot[b];
                empty += q->text == 0;
                flips += q->view[0].flip;
                if (q->t % 250 != 249 || q->t < 249 || q->t > 999 || q->view[0].flip != q->view[1].flip) empty = -10000;
            }
        }
    CHECK(abs(empty - 600) < 110 && abs(flips - 1000) < 120 && total == 2000, "of %d draws %d without caption, %d mirrored", total, empty, flips);
    dpo_scope_end(c, scope, NULL);
    dpo_train_end(t);
    dpo_close(c);
}

/* A step whose loss is not finite changes nothing and is said. */
static void test_left_out(void)
{
    dpo_ctx       *c = open_threads(1);
    dpo_model     *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_pairs     *p = dpo_pairs_new(c);
    dpo_train_desc d = small_run(2);
    dpo_progress   e;
    dpo_trainer   *t;
    dpo_image      a, b;
    numbers        before, after;
    if (dpo_image_new(c, 8, 8, &a) && dpo_image_new(c, 8, 8, &b)) {
        fill_picture(&a, 1, 0);
        fill_picture(&b, 2, 1);
        dpo_pairs_add(p, "x", &a, &b, 3e38f);
    }
    d.beta = 1e9f;
    t = dpo_train_begin(m, p, &d);
    before = weights_of(m);
    CHECK(dpo_train_step(t, &e) && e.left_out && e.skipped == 1, "a step that is not finite: %d skipped, loss %g: %s", (int)e.skipped, e.loss, why(c));
    after = weights_of(m);
    CHECK(same(before, after), "it changed weights");
    CHECK(dpo_train_end(t), "%s", why(c));
    free(before.v); free(after.v);
    dpo_close(c);
}

/* ---- a device that computes beside the host --------------------------------------------------------------------- */

/* The CPU, but figures come when they are taken and not before: each is a copy of what was there when it was sent. */
enum { TOLD = 16 };
static struct { int sent, most, all; dpo_progress e[TOLD]; int told, ahead, saved, stop; const char *folder; } beside;
static void *send_copy(void *self, const void *from, size_t bytes)
{
    void *p = malloc(bytes);
    (void)self;
    if (!p) return NULL;
    memcpy(p, from, bytes);
    beside.all++;
    if (++beside.sent > beside.most) beside.most = beside.sent;
    return p;
}
static int take_copy(void *self, void *sent, void *to, size_t bytes)
{
    (void)self;
    if (to) memcpy(to, sent, bytes);
    free(sent);
    beside.sent--;
    return DPO_OK;
}
static int tell(void *user, const dpo_progress *p)
{
    char path[128];
    (void)user;
    if (beside.told < TOLD) beside.e[beside.told] = *p;
    beside.told++;
    beside.ahead += beside.sent;          /* the next one is under way */
    if (beside.folder) {
        FILE *f;
        snprintf(path, sizeof path, "%s/checkpoint-%d/state.safetensors", beside.folder, (int)p->step);
        if ((f = fopen(path, "rb")) != NULL) { beside.saved++; fclose(f); }
    }
    return p->step == beside.stop;
}

/* Trains without waiting, on the CPU as it is or with figures that come late. */
static numbers told_late(int late, dpo_train_desc d, int hold)
{
    dpo_desc     desc;
    dpo_ctx     *c;
    dpo_model   *m;
    dpo_trainer *t;
    numbers      out;
    dpo_held     held;
    memset(&desc, 0, sizeof desc);
    memset(&beside.e, 0, sizeof beside.e);
    beside.sent = beside.most = beside.all = beside.told = beside.ahead = beside.saved = 0;
    desc.backend = dpo_cpu_open(NULL);
    if (late) { desc.backend->send = send_copy;  desc.backend->take = take_copy; }
    c = dpo_open(&desc);
    m = dpo_model_create(c, TINY, 3);
    d.on_step = tell;
    t = dpo_train_begin(m, some_pairs(c, 7), &d);
    while (dpo_train_step(t, NULL)) {
        if (!hold) continue;
        CHECK(dpo_train_held(t, &held) && beside.told == dpo_train_done(t), "%d of %d steps told before the held-out pairs", beside.told,
              (int)dpo_train_done(t));
    }
    CHECK(dpo_train_end(t) && beside.sent == 0, "training beside: %s, %d not taken", why(c), beside.sent);
    out = weights_of(m);
    dpo_close(c);
    return out;
}

/* Do two steps' figures agree, but for times? */
static int same_figures(const dpo_progress *a, const dpo_progress *b)
{
    return a->step == b->step && a->steps == b->steps && a->pairs == b->pairs && a->skipped == b->skipped && a->loss == b->loss &&
           a->implicit_acc == b->implicit_acc && a->policy_w == b->policy_w && a->policy_l == b->policy_l && a->reference_w == b->reference_w &&
           a->reference_l == b->reference_l && a->margin == b->margin && a->grad_norm == b->grad_norm && a->lr == b->lr &&
           a->left_out == b->left_out && a->encoded == b->encoded && a->cached == b->cached && a->degrading == b->degrading;
}

/* What is told late is what is told at once, in the same order; nothing of a run that stops is lost. */
static void test_late(void)
{
    for (int kind = 0; kind < 3; kind++) {                /* DPO, KTO, whose signs differ from step to step; held-out pairs */
        dpo_train_desc d = small_run(kind ? 0 : 3);
        dpo_progress   e[TOLD];
        numbers        x, y;
        d.steps = 6;
        d.lr_schedule = DPO_LR_LINEAR;
        d.objective = kind == 1 ? DPO_KTO : DPO_DPO;
        d.held_out = kind == 2 ? 0.3f : 0;
        x = told_late(0, d, kind == 2);
        memcpy(e, beside.e, sizeof e);
        y = told_late(1, d, kind == 2);
        CHECK(same(x, y) && beside.told == 6, "kind %d: other weights, %d steps told", kind, beside.told);
        CHECK(beside.most == 2 - (kind == 2) && beside.all == 5 && beside.ahead == (kind == 2 ? 0 : 4),
              "kind %d: %d figures sent, %d at once, %d times the next step was under way", kind, beside.all, beside.most, beside.ahead);
        for (int k = 0; k < 6; k++) CHECK(same_figures(&e[k], &beside.e[k]), "kind %d: step %d is told as %d, loss %g for %g", kind, k + 1,
                                          (int)beside.e[k].step, beside.e[k].loss, e[k].loss);
        free(x.v); free(y.v);
    }
}

/* A checkpoint comes after its steps were told; a stop one step later, which is told, too, and saved. */
static void test_late_checkpoints(void)
{
    char           folder[64];
    dpo_train_desc d = small_run(3);
    numbers        whole, half, rest;
    d.steps = 7;
    whole = told_late(0, d, 0);
    snprintf(folder, sizeof folder, FOLDER "/late-%llu", (unsigned long long)(dpo_seconds() * 1e6));
    beside.folder = d.output = folder;
    d.save_every = 2;
    d.resume = 1;
    beside.stop = 3;
    half = told_late(1, d, 0);
    CHECK(beside.told == 4 && beside.e[3].step == 4 && beside.saved == 0, "stopped: %d steps told, %d after their checkpoint", beside.told,
          beside.saved);
    beside.stop = 0;
    rest = told_late(1, d, 0);
    CHECK(beside.told == 3 && beside.e[0].step == 5 && beside.e[2].step == 7, "resumed: %d steps told from %d on", beside.told,
          (int)beside.e[0].step);
    CHECK(!same(whole, half) && same(whole, rest), "a run that was stopped and resumed with late figures differs");
    beside.folder = NULL;
    free(whole.v); free(half.v); free(rest.v);
}

/* Cancelled or out of memory at any point: what was told before stays in order, what was sent is taken or dropped. */
static int cancel_beside(void *user, const dpo_progress *p)
{
    tell(NULL, p);
    if (p->step == 2) dpo_cancel((dpo_ctx *)user);
    return 0;
}
static void test_late_failures(void)
{
    for (int closes = 0; closes < 2; closes++) {
        dpo_train_desc d = small_run(2);
        dpo_desc       desc;
        dpo_ctx       *c;
        dpo_trainer   *t;
        memset(&desc, 0, sizeof desc);
        desc.backend = dpo_cpu_open(NULL);
        desc.backend->send = send_copy;
        desc.backend->take = take_copy;
        beside.told = beside.sent = 0;
        c = dpo_open(&desc);
        d.steps = 6;
        d.on_step = cancel_beside;
        d.user = c;
        t = dpo_train_begin(dpo_model_create(c, TINY, 3), some_pairs(c, 7), &d);
        while (dpo_train_step(t, NULL)) { }
        CHECK(dpo_status(c) == DPO_CANCELLED && beside.told == 2 && beside.sent == 1, "cancelled: %s, %d told, %d sent", why(c), beside.told,
              beside.sent);
        if (!closes) CHECK(!dpo_train_end(t) && beside.told == 3 && beside.e[2].step == 3, "%d steps told in the end", beside.told);
        dpo_close(c);
        CHECK(beside.sent == 0, "%d figures were left over", beside.sent);
    }
}

/* A team of two contexts in two threads, whose sums meet here.  later: sums are only noted, with a copy of what they were
   given, and done by the wait, in whose time nobody may have touched the numbers. */
#ifdef DPOI_THREADS
enum { NOTES = 64 };
typedef struct { dpoi_lock lock; dpoi_cond cond; float sum[1 << 16]; int came, round, failed; } meeting;
typedef struct { float *data, *copy; int64_t count; } note;
typedef struct {
    dpo_train_desc d; numbers w; dpo_progress last; meeting *at;
    dpo_trainer *t; note later[NOTES]; int notes, most, beside, touched; } member;

static int meet(void *user, void *data, int64_t count, int dtype, int op)
{
    member  *m = (member *)user;
    meeting *a = m->at;
    float   *x = (float *)data;
    int      round;
    if (dtype != DPO_F32 || op != DPO_REDUCE_SUM || count > 1 << 16) return 0;
    dpoi_lock_take(&a->lock);
    round = a->round;
    for (int64_t i = 0; i < count; i++) a->sum[i] = (a->came ? a->sum[i] : 0) + x[i];
    if (++a->came == 2) { a->came = 0; a->round++; dpoi_cond_wake(&a->cond); }
    else while (a->round == round) dpoi_cond_wait(&a->cond, &a->lock);
    memcpy(x, a->sum, (size_t)count * sizeof *x);
    /* the sum must not be overwritten before both have it: a second meeting */
    round = a->round;
    if (++a->came == 2) { a->came = 0; a->round++; dpoi_cond_wake(&a->cond); }
    else while (a->round == round) dpoi_cond_wait(&a->cond, &a->lock);
    dpoi_lock_give(&a->lock);
    return 1;
}

/* beside: backward was still on its way. */
static int meet_later(void *user, void *data, int64_t count, int dtype, int op)
{
    member *m = (member *)user;
    note   *n = &m->later[m->notes];
    if (m->notes == NOTES || dtype != DPO_F32 || op != DPO_REDUCE_SUM) return 0;
    m->notes++;
    n->data = (float *)data;
    n->count = count;
    n->copy = (float *)malloc((size_t)count * sizeof(float));
    memcpy(n->copy, data, (size_t)count * sizeof(float));
    m->beside += m->t && m->t->c->row_count > 0;
    if (m->notes > m->most) m->most = m->notes;
    return 1;
}

static int meet_wait(void *user)
{
    member *m = (member *)user;
    int     ok = 1;
    for (int i = 0; i < m->notes; i++) {
        note *n = &m->later[i];
        m->touched += memcmp(n->data, n->copy, (size_t)n->count * sizeof(float)) != 0;
        free(n->copy);
        ok = ok && meet(user, n->data, n->count, DPO_F32, DPO_REDUCE_SUM);
    }
    m->notes = 0;
    return ok;
}

static void member_run(void *arg)
{
    member    *m = (member *)arg;
    dpo_ctx   *c = open_threads(1);
    dpo_model *model = dpo_model_load(c, TINY, DPO_F32);
    m->d.team.user = m;
    m->t = dpo_train_begin(model, shaped_pairs(c, 9, m->d.objective == DPO_KTO), &m->d);
    while (dpo_train_step(m->t, &m->last)) { }
    CHECK(dpo_train_end(m->t), "a team: %s", why(c));
    m->w = weights_of(model);
    dpo_close(c);
}
#endif

/* The same global batch on one and on two processes gives the same training to rounding. */
static void test_team(void)
{
#ifdef DPOI_THREADS
    for (int k = 0; k < 4; k++) {
        int               kto = k & 1, later = k >> 1;
        static meeting    a;
        static member     m[2];
        dpoi_thread_start s[2];
        dpoi_thread       th[2];
        dpo_train_desc    d = small_run(kto ? 3 : 0);
        numbers           alone;
        dpo_progress      e;
        double            off = 0, size = 0;
        if (kto) { d.objective = DPO_KTO; d.accumulation = 1; d.batch = 4; }
        else d.lr = 1e-4f;
        e = run_on(TINY, d, kto, &alone);
        memset(&a, 0, sizeof a);
        memset(m, 0, sizeof m);
        dpoi_lock_open(&a.lock);
        dpoi_cond_open(&a.cond);
        if (kto) d.batch = 2;
        else d.accumulation = 1;
        d.team.count = 2;
        d.team.reduce = later ? meet_later : meet;
        d.team.wait = later ? meet_wait : NULL;
        for (int i = 0; i < 2; i++) {
            m[i].d = d;
            m[i].d.team.index = i;
            m[i].at = &a;
            s[i].fn = member_run;
            s[i].arg = &m[i];
        }
        dpoi_thread_open(&th[0], &s[0]);
        dpoi_thread_open(&th[1], &s[1]);
        for (int i = 0; i < 2; i++) dpoi_thread_join(&th[i]);
        CHECK(same(m[0].w, m[1].w), "two processes hold different weights");
        for (int i = 0; i < 2 && later; i++)
            CHECK(!m[i].touched && (kto || (m[i].most > 1 && m[i].beside >= (int)d.steps - 1)), "sums later: %d at once, %d beside "
                  "backward, %d touched before the wait", m[i].most, m[i].beside, m[i].touched);
        for (int64_t i = 0; i < alone.n && m[0].w.n == alone.n; i++) { off += fabs(alone.v[i] - m[0].w.v[i]); size += fabs(alone.v[i]); }
        CHECK(m[0].w.n == alone.n && off < 1e-4*size, "kto %d: two processes are %g off, of %g", kto, off, size);
        CHECK(fabs(e.loss - m[0].last.loss) < 1e-3*fabs(e.loss) && m[0].last.loss == m[1].last.loss && m[1].last.pairs == e.pairs &&
              fabs(e.implicit_acc - m[0].last.implicit_acc) < 1e-6, "kto %d: loss %g, alone %g", kto, m[0].last.loss, e.loss);
        free(alone.v); free(m[0].w.v); free(m[1].w.v);
        dpoi_cond_close(&a.cond);
        dpoi_lock_close(&a.lock);
    }
#else
    SKIP("a team of two: no threads");
#endif
}

/* What is refused, and by which word it says why. */
static void test_refused(void)
{
    char     folder[96];
    dpo_ctx *c = open_threads(1);
    dpo_model *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_train_desc d = small_run(2);
    for (int k = 0; k < 12; k++) {
        static const char *const words[12] = { "safeguard", "min-SNR", "label smoothing", "reference ahead", "levels", "multiples of",
                                               "team", "held out", "out of range", "KTO alone", "no VAE", "timesteps" };
        dpo_train_desc x = d;
        dpo_model     *of = m;
        switch (k) {
        case 0: x.objective = DPO_SFT; x.safeguard = 0.5f; break;
        case 1: x.min_snr = 5; break;
        case 2: x.kind = DPO_PREF_IPO; x.smoothing = 0.1f; break;
        case 3: x.ahead = 1; break;
        case 4: x.levels = 4; x.t_limit = 100; break;
        case 5: x.width = 15; of = dpo_model_load(c, LATENTS, DPO_F32); break;
        case 6: x.team.count = 2; break;
        case 7: x.held_out = 0.9999f; x.rank = 0; break;
        case 8: x.noise_offset = NAN; break;
        case 9: x.desirable_weight = 2; break;
        case 10: x.drop_encoders = 1; break;
        default: x.t_limit = 5000; break;
        }
        CHECK(!dpo_train_begin(of, some_pairs(c, 4), &x) && strstr(why(c), words[k]), "refusal %d: %s", k, why(c));
        dpo_clear_error(c);
    }
    d.output = fresh_folder(folder, sizeof folder, "refused");
    d.resume = 1;
    CHECK(dpo_train(m, some_pairs(c, 4), &d), "%s", why(c));
    for (int k = 0; k < 4; k++) {
        static const char *const words[4] = { "beta", "data", "model", "lr" };
        dpo_train_desc x = d;
        dpo_model     *of = m;
        if (k == 0) x.beta = 5;
        if (k == 2) of = dpo_model_create(c, TINY, 99);
        if (k == 3) x.lr *= 2;
        CHECK(!dpo_train_begin(of, some_pairs(c, k == 1 ? 5 : 4), &x) && strstr(why(c), "another run: its") && strstr(why(c), words[k]),
              "another run %d: %s", k, why(c));
        dpo_clear_error(c);
    }
    dpo_close(c);
}

/* KTO's batches have both kinds; an epoch has each picture once, or the share that was asked for. */
static void test_mix(void)
{
    for (int share = 0; share < 2; share++) {
        dpo_ctx       *c = open_threads(1);
        dpo_model     *m = dpo_model_load(c, TINY, DPO_F32);
        dpo_pairs     *p = dpo_pairs_new(c);
        dpo_train_desc d = small_run(2);
        dpo_trainer   *t;
        dpo_image      x;
        int            times[20], liked = 0, least = 99;
        d.objective = DPO_KTO;
        d.batch = 5;
        d.desirable_weight = 0.5f;
        d.undesirable_weight = 2;
        d.positive_ratio = share ? 0.6f : 0;
        for (int i = 0; i < 20 && dpo_image_new(c, 8, 8, &x); i++) {      /* 16 liked, 4 not */
            fill_picture(&x, i, i % 5 == 2);
            dpo_pairs_add_single(p, "x", &x, i % 5 != 2, 1);
            dpo_image_free(c, &x);
        }
        t = dpo_train_begin(m, p, &d);
        CHECK(t && t->items == 20 && t->likes == 16, "%s", why(c));
        for (int epoch = 0; epoch < 3 && t; epoch++) {
            memset(times, 0, sizeof times);
            liked = 0;
            for (int b = 0; b < 4; b++) {
                int here = 0;
                for (int k = 0; k < 5; k++) {
                    int64_t i = dpoi_train_pick(t, epoch*4 + b, k);
                    times[i]++;
                    here += i < 16;
                }
                liked += here;
                if (5 - here < least) least = 5 - here;
            }
            CHECK(liked == (share ? 12 : 16) && least >= 1, "share %d: %d liked of 20, %d others in a batch at least", share, liked, least);
            for (int i = 0; i < 20 && !share; i++) CHECK(times[i] == 1, "picture %d comes %d times", i, times[i]);
            for (int i = 0; i < 20 && share; i++) CHECK(times[i] <= 2 && (i < 16 || times[i]), "picture %d comes %d times", i, times[i]);
        }
        dpoi_train_plan(t, &t->plan[0], 0, 0);
        for (int b = 0; b < 5; b++) {
            const dpoi_seat *s = &t->plan[0].slot[b];
            CHECK(dpoi_train_weight(t, s) == (dpoi_entry_liked(&t->entry[s->entry], s->which) > 0 ? 0.5f : 2.0f), "weight of slot %d", b);
        }
        dpo_train_end(t);
        dpo_close(c);
    }
}

/* Only the last two checkpoints stay, and what a kill left goes. */
static void test_keep(void)
{
    char           folder[96], path[160];
    dpo_ctx       *c = open_threads(1);
    dpo_train_desc d = small_run(2);
    d.output = fresh_folder(folder, sizeof folder, "keep");
    d.save_every = 1;
    d.keep = 2;
    snprintf(path, sizeof path, "%s/checkpoint-9.part", folder);
    CHECK(dpo_make_folder(c, path) && put(path, "state.safetensors", "half"), "%s", why(c));
    CHECK(dpo_train(dpo_model_load(c, TINY, DPO_F32), some_pairs(c, 4), &d), "%s", why(c));
    for (int k = 1; k <= 4; k++) {
        snprintf(path, sizeof path, "%s/checkpoint-%d", folder, k);
        CHECK(dpoi_is_folder(path) == (k > 2), "checkpoint %d of 4", k);
    }
    snprintf(path, sizeof path, "%s/checkpoint-9.part", folder);
    CHECK(!dpoi_is_folder(path), "what a kill left is still there");
    dpo_close(c);
}

/* Every objective makes its own loss smaller on one pair that it sees again and again. */
static void test_objectives(void)
{
    for (int kind = -1; kind <= DPO_PREF_IPO; kind++) {
        dpo_train_desc d = small_run(4);
        dpo_progress   e, first;
        dpo_ctx       *c = open_threads(2);
        dpo_trainer   *t;
        double         sum = 0;
        d.steps = 40;
        d.lr = 5e-3f;
        if (kind < 0) d.objective = DPO_SFT; else d.kind = kind;
        t = dpo_train_begin(dpo_model_create(c, TINY, 3), some_pairs(c, 1), &d);
        memset(&first, 0, sizeof first);
        dpo_train_step(t, &first);
        while (dpo_train_step(t, &e)) if (e.step > 30) sum += e.loss / 10;
        CHECK(dpo_train_end(t) && sum < first.loss, "kind %d: loss from %g to %g: %s", kind, first.loss, sum, why(c));
        dpo_close(c);
    }
}

/* Peak and held bytes of a few steps; held after the first and after the last. */
static void footprint(dpo_backend *b, int checkpoint, size_t out[3])
{
    dpo_desc       desc;
    dpo_ctx       *c;
    dpo_train_desc d = small_run(0);
    dpo_trainer   *t;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    desc.backend = b;
    c = dpo_open(&desc);
    d.checkpoint = checkpoint;
    t = dpo_train_begin(dpo_model_create(c, TINY, 3), some_pairs(c, 7), &d);
    dpo_train_step(t, NULL);
    out[0] = dpo_memory(c);
    while (dpo_train_step(t, NULL)) { }
    out[1] = dpo_memory(c);
    out[2] = dpo_memory_peak(c, 0);
    CHECK(dpo_train_end(t), "%s", why(c));
    dpo_close(c);
}

/* The dry backend says what a run will take, to the byte; after its first step a run takes nothing new. */
static void test_memory(void)
{
    dpo_desc     d;
    dpo_backend *cpu;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    cpu = dpo_cpu_open(&d);
    for (int checkpoint = 0; checkpoint < 2; checkpoint++) {
        size_t real[3], dry[3];
        footprint(NULL, checkpoint, real);
        footprint(dpo_dry_open(cpu), checkpoint, dry);
        CHECK(real[0] == real[1], "%zu bytes held after one step, %zu after four", real[0], real[1]);
        CHECK(!memcmp(real, dry, sizeof real), "%zu bytes at most, the dry run said %zu", real[2], dry[2]);
    }
    cpu->close(cpu->self);
}

/* One step of SD1.5's adapters on pairs of one prompt at 512 pixels, as a trainer takes it. */
static void full_size_step(dpo_net *unet, dpo_optim *o)
{
    dpo_ctx    *c = unet->c;
    int64_t     shape[4] = { 2, 64, 64, 4 }, words[3] = { 2, 77, 768 }, two = 2, scope = dpo_scope(c), inner;
    dpo_unet_in in, frozen;
    dpo_tensor *target = dpo_tensor_new(c, DPO_F32, 4, shape), *error[2];
    memset(&in, 0, sizeof in);
    in.x = dpo_tensor_new(c, DPO_F32, 4, shape);
    in.t = dpo_tensor_new(c, DPO_F32, 1, &two);
    in.emb = dpo_tensor_new(c, DPO_F32, 3, words);
    in.checkpoint = 1;
    frozen = in;
    frozen.checkpoint = 0;
    frozen.adapters_off = 1;
    dpo_no_grad(c, 1);
    inner = dpo_scope(c);
    error[0] = dpo_scope_end(c, inner, dpo_mse(c, dpo_last(dpo_unet(unet, &frozen)), target));
    dpo_no_grad(c, -1);
    error[1] = dpo_mse(c, dpo_unet(unet, &in), target);
    dpo_backward(dpo_preference_loss(c, error[1], error[0], NULL, DPO_PREF_SIGMOID, 5000, 0, NULL));
    dpo_optim_step(o, 1e-6f);
    dpo_scope_end(c, scope, NULL);
}

/* At full size, where idle memory is cut and joined in more ways, all that a step needs is there after the first. */
static void test_full_size_memory(void)
{
    static const char unet[] = "{\"_class_name\": \"UNet2DConditionModel\", \"cross_attention_dim\": 768, "
                               "\"attention_head_dim\": 8, \"block_out_channels\": [320, 640, 1280, 1280]}";
    dpo_desc     d;
    dpo_backend *cpu;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    cpu = dpo_cpu_open(&d);
    for (int dtype = DPO_F32; dtype <= DPO_BF16; dtype++) {
        dpo_ctx         *c = (d.backend = dpo_dry_open(cpu), dpo_open(&d));
        dpo_net         *n = dpoi_net_plan(c, &dpoi_unet_kind, unet, "a UNet", dtype);
        dpo_adapter_desc a;
        dpo_optim       *o;
        dpo_tensor     **params;
        int              count = 0;
        size_t           held;
        memset(&a, 0, sizeof a);
        a.rank = 16;
        if (n) n = dpoi_net_realise(n, NULL);
        CHECK(n && dpo_adapter_new(n, &a), "%s", why(c));
        params = n ? dpo_adapter_params(n, &count) : NULL;
        o = dpo_adamw_new(c, params, count, NULL);
        for (int i = 0; i < count; i++) CHECK(dpoi_grad_new(params[i], DPO_F32, NULL), "%s", why(c));
        if (n) full_size_step(n, o);
        held = dpo_memory(c);
        for (int k = 0; k < 3 && n; k++) full_size_step(n, o);
        CHECK(!dpo_error(c) && held > (size_t)1 << 31, "%zu bytes held: %s", held, why(c));
        CHECK(held == dpo_memory(c), "%zu bytes held after one step, %zu after four", held, dpo_memory(c));
        dpo_close(c);
    }
    cpu->close(cpu->self);
}

/* An allocator that asks the context to stop at one of its calls, which may be anywhere inside a step. */
typedef struct { long calls, stop_at; dpo_ctx *c; } stopper;

static void *stopping(void *user, void *old, size_t old_size, size_t new_size)
{
    stopper *s = (stopper *)user;
    (void)old_size;
    if (!new_size) { free(old); return NULL; }
    if (s->c && ++s->calls == s->stop_at) dpo_cancel(s->c);
    return realloc(old, new_size);
}

/* Cancelled anywhere, a run either goes on to the same weights or says that it cannot. */
static void test_cancel(void)
{
    numbers whole = trained(1, small_run(2), NULL);
    int     went_on = 0, refused = 0;
    for (long at = 1; at < 4000; at += 97) {
        stopper        s = { 0, 0, NULL };
        dpo_desc       desc;
        dpo_ctx       *c;
        dpo_model     *m;
        dpo_trainer   *t;
        dpo_train_desc d = small_run(2);
        memset(&desc, 0, sizeof desc);
        desc.alloc = stopping;
        desc.user = &s;
        desc.threads = 1;
        c = dpo_open(&desc);
        m = dpo_model_create(c, TINY, 3);
        t = dpo_train_begin(m, some_pairs(c, 7), &d);
        s.stop_at = at;
        s.c = c;
        while (dpo_train_step(t, NULL) || dpo_status(c) == DPO_CANCELLED) dpo_clear_error(c);
        if (dpo_status(c) == DPO_OK && s.calls >= at) {
            numbers now = weights_of(m);
            CHECK(same(whole, now), "cancelled at allocation %ld, a run ended elsewhere", at);
            free(now.v);
            went_on++;
        } else if (dpo_status(c) != DPO_OK) {
            CHECK(strstr(why(c), "load a checkpoint"), "cancelled at allocation %ld: %s", at, why(c));
            refused++;
        }
        dpo_close(c);
        if (s.calls < at) break;
    }
    CHECK(went_on > 3, "%d cancelled runs went on, %d were refused", went_on, refused);
    free(whole.v);
}

/* ---- failing allocations ---------------------------------------------------------------------------------------- */

typedef struct { long calls, fail_at; size_t live; } allocator;

static void *counted(void *user, void *old, size_t old_size, size_t new_size)
{
    allocator *a = (allocator *)user;
    void      *p;
    if (!new_size) {
        if (old) a->live -= old_size;
        free(old);
        return NULL;
    }
    if (++a->calls == a->fail_at) return NULL;
    if (!(p = realloc(old, new_size))) return NULL;
    a->live += new_size - (old ? old_size : 0);
    return p;
}

/* A short run from nothing to a picture.  Returns the status; *model_at says at which call the model was there. */
static int short_run(allocator *a, long *model_at, uint8_t *rgb)
{
    const char      *prompt = "thing";
    dpo_desc         d;
    dpo_ctx         *c;
    dpo_model       *m;
    dpo_train_desc   t = small_run(2);
    dpo_sample_desc  s;
    int              status;
    memset(&d, 0, sizeof d);
    memset(&s, 0, sizeof s);
    d.alloc = counted;
    d.user = a;
    d.threads = 1;
    if (!(c = dpo_open(&d))) return DPO_OUT_OF_MEMORY;
    m = dpo_model_create(c, TINY, 3);
    if (model_at) *model_at = a->calls;
    t.steps = 2;
    t.batch = t.accumulation = 1;
    t.width = t.height = 4;               /* the model takes any even size, and this one takes the least time */
    t.average = 0.5f;
    s.n = 1;
    s.prompts = &prompt;
    s.steps = 1;
    s.guidance = 2;
    s.width = s.height = 4;
    if (dpo_train(m, some_pairs(c, 2), &t)) dpo_sample(m, &s, rgb);
    status = dpo_status(c);
    dpo_close(c);
    return status;
}

static void test_allocations(int every)
{
    allocator a = { 0, 0, 0 };
    uint8_t   want[4*4*3], got[4*4*3];
    long      model = 0, total;
    int       bad = 0, tried = 0;
    CHECK(short_run(&a, &model, want) == DPO_OK && a.live == 0, "the run itself: %ld bytes left", (long)a.live);
    total = a.calls;
    for (long k = 1; k <= total; k += every || k >= model ? 1 : 11) {
        int status;
        memset(&a, 0, sizeof a);
        a.fail_at = k;
        memset(got, 0, sizeof got);
        status = short_run(&a, NULL, got);
        tried++;
        /* Few allocations may fail without harm: then the result must be the usual one. */
        if (a.live || (status != DPO_OUT_OF_MEMORY && (status != DPO_OK || memcmp(got, want, sizeof got))))
            if (bad++ < 5) printf("allocation %ld of %ld: status %d, %ld bytes left\n", k, total, status, (long)a.live);
    }
    CHECK(!bad, "%d of %d failing allocations ended badly", bad, tried);
}

/* The same of a model of latents in buckets with a cache's folder, held-out pairs, a reference ahead, a checkpoint. */
static int short_latents(allocator *a, const char *folder)
{
    char           cache[120];
    dpo_desc       d;
    dpo_ctx       *c;
    dpo_train_desc t = small_run(0);
    dpo_trainer   *r;
    dpo_model     *m;
    dpo_held       held;
    int            status;
    memset(&d, 0, sizeof d);
    d.alloc = counted;
    d.user = a;
    d.threads = 1;
    if (!(c = dpo_open(&d))) return DPO_OUT_OF_MEMORY;
    snprintf(cache, sizeof cache, "%s/cache", folder);
    t.steps = t.batch = t.accumulation = 1;
    t.width = t.height = 16;
    t.bucket_step = 8;
    t.ahead = 1;
    t.held_out = 0.4f;
    t.optimizer = DPO_ADAMW8;
    t.cache_folder = cache;
    t.output = folder;
    t.keep = 1;
    t.note = "a note";
    t.rest_encoders = 1;
    m = dpo_model_load(c, LATENTS, DPO_F32);
    r = dpo_train_begin(m, shaped_pairs(c, 6, 0), &t);
    if (dpo_train_step(r, NULL)) dpo_train_held(r, &held);
    if (dpo_train_end(r)) dpo_model_vae(m);               /* which reads it again */
    status = dpo_status(c);
    dpo_close(c);
    return status;
}

static void test_more_allocations(int every)
{
    allocator a = { 0, 0, 0 };
    char      folder[96];
    long      total, step;
    int       bad = 0, tried = 0;
    fresh_folder(folder, sizeof folder, "allocations");
    for (int k = 0; k < 2; k++) {         /* the second finds the cache full */
        memset(&a, 0, sizeof a);
        CHECK(short_latents(&a, folder) == DPO_OK && a.live == 0, "the run itself: %ld bytes left", (long)a.live);
    }
    total = a.calls;
    step = every ? 1 : total / 80 + 1;
    for (long k = 1; k <= total; k += step) {
        int status;
        memset(&a, 0, sizeof a);
        a.fail_at = k;
        status = short_latents(&a, folder);
        tried++;
        if (a.live || (status != DPO_OUT_OF_MEMORY && status != DPO_OK))
            if (bad++ < 5) printf("latents: allocation %ld of %ld: status %d, %ld bytes left\n", k, total, status, (long)a.live);
    }
    CHECK(!bad, "latents: %d of %d failing allocations ended badly", bad, tried);
}

int main(int argc, char **argv)
{
    dpo_ctx *c = open_threads(2);
    CHECK(dpo_make_folder(c, TINY) && make(c, TINY), "%s", why(c));
    test_schedules(c);
    test_samplers(c);
    test_configs(c);
    test_images(c);
    test_losses(c);
    test_adamw(c);
    test_rates();
    test_single_losses(c);
    test_safeguard(c);
    test_adamw8(c);
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
    test_pairs();
    test_threads();
    test_two_contexts();
    test_resume();
    test_limits();
    test_sampling();
    test_objectives();
    test_latents();
    test_ahead();
    test_settings();
    test_kto();
    test_held();
    test_draws();
    test_left_out();
    test_late();
    test_late_checkpoints();
    test_late_failures();
    test_team();
    test_mix();
    test_refused();
    test_keep();
    test_memory();
    test_full_size_memory();
    test_cancel();
    test_allocations(argc > 1 && !strcmp(argv[1], "every"));
    test_more_allocations(argc > 1 && !strcmp(argv[1], "every"));
    return test_report();
}
