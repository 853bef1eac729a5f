/* test_models.c - networks, adapters and pipelines: what is saved reads back the same, what does not fit is refused by
   name, options do what they say, and every allocation is made to fail in turn.

   build   cc -O2 tests/test_models.c -o build/test_models -lm -lpthread
   run     build/test_models [every]     from the project's folder; every: let each allocation fail, not one in some */
#define main tiny_model_main
#include "tiny_model.c"
#undef main
#include "dpo_test.h"
#include "test_context.h"
#include "failing_alloc.h"

#define FOLDER "build/models"
#define TINY   FOLDER "/tiny"

static const char ALL_LAYERS[] = "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,"
    "conv_shortcut,time_emb_proj,downsamplers.0.conv,upsamplers.0.conv,conv_in,conv_out,linear_1,linear_2";

/* ---- helpers ---------------------------------------------------------------------------------------------------- */

static void write_numbers(dpo_tensor *x, uint64_t seed, double scale)
{
    float *v = (float *)calloc((size_t)dpo_count(x) + 1, sizeof *v);
    for (int64_t i = 0; i < dpo_count(x); i++) v[i] = (float)(scale * test_normal(&seed));
    dpo_write(x, v);
    free(v);
}

static dpo_tensor *numbers(dpo_ctx *c, int rank, int64_t a, int64_t b, int64_t d, int64_t e, uint64_t seed)
{
    int64_t     shape[4];
    dpo_tensor *x;
    shape[0] = a; shape[1] = b; shape[2] = d; shape[3] = e;
    if ((x = dpo_tensor_new(c, DPO_F32, rank, shape)) != NULL) write_numbers(x, seed, 1);
    return x;
}

/* Two samples of an odd size for a model. */
static dpo_unet_in input_for(dpo_ctx *c, dpo_model *m)
{
    static const float t[2] = { 10, 700 };
    const int64_t  two = 2;
    dpo_model_info d = dpo_model_describe(m);
    dpo_unet_in    in;
    memset(&in, 0, sizeof in);
    in.x = numbers(c, 4, 2, 7, 5, d.channels, 1);
    in.emb = numbers(c, 3, 2, 3, d.width, 1, 2);
    in.t = dpo_tensor_from(c, DPO_F32, 1, &two, t);
    if (d.pooled) {
        in.pooled = numbers(c, 2, 2, d.pooled, 1, 1, 3);
        in.time_ids = numbers(c, 2, 2, d.time_ids, 1, 1, 4);
    }
    return in;
}

static dpo_tensor *predict(dpo_model *m, const dpo_unet_in *in) { return dpo_unet(dpo_model_unet(m), in); }

/* Write a folder like the tiny model's, with another configuration of its UNet. */
static void put_variant(const char *folder, const char *unet)
{
    dpo_ctx *c = open_plain();
    char     path[256];
    static const char *const parts[] = { "unet", "text_encoder", "tokenizer", "scheduler" };
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, parts[i]);
        dpo_make_folder(c, path);
    }
    put(folder, "model_index.json", INDEX);
    put(folder, "scheduler/scheduler_config.json", SCHEDULE);
    put(folder, "unet/config.json", unet);
    put(folder, "text_encoder/config.json", TEXT);
    put(folder, "tokenizer/tokenizer_config.json", TOKENS);
    put_vocabulary(folder);
    dpo_close(c);
}

/* ---- saving and loading ----------------------------------------------------------------------------------------- */

static void test_round_trip(void)
{
    dpo_ctx     *c = open_plain();
    const char  *prompts[] = { "a red thing", "" };
    dpo_model   *m, *again;
    dpo_net     *copy;
    dpo_unet_in  in;
    dpo_tensor  *y;
    dpo_model_info d;
    CHECK(make(c, TINY), "the tiny model: %s", why(c));
    m = dpo_model_load(c, TINY, DPO_F32);
    in = input_for(c, m);
    y = predict(m, &in);
    CHECK(y != NULL, "forward: %s", why(c));
    CHECK(dpo_model_save(m, FOLDER "/saved", DPO_F32), "saving: %s", why(c));
    again = dpo_model_load(c, FOLDER "/saved", DPO_F32);
    CHECK(difference(predict(again, &in), y) == 0, "a saved model predicts something else");
    y = dpo_encode_text(m, prompts, 2, NULL);
    CHECK(difference(dpo_encode_text(again, prompts, 2, NULL), y) == 0, "a saved model reads differently");
    y = predict(m, &in);
    CHECK(dpo_model_save(m, FOLDER "/saved16", DPO_BF16), "saving as BF16: %s", why(c));
    again = dpo_model_load(c, FOLDER "/saved16", DPO_F32);
    CHECK(difference(predict(again, &in), y) < 0.1, "BF16 is far off");
    CHECK(dpo_model_save(again, FOLDER "/saved16", DPO_BF16), "saving into its own folder: %s", why(c));
    copy = dpo_net_copy(dpo_model_unet(m), DPO_F32);
    CHECK(difference(dpo_unet(copy, &in), y) == 0, "a copy predicts something else");
    dpo_model_set_unet(again, copy);
    CHECK(difference(predict(again, &in), y) == 0, "set_unet");
    d = dpo_model_describe(m);
    CHECK(d.channels == 3 && d.factor == 1 && d.size == 8 && d.latent_scale == 1, "the tiny model's pictures");
    CHECK(d.tokens == 16 && d.width == 16 && !d.pooled && !d.time_ids, "the tiny model's text");
    CHECK(!logged[0], "something was logged: %s", logged);
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
}

/* The same seed gives the same weights, another one others; their spread is what layers start with. */
static void test_create(void)
{
    static const char name[] = "mid_block.resnets.0.conv1.weight";
    dpo_ctx    *c = open_plain();
    dpo_model  *a = dpo_model_create(c, TINY, 5), *b = dpo_model_create(c, TINY, 5), *d = dpo_model_create(c, TINY, 6);
    dpo_tensor *w = dpo_net_param(dpo_model_unet(a), name);
    float      *v = floats_of(w);
    double      most = 0, limit = 1 / sqrt(9.0 * 16);
    CHECK(difference(w, dpo_net_param(dpo_model_unet(b), name)) == 0, "one seed, two models");
    CHECK(difference(w, dpo_net_param(dpo_model_unet(d), name)) > 0.5, "two seeds, one model");
    for (int64_t i = 0; i < dpo_count(w); i++) if (fabs(v[i]) > most) most = fabs(v[i]);
    CHECK(most <= limit && most > 0.95 * limit, "U(-%g, %g) has a number of size %g", limit, limit, most);
    free(v);
    v = floats_of(dpo_net_param(dpo_model_unet(a), "conv_norm_out.weight"));
    CHECK(v[0] == 1, "norms start at %g", v[0]);
    free(v);
    CHECK(!dpo_net_param(dpo_model_unet(a), "no.such.parameter") && !dpo_error(c), "asking is no error");
    dpo_close(c);
}

/* ---- adapters --------------------------------------------------------------------------------------------------- */

static void test_adapters(void)
{
    dpo_ctx         *c = open_plain();
    dpo_model       *m = dpo_model_load(c, TINY, DPO_F32), *other = dpo_model_load(c, TINY, DPO_F32);
    dpo_net         *unet = dpo_model_unet(m);
    dpo_unet_in      in = input_for(c, m);
    dpo_adapter_desc d;
    dpo_tensor      *base = predict(m, &in), *with, *part, **params;
    const int64_t    two = 2;
    float            strengths[2] = { 0, 1 };
    int              n;
    memset(&d, 0, sizeof d);
    d.rank = 3;
    d.alpha = 6;
    d.targets = ALL_LAYERS;
    CHECK(dpo_adapter_new(unet, &d), "adapters: %s", why(c));
    params = dpo_adapter_params(unet, &n);
    CHECK(n > 100, "only %d adapters", n / 2);
    CHECK(difference(predict(m, &in), base) == 0, "fresh adapters change the prediction");
    for (int i = 1; i < n; i += 2) write_numbers(params[i], (uint64_t)i, 0.3);
    with = predict(m, &in);
    CHECK(difference(with, base) > 1e-2, "adapters change nothing");
    in.adapters_off = 1;
    CHECK(difference(predict(m, &in), base) == 0, "adapters_off");
    in.adapters_off = 0;
    in.strength = dpo_tensor_from(c, DPO_F32, 1, &two, strengths);
    part = predict(m, &in);
    CHECK(difference(dpo_slice(c, part, 0, 0, 1), dpo_slice(c, base, 0, 0, 1)) == 0, "strength 0 is not the base");
    CHECK(difference(dpo_slice(c, part, 0, 1, 1), dpo_slice(c, with, 0, 1, 1)) == 0, "strength 1 is not the adapter");
    in.strength = NULL;
    dpo_adapter_strength(unet, 0);
    CHECK(difference(predict(m, &in), base) == 0, "strength 0 of all");
    dpo_adapter_strength(unet, 1);
    CHECK(dpo_adapter_save(unet, FOLDER "/adapter.safetensors", DPO_F32), "saving: %s", why(c));
    CHECK(dpo_adapter_load(dpo_model_unet(other), FOLDER "/adapter.safetensors"), "loading: %s", why(c));
    CHECK(difference(predict(other, &in), with) == 0, "loaded adapters differ");
    CHECK(dpo_net_save(unet, FOLDER "/unet", DPO_F32), "saving the network: %s", why(c));
    d.rank = 1;
    d.targets = "attn1.to_q";
    CHECK(dpo_adapter_new(unet, &d), "adapters: %s", why(c));
    dpo_adapter_params(unet, &n);
    CHECK(n == 8, "%d parameters for attn1.to_q", n);
    CHECK(difference(predict(m, &in), base) == 0, "a new set does not take the old one's place");
    d.targets = "q";
    CHECK(!dpo_adapter_new(unet, &d) && strstr(why(c), "no layer"), "half a name is no target: %s", why(c));
    dpo_close(c);
}

/* One adapter in each dialect, at the same layer, by hand; alpha only in kohya's. */
typedef struct lora { float down[16], up[16], alpha; } lora;

static int fill_lora(void *user, dpo_writer *w, void *tag)
{
    lora *l = (lora *)user;
    return tag == l->down ? dpo_writer_floats(w, l->down, 16) : tag == l->up ? dpo_writer_floats(w, l->up, 16)
                                                              : dpo_writer_floats(w, &l->alpha, 1);
}

static void put_lora(dpo_ctx *c, const char *path, lora *l, const char *down, const char *up, const char *alpha)
{
    static const int64_t D[2] = { 1, 16 }, U[2] = { 16, 1 };
    dpo_writer *w = dpo_writer_new(c, path);
    dpo_writer_add(w, down, "F32", 2, D, l->down);
    dpo_writer_add(w, up, "F32", 2, U, l->up);
    if (alpha) dpo_writer_add(w, alpha, "F32", 0, D, &l->alpha);
    dpo_writer_save(w, fill_lora, l);
}

static void test_dialects(void)
{
#define KOHYA "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
#define PLAIN "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    static const char *const names[][3] = {
        { KOHYA ".lora_down.weight", KOHYA ".lora_up.weight", KOHYA ".alpha" },
        { "unet." PLAIN ".lora_A.weight", "unet." PLAIN ".lora_B.weight", NULL },
        { "base_model.model." PLAIN ".lora_A.default.weight", "base_model.model." PLAIN ".lora_B.default.weight",
          NULL },
        { PLAIN ".lora.down.weight", PLAIN ".lora.up.weight", NULL },
        { "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
          "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight", NULL }
    };
    dpo_ctx    *c = open_plain();
    dpo_model  *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_unet_in in = input_for(c, m);
    dpo_tensor *base = predict(m, &in), *first = NULL;
    lora        l;
    for (int i = 0; i < 16; i++) { l.down[i] = (float)sin(i); l.up[i] = (float)cos(i); }
    l.alpha = 1;
    for (int i = 0; i < 5; i++) {
        dpo_tensor *y;
        put_lora(c, FOLDER "/dialect.safetensors", &l, names[i][0], names[i][1], names[i][2]);
        CHECK(dpo_adapter_load(dpo_model_unet(m), FOLDER "/dialect.safetensors"), "%s: %s", names[i][0], why(c));
        y = predict(m, &in);
        if (!first) first = y;
        CHECK(difference(y, base) > 1e-3, "%s has no effect", names[i][0]);
        CHECK(difference(y, first) == 0, "%s gives something else", names[i][0]);
    }
    l.alpha = 0.5f;
    put_lora(c, FOLDER "/dialect.safetensors", &l, names[0][0], names[0][1], names[0][2]);
    dpo_adapter_load(dpo_model_unet(m), FOLDER "/dialect.safetensors");
    CHECK(difference(predict(m, &in), first) > 1e-3, "alpha is ignored");
    dpo_adapter_strength(dpo_model_unet(m), 2);
    CHECK(difference(predict(m, &in), first) < 1e-6, "strength does not multiply alpha");
    dpo_close(c);
}

static void test_bad_adapters(void)
{
    static const struct { const char *down, *up, *says; } bad[] = {
        { KOHYA ".lora_down.weight", "lora_unet_nowhere.lora_up.weight", "only one half" },
        { "lora_unet_nowhere.lora_down.weight", "lora_unet_nowhere.lora_up.weight", "none of its 2 tensors" },
        { KOHYA ".lora_up.weight", KOHYA ".lora_down.weight", "the configuration wants" },
        { KOHYA ".hada_w1_a", KOHYA ".hada_w1_b", "no plain LoRA" },
        { KOHYA ".lora_down.weight", PLAIN ".lora_A.weight", "in the same way" },
        { "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
          "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "none of its 2 tensors" }
    };
    dpo_ctx    *c = open_plain();
    dpo_model  *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_unet_in in = input_for(c, m);
    dpo_tensor *with;
    lora        l;
    memset(&l, 0, sizeof l);
    for (int i = 0; i < 16; i++) l.down[i] = l.up[i] = 0.5f;
    put_lora(c, FOLDER "/good.safetensors", &l, KOHYA ".lora_down.weight", KOHYA ".lora_up.weight", NULL);
    dpo_adapter_load(dpo_model_unet(m), FOLDER "/good.safetensors");
    with = predict(m, &in);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        put_lora(c, FOLDER "/bad.safetensors", &l, bad[i].down, bad[i].up, NULL);
        CHECK(!dpo_adapter_load(dpo_model_unet(m), FOLDER "/bad.safetensors"), "%s was accepted", bad[i].down);
        CHECK(strstr(why(c), bad[i].says), "'%s' does not say '%s'", why(c), bad[i].says);
        dpo_clear_error(c);
        CHECK(difference(predict(m, &in), with) == 0, "a file that was refused changed the adapters");
    }
    dpo_close(c);
}

/* ---- configurations --------------------------------------------------------------------------------------------- */

/* The tiny UNet's configuration with one more field in front. */
static void refuse(const char *field, const char *says)
{
    char     text[1024];
    dpo_ctx *c = open_plain();
    snprintf(text, sizeof text, "{%s,%s", field, strchr(UNET, '"'));
    put_variant(FOLDER "/variant", text);
    CHECK(!dpo_model_create(c, FOLDER "/variant", 1), "%s was accepted", field);
    CHECK(strstr(why(c), says), "%s: '%s' does not say '%s'", field, why(c), says);
    dpo_close(c);
}

static void test_refusals(void)
{
    refuse("\"class_embed_type\": \"timestep\"", "class_embed_type must be null");
    refuse("\"resnet_time_scale_shift\": \"scale_shift\"", "resnet_time_scale_shift must be");
    refuse("\"dropout\": 0.5", "dropout must be 0");
    refuse("\"mid_block_type\": \"UNetMidBlock2DSimpleCrossAttn\"", "mid_block_type");
    refuse("\"addition_embed_type\": \"image\"", "only text_time is supported");
    refuse("\"transformer_layers_per_block\": [1, 2, 3]", "3 values for 2 levels");
    refuse("\"transformer_layers_per_block\": [1, -2]", "transformer_layers_per_block[1]");
    refuse("\"norm_eps\": \"small\"", "norm_eps");
    refuse("\"conv_in_kernel\": 4", "odd ones are supported");
    refuse("\"only_cross_attention\": [true, false]", "only_cross_attention must be false");
    refuse("\"block_out_channels\": [8, 16], \"block_out_channels\": [8, 16]", "block_out_channels");
}

/* A variant that is fine: loaded, saved, and loaded again. */
static void accept_config(const char *name, const char *unet)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m;
    dpo_unet_in in;
    dpo_tensor *y;
    put_variant(FOLDER "/variant", unet);
    m = dpo_model_create(c, FOLDER "/variant", 1);
    in = input_for(c, m);
    y = predict(m, &in);
    CHECK(y && y->shape[1] == 7 && y->shape[2] == 5, "%s: %s", name, why(c));
    CHECK(dpo_model_save(m, FOLDER "/variant", DPO_F32), "%s: %s", name, why(c));
    CHECK(difference(predict(dpo_model_load(c, FOLDER "/variant", DPO_F32), &in), y) == 0, "%s: %s", name, why(c));
    dpo_close(c);
}

#define SIXTEEN "\"in_channels\": 3, \"out_channels\": 3, \"cross_attention_dim\": 16, \"norm_num_groups\": 2, " \
                "\"norm_eps\": 0.001"
#define ONE_UP  "\"up_block_types\": [\"CrossAttnUpBlock2D\"], \"down_block_types\": [\"CrossAttnDownBlock2D\"]"
#define TWO     "\"up_block_types\": [\"UpBlock2D\", \"CrossAttnUpBlock2D\"], " \
                "\"down_block_types\": [\"CrossAttnDownBlock2D\", \"DownBlock2D\"]"

static void test_variants(void)
{
    accept_config("one level", "{" SIXTEEN "," ONE_UP ", \"block_out_channels\": [8], \"attention_head_dim\": 1}");
    accept_config("no middle", "{" SIXTEEN "," TWO ", \"block_out_channels\": [8, 12], "
                  "\"attention_head_dim\": [2, 3], \"mid_block_type\": null, \"layers_per_block\": [2, 1]}");
    accept_config("all at once", "{" SIXTEEN "," TWO ", \"block_out_channels\": [8, 12], \"attention_head_dim\": 4, "
                  "\"transformer_layers_per_block\": [2, 3], \"use_linear_projection\": true, "
                  "\"flip_sin_to_cos\": false, \"downsample_padding\": 0, \"time_embedding_dim\": 20, "
                  "\"conv_in_kernel\": 1, \"conv_out_kernel\": 5, "
                  "\"act_fn\": \"swish\", \"upcast_attention\": true, \"class_embed_type\": null, \"dropout\": 0.0}");
}

/* ---- what does not fit ------------------------------------------------------------------------------------------ */

static void refuse_model(const char *folder, const char *says)
{
    dpo_ctx *c = open_plain();
    CHECK(!dpo_model_load(c, folder, DPO_F32), "%s was loaded", folder);
    CHECK(strstr(why(c), says), "'%s' does not say '%s'", why(c), says);
    dpo_close(c);
}

static void test_misfits(void)
{
    char     text[1024], *at;
    dpo_ctx *c = open_plain();
    snprintf(text, sizeof text, "%s", UNET);
    at = strstr(text, "[8, 16]");
    memcpy(at, "[8, 24]", 7);
    CHECK(dpo_model_save(dpo_model_load(c, TINY, DPO_F32), FOLDER "/misfit", DPO_F32), "%s", why(c));
    put(FOLDER "/misfit", "unet/config.json", text);
    refuse_model(FOLDER "/misfit", "the configuration wants");
    memcpy(strstr(text, "[8, 24]"), "[8, 16]", 7);
    snprintf(text + strlen(text) - 2, 64, ", \"transformer_layers_per_block\": 2}\n");
    put(FOLDER "/misfit", "unet/config.json", text);
    refuse_model(FOLDER "/misfit", "are missing, the first is "
                 "down_blocks.1.attentions.0.transformer_blocks.1.norm1.weight");
    put(FOLDER "/misfit", "unet/config.json", "{\"sample_size\": ");
    refuse_model(FOLDER "/misfit", "broken JSON");
    put(FOLDER "/misfit", "unet/config.json", UNET);
    put(FOLDER "/misfit", "model_index.json", "{\"_class_name\": \"FluxPipeline\", "
        "\"transformer\": [\"diffusers\", \"FluxTransformer2DModel\"]}");
    refuse_model(FOLDER "/misfit", "a FluxPipeline has no UNet");
    refuse_model(FOLDER "/nowhere", "no such file or folder");
    dpo_close(c);
}

/* Calls that make no sense, and calls on nothing. */
static void test_misuse(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_unet_in in = input_for(c, m), bad = in;
    int         n = 7;
    bad.emb = in.x;
    CHECK(!predict(m, &bad) && strstr(why(c), "emb is [2,T,16]"), "%s", why(c));
    dpo_clear_error(c);
    bad = in;
    bad.x = in.emb;
    CHECK(!predict(m, &bad) && strstr(why(c), "x is [N,H,W,3]"), "%s", why(c));
    dpo_clear_error(c);
    bad = in;
    bad.t = NULL;
    CHECK(!predict(m, &bad) && strstr(why(c), "wants x, t and emb"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_unet(dpo_model_text(m, 0), &in) && strstr(why(c), "wants a UNet"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_model_load(c, TINY, DPO_I32) && strstr(why(c), "weights are kept as"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_adapter_save(dpo_model_unet(m), FOLDER "/none.safetensors", DPO_F32), "nothing was saved");
    CHECK(strstr(why(c), "no adapters"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_model_text(m, 1) && !dpo_model_text(m, 2) && !dpo_tokens(m, 1, NULL, 1), "there is one text encoder");
    CHECK(!dpo_net_params(NULL, &n) && n == 0 && !dpo_adapter_params(NULL, &n), "nothing has no parameters");
    CHECK(!dpo_model_unet(NULL) && !dpo_unet(NULL, &in) && !dpo_net_copy(NULL, DPO_F32), "NULL in, NULL out");
    CHECK(!dpo_model_save(NULL, TINY, DPO_F32) && !dpo_encode_text(NULL, NULL, 1, NULL), "NULL in, NULL out");
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
}

/* ---- gradients through recomputation ---------------------------------------------------------------------------- */

/* Deep attentions are recomputed block by block, shallow ones with their resnet; both give the same gradients as not at
   all, but for the order in which they were summed. */
static void test_checkpoint(void)
{
    dpo_ctx     *c = open_plain();
    dpo_model   *m;
    dpo_unet_in  in;
    dpo_tensor **params;
    float      **want;
    int          n;
    put_variant(FOLDER "/variant", "{" SIXTEEN "," TWO ", \"block_out_channels\": [8, 12], \"attention_head_dim\": 4, "
                "\"transformer_layers_per_block\": [3, 1]}");
    m = dpo_model_create(c, FOLDER "/variant", 3);
    dpo_net_trainable(dpo_model_unet(m), 1);
    params = dpo_net_params(dpo_model_unet(m), &n);
    want = (float **)calloc((size_t)n + 1, sizeof *want);
    for (int again = 0; again < 2; again++) {
        int64_t scope = dpo_scope(c);
        in = input_for(c, m);
        in.checkpoint = again;
        CHECK(dpo_backward_from(predict(m, &in), numbers(c, 4, 2, 7, 5, 3, 9)), "backward: %s", why(c));
        for (int i = 0; i < n; i++) {
            float *g = floats_of(params[i]->grad);
            double worst = 0, most = 0;
            if (!again) { want[i] = g; continue; }
            for (int64_t k = 0; k < dpo_count(params[i]); k++) {
                if (!(fabs((double)g[k] - want[i][k]) <= worst)) worst = fabs((double)g[k] - want[i][k]);
                if (fabs((double)want[i][k]) > most) most = fabs((double)want[i][k]);
            }
            CHECK(params[i]->grad && worst <= 1e-5 * most, "recomputed gradient of %s is off by %g of %g",
                  params[i]->name, worst, most);
            free(g);
            free(want[i]);
        }
        for (int i = 0; i < n; i++) dpo_zero_grad(params[i]);
        dpo_scope_end(c, scope, NULL);
    }
    free(want);
    dpo_close(c);
}

/* ---- allocations that fail -------------------------------------------------------------------------------------- */

/* Everything once. */
static void all_of_it(dpo_ctx *c)
{
    const char      *prompts[] = { "thing", NULL };
    dpo_model       *m = dpo_model_load(c, TINY, DPO_F32);
    dpo_adapter_desc d;
    dpo_unet_in      in;
    memset(&d, 0, sizeof d);
    d.rank = 2;
    if (!m) return;
    in = input_for(c, m);
    in.emb = dpo_encode_text(m, prompts, 2, NULL);
    in.checkpoint = 1;
    dpo_adapter_new(dpo_model_unet(m), &d);
    dpo_backward_from(predict(m, &in), numbers(c, 4, 2, 7, 5, 3, 9));
    dpo_adapter_save(dpo_model_unet(m), FOLDER "/oom.safetensors", DPO_F16);
    dpo_adapter_load(dpo_model_unet(m), FOLDER "/oom.safetensors");
    dpo_net_assign(dpo_net_copy(dpo_model_unet(m), DPO_F32), dpo_model_unet(m));
    dpo_model_save(m, FOLDER "/oom", DPO_BF16);
}

int main(int argc, char **argv)
{
    test_round_trip();
    test_create();
    test_adapters();
    test_dialects();
    test_bad_adapters();
    test_refusals();
    test_variants();
    test_misfits();
    test_misuse();
    test_checkpoint();
    test_failing(all_of_it, argc > 1 && strcmp(argv[1], "every") == 0, 60);
    return test_report();
}
