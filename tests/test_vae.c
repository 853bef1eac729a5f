/* test_vae.c - the VAE: what its configuration says, files of every naming, gradients, recomputation, tiles, memory.
   Whether it computes what diffusers computes is build/parity's to say (tests/golden/latents).

   build   cc -O2 tests/test_vae.c -o build/test_vae -lm -lpthread
   run     build/test_vae [every]        from the project's folder; every: let each allocation fail, not one in some */
#define main tiny_model_main
#include "tiny_model.c"
#undef main
#include "dpo_test.h"
#include "test_context.h"
#include "failing_alloc.h"

#define FOLDER "build/vae"
#define TINY   FOLDER "/tiny"

#define TWO_DOWN  "\"down_block_types\": [\"DownEncoderBlock2D\", \"DownEncoderBlock2D\"]"
#define TWO_UP    "\"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\"]"
#define TWO       "\"block_out_channels\": [8, 12], \"norm_num_groups\": 4, " TWO_DOWN ", " TWO_UP

static const char LATENT_INDEX[] = "{\"_class_name\": \"StableDiffusionPipeline\", "
    "\"scheduler\": [\"diffusers\", \"DDIMScheduler\"], \"text_encoder\": [\"transformers\", \"CLIPTextModel\"], "
    "\"tokenizer\": [\"transformers\", \"CLIPTokenizer\"], \"unet\": [\"diffusers\", \"UNet2DConditionModel\"], "
    "\"vae\": [\"diffusers\", \"AutoencoderKL\"]}\n";
static const char LATENT_UNET[] = "{\"sample_size\": 8, \"in_channels\": 4, \"out_channels\": 4, "
    "\"block_out_channels\": [8], \"layers_per_block\": 1, \"down_block_types\": [\"CrossAttnDownBlock2D\"], "
    "\"up_block_types\": [\"CrossAttnUpBlock2D\"], \"cross_attention_dim\": 16, \"attention_head_dim\": 2, "
    "\"norm_num_groups\": 4}\n";

/* vae/config.json of Stable Diffusion 1.5. */
static const char SD_VAE[] = "{\"_class_name\": \"AutoencoderKL\", \"_diffusers_version\": \"0.6.0\", "
    "\"act_fn\": \"silu\", \"block_out_channels\": [128, 256, 512, 512], \"down_block_types\": [\"DownEncoderBlock2D\", "
    "\"DownEncoderBlock2D\", \"DownEncoderBlock2D\", \"DownEncoderBlock2D\"], \"in_channels\": 3, "
    "\"latent_channels\": 4, \"layers_per_block\": 2, \"norm_num_groups\": 32, \"out_channels\": 3, "
    "\"sample_size\": 512, \"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\", \"UpDecoderBlock2D\", "
    "\"UpDecoderBlock2D\"]}\n";

/* ---- helpers ---------------------------------------------------------------------------------------------------- */

static dpo_tensor *numbers(dpo_ctx *c, int64_t n, int64_t h, int64_t w, int64_t channels, uint64_t seed)
{
    int64_t     shape[4];
    dpo_tensor *x;
    float      *v;
    shape[0] = n; shape[1] = h; shape[2] = w; shape[3] = channels;
    if (!(x = dpo_tensor_new(c, DPO_F32, 4, shape))) return NULL;
    v = (float *)calloc((size_t)dpo_count(x), sizeof *v);
    for (int64_t i = 0; i < dpo_count(x); i++) v[i] = (float)test_normal(&seed);
    dpo_write(x, v);
    free(v);
    return x;
}

/* The configurations of a model of latents. */
static void put_model(const char *folder, const char *index, const char *unet, const char *vae)
{
    static const char *const parts[] = { "unet", "vae", "text_encoder", "tokenizer", "scheduler" };
    dpo_ctx *c = open_plain();
    char     path[256];
    for (int i = 0; i < 5; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, parts[i]);
        dpo_make_folder(c, path);
    }
    put(folder, "model_index.json", index);
    put(folder, "scheduler/scheduler_config.json", SCHEDULE);
    put(folder, "unet/config.json", unet);
    put(folder, "vae/config.json", vae);
    put(folder, "text_encoder/config.json", TEXT);
    put(folder, "tokenizer/tokenizer_config.json", TOKENS);
    put_vocabulary(folder);
    dpo_close(c);
}

/* A model with random weights and that VAE; NULL: two levels of one layer. */
static dpo_model *make_model(dpo_ctx *c, const char *folder, const char *vae)
{
    put_model(folder, LATENT_INDEX, LATENT_UNET, vae ? vae : "{" TWO ", \"layers_per_block\": 1}");
    return dpo_model_create(c, folder, 4);
}

/* The loss that gives gradients to look at: sum of y*w, w random. */
static dpo_tensor *weighed(dpo_ctx *c, dpo_tensor *y, uint64_t seed)
{
    dpo_tensor *w = y ? numbers(c, y->shape[0], y->shape[1], y->shape[2], y->shape[3], seed) : NULL;
    return dpo_sum(c, dpo_binary(c, DPO_MUL, y, w), -1);
}

/* ---- files and configurations ----------------------------------------------------------------------------------- */

static void test_round_trip(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL), *again;
    dpo_tensor *x = numbers(c, 2, 12, 10, 3, 1), *z, *logvar, *y;
    dpo_model_info d = dpo_model_describe(m);
    z = dpo_encode_images(m, x, &logvar);
    y = dpo_decode_latents(m, z);
    CHECK(z && z->shape[1] == 6 && z->shape[2] == 5 && z->shape[3] == 4, "encoding: %s", why(c));
    CHECK(y && y->shape[1] == 12 && y->shape[2] == 10 && y->shape[3] == 3, "decoding: %s", why(c));
    CHECK(d.factor == 2 && d.size == 16 && d.channels == 4 && fabs(d.latent_scale - 0.18215) < 1e-7, "describe");
    CHECK(dpo_model_save(m, FOLDER "/saved", DPO_F32), "saving: %s", why(c));
    again = dpo_model_load(c, FOLDER "/saved", DPO_F32);
    CHECK(dpo_model_vae(again) && dpo_model_vae(again) != dpo_model_vae(m), "loading: %s", why(c));
    CHECK(difference(dpo_encode_images(again, x, NULL), z) == 0, "a saved encoder differs");
    CHECK(difference(dpo_decode_latents(again, z), y) == 0, "a saved decoder differs");
    again = dpo_model_load(c, FOLDER "/saved", DPO_BF16);
    CHECK(dpo_net_param(dpo_model_vae(again), "encoder.conv_in.weight")->dtype == DPO_BF16, "frozen weights' type");
    CHECK(difference(dpo_decode_latents(again, z), y) < 0.1, "weights in BF16 are far off");
    CHECK(dpo_model_save(again, FOLDER "/saved", DPO_F16), "saving into its own folder: %s", why(c));
    CHECK(difference(dpo_decode_latents(dpo_model_load(c, FOLDER "/saved", DPO_F32), z), y) < 0.1, "F16 is far off");
    CHECK(!logged[0] && !dpo_error(c), "something was logged: %s", logged);
    dpo_close(c);
}

/* Shapes tell which values missing fields took. */
static void check_shape(dpo_net *vae, const char *name, int64_t a, int64_t b)
{
    dpo_tensor *t = dpo_net_param(vae, name);
    CHECK(t && t->shape[0] == a && t->shape[t->rank - 1] == b, "%s is not [%d,..,%d]", name, (int)a, (int)b);
}

static void test_defaults(void)
{
    dpo_ctx   *c = open_plain();
    dpo_model *m = make_model(c, FOLDER "/defaults", "{}");
    dpo_net   *vae = dpo_model_vae(m);
    int        n;
    dpo_net_params(vae, &n);
    check_shape(vae, "encoder.conv_in.weight", 64, 3);
    check_shape(vae, "encoder.conv_out.weight", 8, 64);
    check_shape(vae, "quant_conv.weight", 8, 8);
    check_shape(vae, "post_quant_conv.weight", 4, 4);
    check_shape(vae, "decoder.mid_block.attentions.0.to_out.0.weight", 64, 64);
    CHECK(!dpo_net_param(vae, "encoder.down_blocks.0.resnets.1.conv1.weight"), "layers_per_block is not 1");
    CHECK(dpo_net_param(vae, "decoder.up_blocks.0.resnets.1.conv1.weight") != NULL, "the decoder has a layer more");
    CHECK(!dpo_net_param(vae, "encoder.down_blocks.0.downsamplers.0.conv.weight"), "one level halves nothing");
    CHECK(dpo_model_describe(m).factor == 1 && n == 92, "%d tensors of a VAE without a configuration", n);
    m = make_model(c, FOLDER "/bare", "{" TWO ", \"use_quant_conv\": false, \"use_post_quant_conv\": false, "
                   "\"mid_block_add_attention\": false, \"act_fn\": \"swish\", \"latents_mean\": null, "
                   "\"shift_factor\": null, \"scaling_factor\": 0.5}");
    vae = dpo_model_vae(m);
    CHECK(vae && !dpo_net_param(vae, "quant_conv.weight") && !dpo_net_param(vae, "post_quant_conv.weight")
          && !dpo_net_param(vae, "encoder.mid_block.attentions.0.to_q.weight"), "parts that were turned off: %s", why(c));
    CHECK(dpo_model_describe(m).latent_scale == 0.5f, "scaling_factor");
    CHECK(dpo_decode_latents(m, dpo_encode_images(m, numbers(c, 1, 4, 6, 3, 1), NULL)) != NULL, "%s", why(c));
    dpo_close(c);
}

static void refuse_folder(const char *what, const char *folder, const char *says)
{
    dpo_ctx *c = open_plain();
    CHECK(!dpo_model_create(c, folder, 1), "%s was accepted", what);
    CHECK(strstr(why(c), says), "%s: '%s' does not say '%s'", what, why(c), says);
    dpo_close(c);
}

static void refuse(const char *vae, const char *says)
{
    put_model(FOLDER "/refused", LATENT_INDEX, LATENT_UNET, vae);
    refuse_folder(vae, FOLDER "/refused", says);
}

static void test_refusals(void)
{
    refuse("{\"act_fn\": \"gelu\"}", "act_fn must be \"silu\"");
    refuse("{\"latents_mean\": [0, 0, 0, 0]}", "latents_mean must be null");
    refuse("{\"block_out_channels\": [8, 12], \"norm_num_groups\": 4}", "1 blocks for 2 block_out_channels");
    refuse("{\"block_out_channels\": [8, 12], " TWO_UP ", \"down_block_types\": [\"DownEncoderBlock2D\"]}",
           "down_block_types has 1 blocks for 2");
    refuse("{\"up_block_types\": [\"AttnUpDecoderBlock2D\"]}", "up_block_types names AttnUpDecoderBlock2D");
    refuse("{\"block_out_channels\": [8, 8, 8, 8, 8, 8, 8, 8, 8]}", "9 levels");
    refuse("{\"block_out_channels\": []}", "0 levels");
    refuse("{\"norm_num_groups\": 7}", "channels do not fall into 7 groups");
    refuse("{\"scaling_factor\": 0}", "scaling_factor");
    refuse("{\"latent_channels\": 16}", "the UNet answers in 4 channels, the VAE reads 16");
    refuse("[]", "no object");
    put_model(FOLDER "/refused", "{\"unet\": [\"diffusers\", \"UNet2DConditionModel\"], \"text_encoder\": [\"\", \"x\"], "
              "\"vae\": [\"diffusers\", \"AutoencoderTiny\"]}", LATENT_UNET, "{}");
    refuse_folder("another class", FOLDER "/refused", "the VAE is of class AutoencoderTiny; AutoencoderKL is supported");
}

static void refuse_weights(const char *folder, const char *says, const char *also)
{
    dpo_ctx *c = open_plain();
    CHECK(!dpo_model_load(c, folder, DPO_F32), "weights that do not fit were loaded");
    CHECK(strstr(why(c), says) && strstr(why(c), also), "'%s' does not say '%s' and '%s'", why(c), says, also);
    dpo_close(c);
}

static void test_misfits(void)
{
    static const char file[] = FOLDER "/misfit/vae/diffusion_pytorch_model.safetensors";
    dpo_ctx   *c = open_plain();
    CHECK(dpo_model_save(make_model(c, FOLDER "/misfit", NULL), FOLDER "/misfit", DPO_F32), "%s", why(c));
    put(FOLDER "/misfit", "vae/config.json", "{" TWO ", \"layers_per_block\": 2}");
    refuse_weights(FOLDER "/misfit", file, "the first is encoder.down_blocks.0.resnets.1.norm1.weight");
    put(FOLDER "/misfit", "vae/config.json", "{" TWO ", \"layers_per_block\": 1, \"in_channels\": 4}");
    refuse_weights(FOLDER "/misfit", file, "encoder.conv_in.weight has shape [8,3,3,3], the configuration wants [8,4,3,3]");
    remove(file);
    refuse_weights(FOLDER "/misfit", "misfit/vae", "diffusion_pytorch_model");
    dpo_close(c);
}

/* ---- older names ------------------------------------------------------------------------------------------------ */

static const char *const renamed[][2] = {
    { ".to_q.", ".query." }, { ".to_k.", ".key." }, { ".to_v.", ".value." }, { ".to_out.0.", ".proj_attn." }
};

static int fill_copy(void *user, dpo_writer *w, void *tag)
{
    dpo_entry *e = (dpo_entry *)tag;
    float     *v = (float *)calloc((size_t)e->count, sizeof *v);
    int        ok = dpo_entry_floats(e, 0, e->count, v) && dpo_writer_floats(w, v, e->count);
    (void)user;
    free(v);
    return ok;
}

/* Copy a VAE's file with the attention's older names, its weights as matrices or as 1x1 convolutions. */
static void rename_file(dpo_ctx *c, const char *from, const char *to, int matrices)
{
    dpo_file   *f = dpo_safetensors_open(c, from);
    dpo_writer *w = dpo_writer_new(c, to);
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        dpo_entry *e = dpo_file_entry(f, i);
        int64_t    shape[4] = { 1, 1, 1, 1 };
        char       name[256];
        int        rank = e->rank;
        snprintf(name, sizeof name, "%s", e->name);
        for (int k = 0; k < rank; k++) shape[k] = e->shape[k];
        for (int k = 0; k < 4; k++) {
            const char *at = strstr(e->name, renamed[k][0]);
            if (!at) continue;
            snprintf(name, sizeof name, "%.*s%s%s", (int)(at - e->name), e->name, renamed[k][1],
                     at + strlen(renamed[k][0]));
            if (!matrices && rank == 2) rank = 4;
        }
        dpo_writer_add(w, name, "F32", rank, shape, e);
    }
    CHECK(dpo_writer_save(w, fill_copy, NULL), "renaming: %s", why(c));
    dpo_file_close(f);
}

static void test_older_names(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL), *again;
    dpo_tensor *x = numbers(c, 1, 8, 8, 3, 1), *z = dpo_encode_images(m, x, NULL), *y = dpo_decode_latents(m, z);
    CHECK(dpo_model_save(m, FOLDER "/saved", DPO_F32) && dpo_model_save(m, FOLDER "/older", DPO_F32), "%s", why(c));
    for (int matrices = 0; matrices < 2; matrices++) {
        rename_file(c, FOLDER "/saved/vae/diffusion_pytorch_model.safetensors",
                    FOLDER "/older/vae/diffusion_pytorch_model.safetensors", matrices);
        again = dpo_model_load(c, FOLDER "/older", DPO_F32);
        CHECK(difference(dpo_encode_images(again, x, NULL), z) == 0, "older names: %s", why(c));
        CHECK(difference(dpo_decode_latents(again, z), y) == 0, "older names: %s", why(c));
        CHECK(!logged[0], "something was logged: %s", logged);
    }
    dpo_close(c);
}

/* ---- what is computed ------------------------------------------------------------------------------------------- */

/* The posterior's draw, and scale and shift around the network. */
static void test_scaling(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, "{" TWO "}"), *shifted = make_model(c, FOLDER "/shifted", "{" TWO
                  ", \"scaling_factor\": 0.5, \"shift_factor\": 0.25}");
    dpo_tensor *x = numbers(c, 2, 8, 8, 3, 1), *e = numbers(c, 2, 4, 4, 4, 2), *logvar, *again, *mean, *other, *z, *raw;
    float      *a, *v, *n, *s;
    double      worst = 0;
    mean = dpo_encode_images(m, x, &logvar);
    other = dpo_encode_images(shifted, x, &again);
    CHECK(difference(again, logvar) == 0, "the log variance does not depend on the scale");
    raw = dpo_affine(c, mean, (float)(1/0.18215), 0);
    CHECK(difference(other, dpo_affine(c, raw, 0.5f, -0.125f)) < 1e-6, "shift and scale of the mean");
    CHECK(difference(dpo_decode_latents(shifted, other), dpo_decode_latents(m, mean)) < 1e-4, "shift and scale undone");
    z = dpo_encode_sample(m, mean, logvar, e);
    a = floats_of(mean); v = floats_of(logvar); n = floats_of(e); s = floats_of(z);
    for (int64_t i = 0; i < dpo_count(z); i++) {
        double d = fabs(a[i] + 0.18215*exp(0.5*v[i])*n[i] - s[i]);
        if (!(d <= worst)) worst = d;
    }
    CHECK(worst < 1e-5, "a draw is off by %g", worst);
    free(a); free(v); free(n); free(s);
    dpo_close(c);
}

/* A log variance that the network pushes out of bounds is held. */
static void test_clamp(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL);
    float       bias[8] = { 0, 0, 0, 0, 1000, -1000, 0, 0 }, *v;
    dpo_tensor *logvar;
    dpo_write(dpo_net_param(dpo_model_vae(m), "quant_conv.bias"), bias);
    dpo_encode_images(m, numbers(c, 1, 2, 2, 3, 1), &logvar);
    v = floats_of(logvar);
    CHECK(v[0] == 20 && v[1] == -30 && fabs(v[2]) < 20, "log variances %g, %g, %g", v[0], v[1], v[2]);
    free(v);
    dpo_close(c);
}

static void test_pixels(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m;
    dpo_tensor *x = numbers(c, 1, 3, 5, 3, 1), *logvar = x;
    CHECK(make(c, FOLDER "/pixels"), "%s", why(c));
    m = dpo_model_load(c, FOLDER "/pixels", DPO_F32);
    CHECK(!dpo_model_vae(m) && dpo_encode_images(m, x, &logvar) == x && !logvar, "pixels are encoded");
    CHECK(dpo_decode_latents(m, x) == x && dpo_encode_sample(m, x, NULL, NULL) == x, "pixels are decoded");
    CHECK(dpo_model_vae_options(m, 64, 1) && !dpo_error(c), "options without a VAE: %s", why(c));
    dpo_close(c);
}

static void test_misuse(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL);
    dpo_tensor *x = numbers(c, 1, 4, 4, 3, 1), *logvar = x;
    CHECK(!dpo_decode_latents(m, x) && strstr(why(c), "dpo_decode_latents wants [N,H,W,4]"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_encode_images(m, numbers(c, 1, 4, 5, 3, 1), &logvar) && !logvar, "an odd side");
    CHECK(strstr(why(c), "sides that 2 divides, not [1,4,5,3]"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_model_vae_options(m, 12, 0) && strstr(why(c), "multiple of 8"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_model_vae_options(m, -8, 0) && dpo_error(c), "a negative tile");
    dpo_clear_error(c);
    CHECK(!dpo_encode_images(m, NULL, NULL) && !dpo_decode_latents(m, NULL) && !dpo_encode_images(NULL, x, NULL)
          && !dpo_decode_latents(NULL, x) && !dpo_encode_sample(NULL, x, x, x) && !dpo_model_vae(NULL)
          && !dpo_model_vae_options(NULL, 0, 0) && !dpo_error(c), "NULL in, NULL out: %s", why(c));
    dpo_close(c);
}

/* ---- gradients -------------------------------------------------------------------------------------------------- */

/* d loss along a direction d against central differences; encode: the loss is of mean and log variance. */
static double loss_at(dpo_ctx *c, dpo_model *m, int encode, dpo_tensor *x, dpo_tensor *d, float h)
{
    int64_t     scope = dpo_scope(c);
    dpo_tensor *y, *v = NULL;
    float       a = 0, b = 0;
    x = dpo_binary(c, DPO_ADD, x, dpo_affine(c, d, h, 0));
    dpo_no_grad(c, 1);
    y = encode ? dpo_encode_images(m, x, &v) : dpo_decode_latents(m, x);
    dpo_read(weighed(c, y, 7), &a);
    if (v) dpo_read(weighed(c, v, 8), &b);
    dpo_no_grad(c, -1);
    dpo_scope_end(c, scope, NULL);
    return (double)a + b;
}

static void check_gradient(int encode, int tile, int checkpoint)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL);
    dpo_tensor *x = encode ? numbers(c, 1, 20, 14, 3, 1) : numbers(c, 1, 10, 7, 4, 1), *y, *v = NULL, *d, *loss;
    float       got = 0, h = 1e-2f;
    double      want;
    dpo_model_vae_options(m, tile, checkpoint);
    x->needs_grad = 1;
    d = encode ? numbers(c, 1, 20, 14, 3, 3) : numbers(c, 1, 10, 7, 4, 3);
    y = encode ? dpo_encode_images(m, x, &v) : dpo_decode_latents(m, x);
    loss = weighed(c, y, 7);
    if (v) loss = dpo_binary(c, DPO_ADD, loss, weighed(c, v, 8));
    CHECK(dpo_backward(loss), "backward: %s", why(c));
    dpo_read(dpo_sum(c, dpo_binary(c, DPO_MUL, x->grad, d), -1), &got);
    want = (loss_at(c, m, encode, x, d, h) - loss_at(c, m, encode, x, d, -h)) / (2*h);
    CHECK(fabs(got - want) < 0.01*fabs(want) + 0.01, "encode %d, tile %d, checkpoint %d: gradient %g, differences %g",
          encode, tile, checkpoint, got, want);
    dpo_close(c);
}

static void test_gradients(void)
{
    for (int i = 0; i < 8; i++) check_gradient(i & 1, i & 2 ? 8 : 0, i & 4);
}

/* Recomputing changes no gradient: not that of what goes in, not those of weights; and it keeps less. */
static void test_checkpoint(void)
{
    dpo_ctx     *c = open_plain();
    dpo_model   *m = make_model(c, TINY, "{" TWO ", \"layers_per_block\": 2}");
    int          n;
    dpo_tensor **params = dpo_net_params(dpo_model_vae(m), &n);
    float      **want = (float **)calloc((size_t)n + 2, sizeof *want);
    dpo_net_trainable(dpo_model_vae(m), 1);
    for (int tile = 0; tile < 2; tile++)
        for (int again = 0; again < 2; again++) {
            int64_t     scope = dpo_scope(c);
            dpo_tensor *x = numbers(c, 2, 16, 24, 3, 1), *z;
            x->needs_grad = 1;
            dpo_model_vae_options(m, tile ? 16 : 0, again);
            z = dpo_decode_latents(m, dpo_encode_images(m, x, NULL));
            CHECK(dpo_backward_from(z, numbers(c, 2, 16, 24, 3, 9)), "backward: %s", why(c));
            for (int i = 0; i <= n; i++) {
                float  *g = floats_of(i < n ? params[i]->grad : x->grad);
                double  off;
                if (!again) { want[i] = g; continue; }
                off = difference_of(g, want[i], dpo_count(i < n ? params[i] : x));
                CHECK(off <= 2e-5, "tile %d: the recomputed gradient of %s is off by %g", tile,
                      i < n ? params[i]->name : "x", off);
            }
            for (int i = 0; i < n; i++) dpo_zero_grad(params[i]);
            dpo_scope_end(c, scope, NULL);
        }
    free(want);
    dpo_close(c);
}

/* ---- tiles ------------------------------------------------------------------------------------------------------ */

/* That tiles are diffusers' is parity's to say; here what does not depend on numbers. */
static void test_tiles(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL);
    dpo_tensor *x = numbers(c, 2, 40, 28, 3, 1), *z = numbers(c, 2, 20, 14, 4, 2), *whole, *whole_z, *y, *v, *again;
    whole_z = dpo_encode_images(m, x, NULL);
    whole = dpo_decode_latents(m, z);
    CHECK(dpo_model_vae_options(m, 40, 0), "%s", why(c));
    CHECK(difference(dpo_encode_images(m, x, NULL), whole_z) == 0, "one tile encodes as none does");
    CHECK(difference(dpo_decode_latents(m, z), whole) == 0, "one tile decodes as none does");
    for (int tile = 8; tile <= 32; tile += 8) {
        dpo_model_vae_options(m, tile, 0);
        y = dpo_decode_latents(m, z);
        v = dpo_encode_images(m, x, NULL);
        CHECK(difference(y, whole) < 1.2 && difference(y, whole) > 0, "tiles of %d decode %g off", tile,
              difference(y, whole));
        CHECK(difference(v, whole_z) < 1.2 && difference(v, whole_z) > 0, "tiles of %d encode %g off", tile,
              difference(v, whole_z));
        again = dpo_decode_latents(m, dpo_slice(c, z, 0, 1, 1));
        CHECK(difference(dpo_slice(c, y, 0, 1, 1), again) == 0, "a batch decodes as its pictures do");
    }
    y = dpo_affine(c, x, 1, 0);
    CHECK(difference(dpo_encode_images(m, dpo_last(y), NULL), v) == 0 && !y->data, "dpo_last ends a picture after its tiles");
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
}

/* A constant fades into itself: with all weights zero but the last bias, tiles must not show at all. */
static void test_constant(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_model(c, TINY, NULL);
    float       bias[3] = { 0.5f, -1, 2 }, zeros[8 * 9 * 3] = { 0 }, *y;
    double      worst = 0;
    dpo_net    *vae = dpo_model_vae(m);
    dpo_write(dpo_net_param(vae, "decoder.conv_out.weight"), zeros);
    dpo_write(dpo_net_param(vae, "decoder.conv_out.bias"), bias);
    dpo_model_vae_options(m, 16, 0);
    y = floats_of(dpo_decode_latents(m, numbers(c, 1, 21, 9, 4, 1)));
    for (int64_t i = 0; i < 42*18*3; i++) if (!(fabs(y[i] - bias[i % 3]) <= worst)) worst = fabs(y[i] - bias[i % 3]);
    CHECK(worst == 0, "blending changes a constant by %g", worst);
    free(y);
    dpo_close(c);
}

/* The same bits for 1 and 2 threads. */
static void test_threads(void)
{
    float *result[2];
    int64_t count = 0;
    for (int i = 0; i < 2; i++) {
        dpo_ctx    *c = open_with(i + 1);
        dpo_model  *m = make_model(c, TINY, NULL);
        dpo_tensor *y;
        dpo_model_vae_options(m, 16, 0);
        y = dpo_decode_latents(m, dpo_encode_images(m, numbers(c, 1, 24, 40, 3, 1), NULL));
        count = dpo_count(y);
        result[i] = floats_of(y);
        dpo_close(c);
    }
    CHECK(difference_of(result[0], result[1], count) == 0, "1 and 2 threads differ");
}

/* ---- the real size ---------------------------------------------------------------------------------------------- */

static dpo_ctx *open_dry(dpo_backend *cpu)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.backend = dpo_dry_open(cpu);
    return dpo_open(&d);
}

/* Stable Diffusion's VAE alone, with zeros for weights. */
static dpo_net *real_vae(dpo_ctx *c)
{
    return dpoi_net_realise(dpoi_net_plan(c, &dpoi_vae_kind, SD_VAE, "vae", DPO_BF16), NULL);
}

/* MB at the peak of decoding (or encoding) one picture of a size, beside the weights. */
static double picture_peak(dpo_ctx *c, dpo_net *vae, int encode, int side, int tile)
{
    int64_t     scope = dpo_scope(c), shape[4];
    size_t      before;
    dpo_tensor *x;
    double      peak;
    shape[0] = 1; shape[1] = shape[2] = encode ? side : side/8; shape[3] = encode ? 3 : 4;
    ((dpoi_vae_config *)vae->config)->tile = tile;
    dpo_memory_peak(c, 1);
    before = dpo_memory(c);
    dpo_no_grad(c, 1);
    x = dpo_tensor_new(c, DPO_F32, 4, shape);
    CHECK((encode ? dpoi_vae_encode(vae, x, NULL) : dpoi_vae_decode(vae, x)) != NULL, "%s", why(c));
    dpo_no_grad(c, -1);
    dpo_scope_end(c, scope, NULL);
    peak = (double)(dpo_memory_peak(c, 1) - before) / 1e6;
    printf("%s %dx%d, tiles of %d: %.0f MB beside the weights\n", encode ? "encoding" : "decoding", side, side, tile,
           peak);
    return peak;
}

/* A second picture of the size must find what the first one left.  Regions that are left would hide the next size's
   peak, so that each has a context of its own. */
static double peak_of(int encode, int side, int tile)
{
    dpo_backend *cpu = dpo_cpu_open(NULL);
    dpo_ctx     *c = open_dry(cpu);
    dpo_net     *vae = real_vae(c);
    double       peak = picture_peak(c, vae, encode, side, tile), again = picture_peak(c, vae, encode, side, tile);
    CHECK(again < 0.3*peak, "a second picture takes %g MB more", again);
    dpo_close(c);
    cpu->close(cpu->self);
    return peak;
}

static void test_real_size(void)
{
    dpo_backend *cpu = dpo_cpu_open(NULL);
    dpo_ctx     *c = open_dry(cpu);
    dpo_net     *vae = real_vae(c);
    int64_t      total = 0;
    int          n;
    dpo_tensor **params = dpo_net_params(vae, &n);
    for (int i = 0; i < n; i++) total += dpo_count(params[i]);
    CHECK(n == 248 && total == 83653863, "%d tensors, %lld parameters: %s", n, (long long)total, why(c));
    CHECK(vae && dpoi_vae_factor(vae) == 8, "factor");
    dpo_close(c);
    cpu->close(cpu->self);
    CHECK(peak_of(0, 512, 0) < 800, "512 x 512 in one go");
    CHECK(peak_of(0, 1024, 0) < 3200, "1024 x 1024 in one go");
    CHECK(peak_of(0, 1024, 512) < 900, "1024 x 1024 in tiles");
    CHECK(peak_of(0, 1024, 256) < 300, "1024 x 1024 in small tiles");
    CHECK(peak_of(0, 4096, 512) < 1100, "4096 x 4096 in tiles");
    CHECK(peak_of(0, 4096, 256) < 600, "4096 x 4096 in small tiles");
    CHECK(peak_of(1, 512, 0) < 600, "512 x 512 encoded");
    CHECK(peak_of(1, 1024, 512) < 600, "1024 x 1024 encoded in tiles");
}

/* Attention over one head of 512 channels, odd numbers of tokens, against plain C. */
static void test_wide_attention(void)
{
    dpo_desc     d;
    dpo_ctx     *c;
    dpo_tensor  *x[3];
    int64_t      shape[3] = { 1, 131, 512 };
    memset(&d, 0, sizeof d);
    d.threads = 1;
    d.isa = DPO_ISA_PLAIN;
    dpo_backend *oracle = dpo_cpu_open(&d);
    d.isa = DPO_ISA_BEST;
    d.backend = dpo_check_open(dpo_cpu_open(&d), oracle, 2e-5f);
    c = dpo_open(&d);
    for (int i = 0; i < 3; i++) {
        x[i] = dpo_reshape(c, numbers(c, 1, 131, 1, 512, 5 + (uint64_t)i), 3, shape);
        x[i]->needs_grad = 1;
    }
    CHECK(dpo_backward(dpo_sum(c, dpo_act(c, dpo_attention(c, x[0], x[1], x[2], 1, 0), DPO_SQUARE), -1)),
          "one head of 512: %s", why(c));
    dpo_close(c);
}

/* ---- allocations that fail -------------------------------------------------------------------------------------- */

/* Everything once: loading, both halves in tiles and whole, recorded and not, saving. */
static void all_of_it(dpo_ctx *c)
{
    dpo_model  *m = dpo_model_load(c, FOLDER "/oom", DPO_F32);
    dpo_tensor *x = numbers(c, 1, 12, 10, 3, 1), *z, *logvar;
    if (!m || !x) return;
    dpo_model_vae_options(m, 8, 1);
    x->needs_grad = 1;
    z = dpo_encode_images(m, x, &logvar);
    z = dpo_encode_sample(m, z, logvar, numbers(c, 1, 6, 5, 4, 2));
    dpo_backward_from(dpo_decode_latents(m, z), numbers(c, 1, 12, 10, 3, 3));
    dpo_no_grad(c, 1);
    dpo_decode_latents(m, numbers(c, 1, 6, 5, 4, 2));
    dpo_model_vae_options(m, 0, 0);
    dpo_decode_latents(m, numbers(c, 1, 6, 5, 4, 2));
    dpo_no_grad(c, -1);
    dpo_model_save(m, FOLDER "/oom2", DPO_BF16);
}

static void test_allocations(int every)
{
    dpo_ctx *first = open_plain();
    CHECK(dpo_model_save(make_model(first, FOLDER "/oom", NULL), FOLDER "/oom", DPO_F32), "%s", why(first));
    dpo_close(first);
    test_failing(all_of_it, every, 60);
}

int main(int argc, char **argv)
{
    test_round_trip();
    test_defaults();
    test_refusals();
    test_misfits();
    test_older_names();
    test_scaling();
    test_clamp();
    test_pixels();
    test_misuse();
    test_gradients();
    test_checkpoint();
    test_tiles();
    test_constant();
    test_threads();
    test_real_size();
    test_wide_attention();
    test_allocations(argc > 1 && strcmp(argv[1], "every") == 0);
    return test_report();
}
