/* test_formats.c - single files, their names and families; adapters in all dialects; what is refused, and how.

   build   cc -O2 tests/test_formats.c -o build/test_formats -lm -lpthread
   run     build/test_formats [every]    from the project's folder; every: let each allocation fail, not one in some */
#define main tiny_model_main
#include "tiny_model.c"
#undef main
#include "dpo_test.h"
#include "test_context.h"
#include "failing_alloc.h"

#define FOLDER "build/formats"

/* ---- helpers ---------------------------------------------------------------------------------------------------- */

/* Multiples of 1/128 below 1, which F16 and BF16 hold exactly: a file in either is the same model. */
static void write_numbers(dpo_tensor *x, uint64_t seed, double scale)
{
    float *v = (float *)calloc((size_t)dpo_count(x) + 1, sizeof *v);
    for (int64_t i = 0; i < dpo_count(x); i++)
        v[i] = (float)floor(scale * (test_uniform(&seed) - 0.5) * 128) / 128 + 1.0f/64;
    dpo_write(x, v);
    free(v);
}

static dpo_tensor *numbers(dpo_ctx *c, int rank, int64_t a, int64_t b, int64_t d, int64_t e, uint64_t seed)
{
    int64_t     shape[4];
    dpo_tensor *x;
    shape[0] = a; shape[1] = b; shape[2] = d; shape[3] = e;
    if ((x = dpo_tensor_new(c, DPO_F32, rank, shape)) != NULL) write_numbers(x, seed, 2);
    return x;
}

static int same_bytes(const char *a, const char *b)
{
    FILE *f = fopen(a, "rb"), *g = fopen(b, "rb");
    int   x = 0, y = 0;
    while (f && g && x == y && x != EOF) { x = fgetc(f); y = fgetc(g); }
    if (f) fclose(f);
    if (g) fclose(g);
    return f && g && x == y;
}

/* ---- a tiny model of each family -------------------------------------------------------------------------------- */

/* The parts of the real ones, at a few channels: blocks, depths, text encoders, conditions.  The projection of the
   second text encoder is not square. */
typedef struct family {
    const char *name, *down, *up, *unet;  /* of the UNet: block types, and what differs */
    int         first, second;            /* widths of the text encoders, 0: none */
    const char *act;                      /* of the first */
    const char *prediction;
} family;

#define C_DOWN "\"CrossAttnDownBlock2D\""
#define D_DOWN "\"DownBlock2D\""
#define C_UP   "\"CrossAttnUpBlock2D\""
#define D_UP   "\"UpBlock2D\""

static const family families[] = {
    { "sd1", C_DOWN "," C_DOWN "," D_DOWN, D_UP "," C_UP "," C_UP,
      "\"block_out_channels\": [8, 16, 16], \"cross_attention_dim\": 12, \"attention_head_dim\": 2, \"layers_per_block\": 2",
      12, 0, "quick_gelu", "epsilon" },
    { "sd2", C_DOWN "," D_DOWN, D_UP "," C_UP,
      "\"block_out_channels\": [8, 16], \"cross_attention_dim\": 8, \"attention_head_dim\": [2, 4], \"layers_per_block\": 1, "
      "\"use_linear_projection\": true", 8, 0, "gelu", "v_prediction" },
    { "sdxl", D_DOWN "," C_DOWN "," C_DOWN, C_UP "," C_UP "," D_UP,
      "\"block_out_channels\": [8, 16, 16], \"cross_attention_dim\": 20, \"attention_head_dim\": [2, 4, 4], "
      "\"transformer_layers_per_block\": [1, 2, 2], \"use_linear_projection\": true, \"layers_per_block\": 2, "
      "\"addition_embed_type\": \"text_time\", \"addition_time_embed_dim\": 4, "
      "\"projection_class_embeddings_input_dim\": 30", 12, 8, "quick_gelu", "epsilon" },
    { "refiner", D_DOWN "," C_DOWN "," C_DOWN "," D_DOWN, D_UP "," C_UP "," C_UP "," D_UP,
      "\"block_out_channels\": [8, 16, 16, 16], \"cross_attention_dim\": 8, \"attention_head_dim\": 2, "
      "\"transformer_layers_per_block\": 2, \"use_linear_projection\": true, \"layers_per_block\": 2, "
      "\"addition_embed_type\": \"text_time\", \"addition_time_embed_dim\": 4, "
      "\"projection_class_embeddings_input_dim\": 26", 0, 8, "", "epsilon" }
};

static const char *path_of(const family *k, const char *end)
{
    static char paths[8][256];
    static int  next;
    char       *p = paths[next++ % 8];
    snprintf(p, 256, FOLDER "/%s%s", k->name, end);
    return p;
}

static void put_text(const char *folder, const char *name, int width, const char *act, int projection)
{
    char text[600];
    snprintf(text, sizeof text, "{\"architectures\": [\"%s\"], \"vocab_size\": 514, \"hidden_size\": %d, "
             "\"intermediate_size\": 12, \"num_hidden_layers\": 3, \"num_attention_heads\": 2, "
             "\"max_position_embeddings\": 16, \"hidden_act\": \"%s\", \"projection_dim\": %d, \"eos_token_id\": 513}\n",
             projection ? "CLIPTextModelWithProjection" : "CLIPTextModel", width, act, projection ? projection : width);
    put(folder, name, text);
}

static void put_index(const family *k, const char *folder)
{
    char text[800];
    snprintf(text, sizeof text, "{\"_class_name\": \"%s\", \"scheduler\": [\"diffusers\", \"DDIMScheduler\"],\n"
             " \"text_encoder\": [%s], \"tokenizer\": [%s], \"text_encoder_2\": [%s], \"tokenizer_2\": [%s],\n"
             " \"unet\": [\"diffusers\", \"UNet2DConditionModel\"], \"vae\": [\"diffusers\", \"AutoencoderKL\"]}\n",
             k->second ? "StableDiffusionXLPipeline" : "StableDiffusionPipeline",
             k->first ? "\"transformers\", \"CLIPTextModel\"" : "null, null",
             k->first ? "\"transformers\", \"CLIPTokenizer\"" : "null, null",
             k->second ? "\"transformers\", \"CLIPTextModelWithProjection\"" : "null, null",
             k->second ? "\"transformers\", \"CLIPTokenizer\"" : "null, null");
    put(folder, "model_index.json", text);
}

/* All parameters random, so that none is one or zero by chance. */
static dpo_model *make_family(dpo_ctx *c, const family *k)
{
    static const char *const parts[] = { "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                         "scheduler" };
    char        text[1200];
    const char *folder = path_of(k, "");
    dpo_model  *m;
    dpo_net    *nets[4];
    for (int i = 0; i < 7; i++) dpo_make_folder(c, (snprintf(text, sizeof text, "%s/%s", folder, parts[i]), text));
    put_index(k, folder);
    snprintf(text, sizeof text, "{\"_class_name\": \"UNet2DConditionModel\", \"sample_size\": 8, \"norm_num_groups\": 4,\n"
             " \"down_block_types\": [%s], \"up_block_types\": [%s],\n %s}\n", k->down, k->up, k->unet);
    put(folder, "unet/config.json", text);
    put(folder, "vae/config.json", "{\"_class_name\": \"AutoencoderKL\", \"block_out_channels\": [4, 8, 8],\n"
        " \"down_block_types\": [\"DownEncoderBlock2D\", \"DownEncoderBlock2D\", \"DownEncoderBlock2D\"],\n"
        " \"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\", \"UpDecoderBlock2D\"],\n"
        " \"layers_per_block\": 2, \"norm_num_groups\": 2, \"latent_channels\": 4, \"scaling_factor\": 0.2}\n");
    put_text(folder, "text_encoder/config.json", k->first ? k->first : 4, *k->act ? k->act : "gelu", 0);
    put_text(folder, "text_encoder_2/config.json", k->second ? k->second : 4, "gelu", 6);
    put(folder, "tokenizer/tokenizer_config.json", TOKENS);
    put(folder, "tokenizer_2/tokenizer_config.json", TOKENS);
    put_vocabulary(folder);
    put_vocabulary(path_of(k, "/x/.."));
    snprintf(text, sizeof text, "{\"_class_name\": \"DDIMScheduler\", \"beta_schedule\": \"scaled_linear\", \"beta_start\": "
             "0.00085, \"beta_end\": 0.012, \"prediction_type\": \"%s\", \"clip_sample\": false}\n", k->prediction);
    put(folder, "scheduler/scheduler_config.json", text);
    dpoi_copy_file(c, path_of(k, "/tokenizer/vocab.json"), path_of(k, "/tokenizer_2/vocab.json"));
    dpoi_copy_file(c, path_of(k, "/tokenizer/merges.txt"), path_of(k, "/tokenizer_2/merges.txt"));
    if (!(m = dpo_model_create(c, folder, 1))) return NULL;
    nets[0] = dpo_model_unet(m); nets[1] = dpo_model_vae(m); nets[2] = dpo_model_text(m, 0); nets[3] = dpo_model_text(m, 1);
    for (int i = 0; i < 4; i++) {
        int          count;
        dpo_tensor **params = dpo_net_params(nets[i], &count);
        for (int p = 0; p < count; p++)
            write_numbers(params[p], (uint64_t)(i*10000 + p), params[p]->rank == 1 ? 0.5 : 0.6);
    }
    return dpo_model_save(m, folder, DPO_F32) ? m : NULL;
}

/* Two samples for a model's UNet. */
static dpo_unet_in input_for(dpo_model *m)
{
    static const float t[2] = { 10, 700 };
    const int64_t      two = 2;
    dpo_ctx       *c = dpoi_model_ctx(m);
    dpo_model_info d = dpo_model_describe(m);
    dpo_unet_in    in;
    memset(&in, 0, sizeof in);
    in.x = numbers(c, 4, 2, 9, 6, d.channels, 1);
    in.emb = numbers(c, 3, 2, 3, d.width, 1, 2);
    in.t = dpo_tensor_from(c, DPO_F32, 1, &two, t);
    if (d.pooled) {
        in.pooled = numbers(c, 2, 2, d.pooled, 1, 1, 3);
        in.time_ids = numbers(c, 2, 2, d.time_ids, 1, 1, 4);
    }
    return in;
}

/* What a model computes: a prediction, texts, both ways through the VAE. */
enum { OUTPUTS = 5 };
static void compute(dpo_model *m, dpo_tensor **y)
{
    const char  *prompts[2] = { "a red fox", "thing" };
    dpo_ctx     *c = dpoi_model_ctx(m);
    dpo_unet_in  in;
    memset(y, 0, OUTPUTS * sizeof *y);
    if (!m) return;
    in = input_for(m);
    y[0] = dpo_unet(dpo_model_unet(m), &in);
    y[1] = dpo_encode_text(m, prompts, 2, &y[2]);
    y[3] = dpo_encode_images(m, numbers(c, 4, 1, 8, 12, 3, 5), NULL);
    y[4] = dpo_decode_latents(m, numbers(c, 4, 1, 3, 2, 4, 6));
}

static void expect_same(const char *what, dpo_model *m, dpo_tensor **want, double tolerance)
{
    dpo_tensor *y[OUTPUTS];
    compute(m, y);
    CHECK(m != NULL, "%s: there is no model", what);
    for (int i = 0; i < OUTPUTS; i++)
        if (want[i]) CHECK(difference(y[i], want[i]) <= tolerance, "%s: result %d differs by %g", what, i,
                           difference(y[i], want[i]));
}

static dpo_model *load_with(dpo_ctx *c, const char *path, const char *config)
{
    dpo_load_desc d;
    memset(&d, 0, sizeof d);
    d.config = config;
    return dpo_model_load_with(c, path, &d);
}

/* ---- single files ------------------------------------------------------------------------------------------------ */

static void test_round_trip(const family *k)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = make_family(c, k), *again;
    dpo_tensor *want[OUTPUTS];
    dpo_file   *f;
    CHECK(m != NULL, "%s: %s", k->name, why(c));
    compute(m, want);
    CHECK(want[0] && want[1] && want[3] && want[4] && (want[2] != NULL) == (k->second > 0), "%s: %s", k->name, why(c));
    CHECK(dpo_model_save_file(m, path_of(k, ".safetensors"), DPO_F32), "%s: %s", k->name, why(c));
    CHECK(dpo_model_save_file(m, path_of(k, "-2.safetensors"), DPO_F32), "%s: %s", k->name, why(c));
    CHECK(same_bytes(path_of(k, ".safetensors"), path_of(k, "-2.safetensors")), "%s: one model, two files", k->name);
    again = load_with(c, path_of(k, ".safetensors"), path_of(k, ""));
    CHECK(again != NULL, "%s: %s", k->name, why(c));
    expect_same(k->name, again, want, 0);
    CHECK(again && dpo_model_schedule(again)->prediction == dpo_model_schedule(m)->prediction, "%s: prediction", k->name);
    for (int dtype = DPO_BF16; dtype <= DPO_F16; dtype++) {
        CHECK(dpo_model_save_file(m, path_of(k, "-2.safetensors"), dtype), "%s: %s", k->name, why(c));
        expect_same("in half precision", load_with(c, path_of(k, "-2.safetensors"), path_of(k, "")), want, 0);
    }
    CHECK(dpo_model_rest(again) && !again->vae->list && !dpo_model_rest(m), "%s: text encoders and VAE at rest", k->name);
    dpo_clear_error(c);
    logged[0] = 0;
    expect_same("after a rest", again, want, 0);
    CHECK(dpo_model_rest(again) && dpo_model_save(again, path_of(k, "-again"), DPO_F32), "%s: %s", k->name, why(c));
    again = dpo_model_load(c, path_of(k, "-again"), DPO_F32);
    expect_same("as a folder again", again, want, 0);
    CHECK(dpo_model_rest(again) && dpo_model_vae(again) && again->vae->list, "%s: %s", k->name, why(c));
    expect_same("as a folder, after a rest", again, want, 0);
    CHECK(same_bytes(path_of(k, "/unet/diffusion_pytorch_model.safetensors"),
                     path_of(k, "-again/unet/diffusion_pytorch_model.safetensors")), "%s: the UNet's file", k->name);
    f = dpo_safetensors_open(c, path_of(k, ".safetensors"));
    CHECK((dpo_file_find(f, "v_pred") != NULL) == (strcmp(k->prediction, "epsilon") != 0), "%s: the marker", k->name);
    CHECK(dpo_file_metadata(f, "modelspec.architecture") != NULL, "%s: metadata", k->name);
    CHECK(dpo_file_describe(f).kind == DPO_FILE_MODEL && dpo_file_describe(f).supported, "%s: %s", k->name,
          dpo_file_describe(f).what);
    dpo_file_close(f);
    CHECK(!logged[0], "%s: something was logged: %s", k->name, logged);
    CHECK(!dpo_error(c), "%s: %s", k->name, why(c));
    dpo_close(c);
}

/* One number of a tensor of a file. */
static float number_of(dpo_file *f, const char *name, int64_t at)
{
    float x = (float)NAN;
    dpo_entry *e = dpo_file_find(f, name);
    if (e) dpo_entry_floats(e, at, 1, &x);
    return x;
}

/* OpenCLIP's forms, by their numbers: the projection turned, q, k and v one after the other. */
static void test_openclip(void)
{
    dpo_ctx   *c = open_plain();
    dpo_model *m = dpo_model_load(c, FOLDER "/sdxl", DPO_F32);
    dpo_file  *f = dpo_safetensors_open(c, FOLDER "/sdxl.safetensors");
    dpo_entry *e = dpo_file_find(f, "conditioner.embedders.1.model.text_projection");
    dpo_net   *text = dpo_model_text(m, 1);
    float     *p = floats_of(dpo_net_param(text, "text_projection.weight"));           /* [6,8] */
    static const char *const names[] = { "q_proj", "k_proj", "v_proj" };
    CHECK(e && e->rank == 2 && e->shape[0] == 8 && e->shape[1] == 6, "the projection is [width,projection]");
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 8; j++)
            CHECK(number_of(f, "conditioner.embedders.1.model.text_projection", j*6 + i) == p[i*8 + j],
                  "the projection is not turned at %d, %d", i, j);
    free(p);
    for (int k = 0; k < 3; k++) {
        char   name[80];
        float *w, *b;
        snprintf(name, sizeof name, "text_model.encoder.layers.1.self_attn.%s.weight", names[k]);
        w = floats_of(dpo_net_param(text, name));
        strcpy(name + strlen(name) - 6, "bias");
        b = floats_of(dpo_net_param(text, name));
        for (int i = 0; i < 64; i++)
            CHECK(number_of(f, "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight", k*64 + i)
                  == w[i], "%s of the fused weight", names[k]);
        for (int i = 0; i < 8; i++)
            CHECK(number_of(f, "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias", k*8 + i) == b[i],
                  "%s of the fused bias", names[k]);
        free(w);
        free(b);
    }
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
}

/* ---- names of the published models ------------------------------------------------------------------------------- */

/* A network of a family's own configuration, without tensors. */
static dpo_net *planned(dpo_ctx *c, const char *family_name, const dpoi_kind *kind, const char *sub)
{
    dpo_model *m = dpoi_model_new(c, "planned");
    for (int i = 0; i < DPOI_FAMILIES; i++)
        if (m && strcmp(dpoi_families[i].name, family_name) == 0) m->family = &dpoi_families[i];
    return dpoi_model_net(m, kind, sub, DPO_F32, DPOI_PLANNED);
}

static int64_t parameters(const dpo_net *n)
{
    int64_t sum = 0;
    for (int64_t i = 0; n && i < n->count; i++)
        sum += n->params[i].shape[0] * n->params[i].shape[1] * n->params[i].shape[2] * n->params[i].shape[3];
    return sum;
}

static void expect_name(const dpo_net *n, const dpoi_naming *naming, const char *ours, const char *theirs)
{
    char        got[DPOI_NAME];
    dpoi_layout l;
    dpoi_layout_of(n, &l);
    dpoi_name_theirs(naming, &l, "", ours, got);
    CHECK(strcmp(got, theirs) == 0, "%s is %s, not %s", ours, theirs, got);
    CHECK(dpoi_net_find(n, ours) != NULL, "%s is no parameter", ours);
}

/* Every name is another one, and none is left in our form. */
static void expect_distinct(const char *what, const dpo_net *n, const dpoi_naming *naming, int64_t distinct)
{
    char      (*names)[DPOI_NAME] = (char (*)[DPOI_NAME])calloc((size_t)n->count, DPOI_NAME);
    dpoi_layout l;
    int64_t     count = 0, ours = 0;
    dpoi_layout_of(n, &l);
    for (int64_t i = 0; i < n->count; i++) {
        int64_t k = 0;
        dpoi_name_theirs(naming, &l, "", n->params[i].name, names[count]);
        ours += strstr(names[count], "_blocks.") && (strstr(names[count], "down_") || strstr(names[count], "up_"));
        while (k < count && strcmp(names[k], names[count]) != 0) k++;
        count += k == count;
    }
    CHECK(count == distinct && !ours, "%s: %lld names of %lld, %lld not translated", what, (long long)count,
          (long long)distinct, (long long)ours);
    free(names);
}

/* Counts and names as they stand in the published checkpoints. */
static void test_published(void)
{
    static const struct { const char *name; int64_t unet, tensors; } want[] = {
        { "Stable Diffusion 1.x", 859520964, 686 }, { "Stable Diffusion 2.x", 865910724, 686 },
        { "Stable Diffusion XL", 2567463684, 1680 }, { "Stable Diffusion XL refiner", 2259526660, 1220 }
    };
    dpo_ctx *c = open_plain();
    dpo_net *n;
    for (int i = 0; i < 4; i++) {
        n = planned(c, want[i].name, &dpoi_unet_kind, "unet");
        CHECK(n && n->count == want[i].tensors && parameters(n) == want[i].unet, "%s: %lld tensors, %lld parameters: %s",
              want[i].name, n ? (long long)n->count : 0, (long long)parameters(n), why(c));
        if (n) expect_distinct(want[i].name, n, &dpoi_unet_naming, n->count);
    }
    n = planned(c, "Stable Diffusion 1.x", &dpoi_unet_kind, "unet");
    expect_name(n, &dpoi_unet_naming, "conv_in.weight", "input_blocks.0.0.weight");
    expect_name(n, &dpoi_unet_naming, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
                "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight");
    expect_name(n, &dpoi_unet_naming, "down_blocks.2.downsamplers.0.conv.bias", "input_blocks.9.0.op.bias");
    expect_name(n, &dpoi_unet_naming, "down_blocks.3.resnets.1.conv2.weight", "input_blocks.11.0.out_layers.3.weight");
    expect_name(n, &dpoi_unet_naming, "mid_block.resnets.1.time_emb_proj.weight", "middle_block.2.emb_layers.1.weight");
    expect_name(n, &dpoi_unet_naming, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight");
    expect_name(n, &dpoi_unet_naming, "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight");
    expect_name(n, &dpoi_unet_naming, "up_blocks.3.resnets.2.conv_shortcut.weight",
                "output_blocks.11.0.skip_connection.weight");
    expect_name(n, &dpoi_unet_naming, "conv_norm_out.weight", "out.0.weight");
    n = planned(c, "Stable Diffusion XL", &dpoi_unet_kind, "unet");
    expect_name(n, &dpoi_unet_naming, "add_embedding.linear_2.bias", "label_emb.0.2.bias");
    expect_name(n, &dpoi_unet_naming, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight");
    expect_name(n, &dpoi_unet_naming, "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight",
                "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight");
    n = planned(c, "Stable Diffusion 1.x", &dpoi_vae_kind, "vae");
    CHECK(n && n->count == 248 && parameters(n) == 83653863, "the VAE has %lld parameters", (long long)parameters(n));
    expect_distinct("the VAE", n, &dpoi_vae_naming, 248);
    expect_name(n, &dpoi_vae_naming, "decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight");
    expect_name(n, &dpoi_vae_naming, "decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight");
    expect_name(n, &dpoi_vae_naming, "encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight");
    n = planned(c, "Stable Diffusion XL", &dpoi_clip_text, "text_encoder_2");
    CHECK(n && n->count == 517 && parameters(n) == 694659840, "bigG has %lld parameters", (long long)parameters(n));
    expect_distinct("bigG", n, &dpoi_openclip_naming, 517 - 4*32);
    expect_name(n, &dpoi_openclip_naming, "text_model.encoder.layers.31.mlp.fc2.bias",
                "transformer.resblocks.31.mlp.c_proj.bias");
    CHECK(parameters(planned(c, "Stable Diffusion 1.x", &dpoi_clip_text, "text_encoder")) == 123060480, "CLIP-L");
    CHECK(parameters(planned(c, "Stable Diffusion 2.x", &dpoi_clip_text, "text_encoder")) == 340387840, "OpenCLIP-H");
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
}

/* ---- what else a single file may be ------------------------------------------------------------------------------ */

/* A copy of a file with some tensors renamed, left out, added, or in another type. */
typedef struct change {
    const char *from, *to;                /* a prefix and what stands for it; to NULL: left out */
    const char *dtype;                    /* of all, or NULL */
    const char *more[4];                  /* names of more tensors, of shape [2] */
} change;

static int fill_copy(void *user, dpo_writer *w, void *tag)
{
    static const float two[2] = { 1, 2 };
    dpo_entry *e = (dpo_entry *)tag;
    float     *v;
    int        ok;
    (void)user;
    if (!e) return dpo_writer_floats(w, two, 2);
    v = (float *)calloc((size_t)e->count + 1, sizeof *v);
    ok = dpo_entry_floats(e, 0, e->count, v) && dpo_writer_floats(w, v, e->count);
    free(v);
    return ok;
}

static void copy_changed(dpo_ctx *c, const char *from, const char *to, const change *d)
{
    static const int64_t two = 2;
    dpo_file   *f = dpo_safetensors_open(c, from);
    dpo_writer *w = dpo_writer_new(c, to);
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        dpo_entry *e = dpo_file_entry(f, i);
        char       name[256];
        size_t     n = d->from ? strlen(d->from) : 0;
        int        hit = n && strncmp(e->name, d->from, n) == 0;
        if (hit && !d->to) continue;
        snprintf(name, sizeof name, "%s%s", hit ? d->to : "", e->name + (hit ? n : 0));
        dpo_writer_add(w, name, d->dtype ? d->dtype : e->dtype, e->rank, e->shape, e);
    }
    for (int i = 0; i < 4 && d->more[i]; i++) dpo_writer_add(w, d->more[i], "F32", 1, &two, NULL);
    CHECK(dpo_writer_save(w, fill_copy, NULL), "%s: %s", to, why(c));
    dpo_file_close(f);
}

/* Another VAE in place of the model's own: a pipeline's folder, or the VAE's; from a folder and from a single file. */
static void test_other_vae(void)
{
    dpo_ctx      *c = open_plain();
    dpo_model    *m = dpo_model_load(c, FOLDER "/sd1", DPO_F32);
    int           n = 0;
    dpo_tensor  **x = dpo_net_params(dpo_model_vae(m), &n), *want[OUTPUTS], *own[OUTPUTS];
    dpo_load_desc d;
    compute(m, own);
    for (int i = 0; i < n; i++) write_numbers(x[i], (uint64_t)i + 77, 0.2);
    compute(m, want);
    CHECK(n > 10 && dpo_model_save(m, FOLDER "/other", DPO_F32) && difference(own[4], want[4]) > 0.01, "%s", why(c));
    memset(&d, 0, sizeof d);
    d.vae = FOLDER "/other";
    m = dpo_model_load_with(c, FOLDER "/sd1", &d);
    expect_same("another pipeline's VAE", m, want, 0);
    CHECK(dpo_model_rest(m), "%s", why(c));
    expect_same("another pipeline's VAE after a rest", m, want, 0);
    d.vae = FOLDER "/other/vae";
    d.config = FOLDER "/sd1";
    expect_same("another VAE beside a single file", dpo_model_load_with(c, FOLDER "/sd1.safetensors", &d), want, 0);
    CHECK(!dpo_error(c), "%s", why(c));
    d.vae = FOLDER "/nowhere";
    CHECK(!dpo_model_load_with(c, FOLDER "/sd1", &d) && strstr(why(c), "nowhere"), "%s", why(c));
    dpo_close(c);
}

static void test_forms(void)
{
    dpo_ctx    *c = open_plain();
    dpo_model  *m = dpo_model_load(c, FOLDER "/sd1", DPO_F32);
    dpo_tensor *want[OUTPUTS];
    change      d;
    compute(m, want);
    memset(&d, 0, sizeof d);
    d.from = "cond_stage_model.transformer.text_model.";
    d.to = "cond_stage_model.transformer.";
    d.more[0] = "model_ema.decay";
    d.more[1] = "alphas_cumprod";
    copy_changed(c, FOLDER "/sd1.safetensors", FOLDER "/form.safetensors", &d);
    expect_same("without text_model.", load_with(c, FOLDER "/form.safetensors", FOLDER "/sd1"), want, 0);
    CHECK(!logged[0], "logged: %s", logged);
    d.from = "first_stage_model.";
    d.to = "vae.";
    d.more[0] = "model.diffusion_model.new_layer.weight";
    copy_changed(c, FOLDER "/sd1.safetensors", FOLDER "/form.safetensors", &d);
    expect_same("with vae.", load_with(c, FOLDER "/form.safetensors", FOLDER "/sd1"), want, 0);
    CHECK(strstr(logged, "1 tensors that the model does not use: model.diffusion_model.new_layer.weight"), "logged: %s",
          logged);
    d.from = "first_stage_model.decoder.conv_out.weight";
    d.to = NULL;
    copy_changed(c, FOLDER "/sd1.safetensors", FOLDER "/form.safetensors", &d);
    CHECK(!load_with(c, FOLDER "/form.safetensors", FOLDER "/sd1") &&
          strstr(why(c), "1 of ") && strstr(why(c), "tensors of the AutoencoderKL are missing, the first is "
                                           "decoder.conv_out.weight"), "%s", why(c));
    dpo_clear_error(c);
    d.from = "cond_stage_model.";
    copy_changed(c, FOLDER "/sd1.safetensors", FOLDER "/form.safetensors", &d);
    CHECK(!load_with(c, FOLDER "/form.safetensors", FOLDER "/sd1") && strstr(why(c), "an unknown family"), "%s", why(c));
    dpo_close(c);
}

/* What a file says of its prediction, without a folder that says it: on the family's own schedule. */
static void test_markers(void)
{
    static const struct { const char *more[2], *prediction; int v, ztsnr; const char *family; } cases[] = {
        { { NULL, NULL }, NULL, 0, 0, "sd1" },
        { { "v_pred", NULL }, NULL, 1, 0, "sd1" },
        { { "v_pred", "ztsnr" }, NULL, 1, 1, "sdxl" },
        { { "v_pred", NULL }, "epsilon", 0, 0, "sdxl" },
        { { NULL, NULL }, "v_prediction", 1, 0, "sd1" }
    };
    dpo_ctx *c = open_plain();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dpo_load_desc d;
        dpo_model    *m = dpoi_model_new(c, FOLDER "/form.safetensors");
        char          from[64];
        change        k;
        memset(&k, 0, sizeof k);
        memset(&d, 0, sizeof d);
        k.more[0] = cases[i].more[0];
        k.more[1] = cases[i].more[1];
        d.prediction = cases[i].prediction;
        snprintf(from, sizeof from, FOLDER "/%s.safetensors", cases[i].family);
        copy_changed(c, from, FOLDER "/form.safetensors", &k);
        CHECK(dpoi_family_open(m, &d) && m->v == cases[i].v && m->ztsnr == cases[i].ztsnr, "case %d: v %d, ztsnr %d: %s",
              (int)i, m->v, m->ztsnr, why(c));
        CHECK(dpoi_model_scheduler(m) && m->schedule.prediction == (cases[i].v ? DPO_V_PREDICTION : DPO_EPSILON)
              && m->schedule.zero_terminal_snr == cases[i].ztsnr
              && m->schedule.spacing == (cases[i].ztsnr ? DPO_TRAILING : DPO_LEADING), "case %d: %s", (int)i, why(c));
        CHECK(m->schedule.T == 1000 && m->schedule.beta_schedule == DPO_SCALED_LINEAR && m->schedule.steps_offset == 1,
              "case %d: %s", (int)i, m->scheduler);
        dpo_file_close(m->file);
    }
    {
        dpo_load_desc d;
        memset(&d, 0, sizeof d);
        d.prediction = "x0";
        CHECK(!dpo_model_load_with(c, FOLDER "/sd1.safetensors", &d) && strstr(why(c), "not \"x0\""), "%s", why(c));
    }
    dpo_close(c);
}

/* The configurations that come with a family are what diffusers' folders say: they parse, and all parts fit together. */
static void test_families(void)
{
    for (int i = 0; i < DPOI_FAMILIES; i++) {
        dpo_ctx       *c = open_plain();
        dpo_model     *m = dpoi_model_new(c, "built in");
        dpo_model_info d;
        m->family = &dpoi_families[i];
        CHECK(dpoi_model_build(m, DPO_F32, DPOI_PLANNED), "%s: %s", m->family->name, why(c));
        d = dpo_model_describe(m);
        CHECK(d.channels == 4 && d.factor == 8 && d.tokens == 77 && d.width == m->family->context, "%s", m->family->name);
        CHECK(d.size == (m->family->added ? 1024 : 512), "%s: size %d", m->family->name, d.size);
        CHECK(d.time_ids == (i == 0 ? 6 : i == 1 ? 5 : 0) && d.pooled == (m->family->added ? 1280 : 0), "%s: %d ids, pooled %d",
              m->family->name, d.time_ids, d.pooled);
        CHECK(fabs(d.latent_scale - (m->family->added ? 0.13025 : 0.18215)) < 1e-6, "%s: scale", m->family->name);
        CHECK(m->zeros == (i == 0), "%s: an absent prompt", m->family->name);
        CHECK(dpoi_family_of_model(m) == m->family, "%s: its file would be another's", m->family->name);
        CHECK(dpoi_family_of_unet((const dpoi_unet_config *)m->unet->config) == m->family, "%s by its UNet", m->family->name);
        dpo_close(c);
    }
}

/* ---- tokenizers of single files ---------------------------------------------------------------------------------- */

static void test_tokenizers(void)
{
    dpo_ctx      *c = open_plain();
    dpo_load_desc d;
    dpo_model    *m;
    const char   *prompt = "fox";
    memset(&d, 0, sizeof d);
    m = dpoi_model_new(c, FOLDER "/sdxl.safetensors");
    CHECK(dpoi_family_open(m, &d) && !m->tokens[0] && !m->tokens[1], "a tokenizer from nowhere: %s", why(c));
    m->text[0] = planned(c, "Stable Diffusion XL", &dpoi_clip_text, "text_encoder");
    CHECK(!dpo_tokens(m, 0, &prompt, 1) && strstr(why(c), "no tokenizer, which a single file does not bring"), "%s", why(c));
    dpo_clear_error(c);
    d.tokenizer = FOLDER "/sdxl/tokenizer";
    m = dpoi_model_new(c, FOLDER "/sdxl.safetensors");
    CHECK(dpoi_family_open(m, &d) && m->tokens[0] && !strcmp(m->tokens[0], m->tokens[1]), "one for both: %s", why(c));
    m->text[1] = planned(c, "Stable Diffusion XL", &dpoi_clip_text, "text_encoder_2");
    CHECK(dpoi_model_tokenizer(m, 1) && dpo_tokenizer_info(m->tokenizer[1]).pad == 0, "SDXL's second pads with !: %s", why(c));
    d.tokenizer = FOLDER "/sdxl";
    m = dpoi_model_new(c, FOLDER "/sdxl.safetensors");
    CHECK(dpoi_family_open(m, &d) && strstr(m->tokens[1], "tokenizer_2"), "its own for the second: %s", why(c));
    d.tokenizer = FOLDER "/sdxl/unet";
    m = dpoi_model_new(c, FOLDER "/sdxl.safetensors");
    CHECK(!dpoi_family_open(m, &d) && strstr(why(c), "there is no vocab.json in it"), "%s", why(c));
    dpo_close(c);
}

/* tokenizer.json alone, with merges in either form, is the same tokenizer as vocab.json and merges.txt. */
static void test_whole_tokenizer(void)
{
    static const char *const merges[] = { "\"f o\", \"fo x</w>\"", "[\"f\", \"o\"], [\"fo\", \"x</w>\"]" };
    static const char vocab[] = "\"f\": 0, \"o\": 1, \"x\": 2, \"x</w>\": 3, \"fo\": 4, \"fox</w>\": 5, "
                                "\"<|startoftext|>\": 6, \"<|endoftext|>\": 7";
    for (int i = 0; i < 2; i++) {
        char           text[600];
        int32_t        ids[4];
        dpo_ctx       *c = open_plain();
        dpo_tokenizer *t;
        dpo_make_folder(c, FOLDER "/whole");
        snprintf(text, sizeof text, "{\"model\": {\"type\": \"BPE\", \"vocab\": {%s}, \"merges\": [%s]}}", vocab, merges[i]);
        put(FOLDER "/whole", "tokenizer.json", text);
        t = dpo_tokenizer_load(c, FOLDER "/whole");
        CHECK(t && dpo_tokenize(t, "Fox", ids, 4) == 3 && ids[0] == 6 && ids[1] == 5 && ids[2] == 7 && ids[3] == 7,
              "form %d: %s", i, why(c));
        put(FOLDER "/whole", "tokenizer.json", "{\"model\": {}}");
        CHECK(!dpo_tokenizer_load(c, FOLDER "/whole") && strstr(why(c), "no model with a vocabulary"), "%s", why(c));
        dpo_close(c);
    }
}

/* ---- what is refused --------------------------------------------------------------------------------------------- */

static int fill_two(void *user, dpo_writer *w, void *tag)
{
    static const float zeros[1024] = { 0 };
    (void)user; (void)tag;
    return dpo_writer_floats(w, zeros, (int64_t)(w->left / 4));
}

/* A file of one tensor. */
static void put_tensor(dpo_ctx *c, const char *path, const char *name, int64_t a, int64_t b)
{
    int64_t     shape[4] = { 0, 0, 1, 1 };
    dpo_writer *w = dpo_writer_new(c, path);
    shape[0] = a; shape[1] = b;
    dpo_writer_add(w, name, "F32", 4, shape, NULL);
    CHECK(dpo_writer_save(w, fill_two, NULL), "%s", why(c));
}

static void refuse_file(const char *path, const char *says)
{
    dpo_ctx *c = open_plain();
    CHECK(!dpo_model_load(c, path, DPO_F32), "%s was loaded", path);
    CHECK(strstr(why(c), says) && !strchr(why(c), '\n'), "'%s' does not say '%s'", why(c), says);
    dpo_close(c);
}

static void test_refused(void)
{
    static const struct { const char *name; int64_t a, b; const char *says; } files[] = {
        { "double_blocks.0.img_attn.norm.key_norm.scale", 4, 1, ": Flux; supported are Stable Diffusion" },
        { "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", 4, 1, ": Stable Diffusion 3; supported" },
        { "model.diffusion_model.input_blocks.0.0.weight", 4, 9, "an inpainting model" },
        { "model.diffusion_model.input_blocks.0.0.weight", 4, 8, "whose UNet reads 8 channels" },
        { "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", 4, 4, ": a LoHa adapter" },
        { "lora_unet_mid_block_attentions_0_proj_in.lokr_w1", 4, 4, ": a LoKr adapter" },
        { "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", 4, 4, ": an adapter (LoRA) for" },
        { "control_model.time_embed.0.weight", 4, 4, ": a ControlNet" },
        { "down_blocks.0.resnets.0.time_emb_proj.weight", 4, 4, ": a diffusers UNet alone" },
        { "decoder.conv_in.weight", 4, 4, "nothing here knows" },
        { "edm_mean", 4, 1, "Playground" },
        { "scaled_fp8", 1, 1, "scaled F8" }
    };
    dpo_ctx *c = open_plain();
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        put_tensor(c, FOLDER "/wrong.safetensors", files[i].name, files[i].a, files[i].b);
        refuse_file(FOLDER "/wrong.safetensors", files[i].says);
    }
    put(FOLDER, "wrong.safetensors", "<!DOCTYPE html><title>404</title>");
    refuse_file(FOLDER "/wrong.safetensors", "a text file, not safetensors");
    put(FOLDER, "wrong.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n");
    refuse_file(FOLDER "/wrong.safetensors", "git lfs pull");
    put(FOLDER, "wrong.ckpt", "PK\3\4archive/data.pkl");
    refuse_file(FOLDER "/wrong.ckpt", "a pickle (.ckpt, .bin, .pt), which can run code when it is read; convert it in Python");
    put(FOLDER, "wrong.pt", "\x80\2}q\1.aaaaaaaa");
    refuse_file(FOLDER "/wrong.pt", "a pickle");
    refuse_file(FOLDER, "model_index.json");
    CHECK(dpo_make_folder(c, FOLDER "/inpaint"), "%s", why(c));
    dpo_close(c);
}

/* ---- adapters ---------------------------------------------------------------------------------------------------- */

static void fill_adapters(dpo_net *n, const char *targets, int rank, float alpha)
{
    dpo_adapter_desc d;
    dpo_tensor     **params;
    int              count;
    memset(&d, 0, sizeof d);
    d.rank = rank;
    d.alpha = alpha;
    d.targets = targets;
    CHECK(dpo_adapter_new(n, &d), "%s", dpo_error(n->c));
    params = dpo_adapter_params(n, &count);
    for (int i = 0; i < count; i++) write_numbers(params[i], (uint64_t)i + 7, 0.4);
}

#define UNET_LAYERS "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut," \
                    "time_emb_proj,downsamplers.0.conv,upsamplers.0.conv,conv_in,conv_out,linear_1,linear_2"
#define TEXT_LAYERS "q_proj,k_proj,v_proj,out_proj,fc1,fc2"

/* The UNet and all text encoders adapted; saved in either naming, read back, converted, and folded in. */
static void test_adapters(const family *k)
{
    static const char *const more[] = { "ss_steps", "7", "ss_network_module", "mine", NULL };
    dpo_ctx           *c = open_plain();
    dpo_model         *m = dpo_model_load(c, path_of(k, ""), DPO_F32), *other;
    dpo_adapter_format d;
    dpo_tensor        *base[OUTPUTS], *want[OUTPUTS];
    dpo_file          *f;
    memset(&d, 0, sizeof d);
    compute(m, base);
    fill_adapters(dpo_model_unet(m), UNET_LAYERS, 3, 6);
    for (int i = 0; i < 2; i++) if (dpo_model_text(m, i)) fill_adapters(dpo_model_text(m, i), TEXT_LAYERS, 2, 1);
    compute(m, want);
    CHECK(difference(want[0], base[0]) > 1e-2 && difference(want[1], base[1]) > 1e-3, "%s: adapters without effect", k->name);
    for (int naming = DPO_KOHYA; naming <= DPO_PEFT; naming++) {
        const char *path = path_of(k, naming ? "-peft.safetensors" : "-kohya.safetensors");
        d.naming = naming;
        d.metadata = naming ? NULL : more;
        CHECK(dpo_model_adapter_save(m, path, &d), "%s: %s", k->name, why(c));
        CHECK(dpo_model_adapter_save(m, path_of(k, "-2.safetensors"), &d) && same_bytes(path, path_of(k, "-2.safetensors")),
              "%s: one set, two files", k->name);
        other = dpo_model_load(c, path_of(k, ""), DPO_F32);
        CHECK(dpo_model_adapter_load(other, path), "%s: %s", k->name, why(c));
        expect_same(naming ? "peft" : "kohya", other, want, 0);
        d.naming = !naming;
        d.metadata = NULL;
        CHECK(dpo_adapter_convert(c, path, path_of(k, "-there.safetensors"), &d, path_of(k, "")), "%s: %s", k->name, why(c));
        other = dpo_model_load(c, path_of(k, ""), DPO_F32);
        CHECK(dpo_model_adapter_load(other, path_of(k, "-there.safetensors")), "%s: %s", k->name, why(c));
        expect_same("converted", other, want, 0);
    }
    CHECK(!logged[0], "%s: something was logged: %s", k->name, logged);
    f = dpo_safetensors_open(c, path_of(k, "-kohya.safetensors"));
    CHECK(f && dpo_file_describe(f).kind == DPO_FILE_ADAPTER, "%s: %s", k->name, dpo_file_describe(f).what);
    CHECK(f && !strcmp(dpo_file_metadata(f, "ss_steps"), "7") && !strcmp(dpo_file_metadata(f, "ss_network_module"), "mine"),
          "%s: the caller's metadata", k->name);
    CHECK((dpo_file_find(f, "lora_unet_input_blocks_0_0.alpha") != NULL) == (k->second > 0), "%s: names of blocks", k->name);
    CHECK((dpo_file_find(f, "lora_unet_conv_in.alpha") != NULL) == !k->second, "%s: names of blocks", k->name);
    CHECK((dpo_file_find(f, "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha") != NULL) == !k->second, "%s", k->name);
    CHECK((dpo_file_find(f, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha") != NULL) == (k->second > 0), "%s", k->name);
    dpo_file_close(f);
    for (int i = -1; i < 2; i++) {
        dpo_net *n = i < 0 ? dpo_model_unet(m) : dpo_model_text(m, i);
        int      count;
        CHECK(!n || dpo_adapter_merge(n), "%s: %s", k->name, why(c));
        dpo_adapter_params(n, &count);
        CHECK(count == 0, "%s: merged adapters are still there", k->name);
    }
    expect_same("merged", m, want, 1e-4);
    CHECK(!dpo_error(c), "%s: %s", k->name, why(c));
    dpo_close(c);
}

/* Adapters of single tensors, by hand: names and scales as other programs write them. */
typedef struct lora { float down[64], up[64], alpha; int64_t I, O; } lora;

static int fill_lora(void *user, dpo_writer *w, void *tag)
{
    lora *l = (lora *)user;
    return tag == l->down ? dpo_writer_floats(w, l->down, l->I) : tag == l->up ? dpo_writer_floats(w, l->up, l->O)
                                                               : dpo_writer_floats(w, &l->alpha, 1);
}

static void put_lora(dpo_ctx *c, const char *path, lora *l, const char *down, const char *up, const char *alpha,
                     const char *metadata)
{
    int64_t     D[2] = { 1, 0 }, U[2] = { 0, 1 };
    dpo_writer *w = dpo_writer_new(c, path);
    D[1] = l->I; U[0] = l->O;
    if (metadata) dpo_writer_metadata(w, "lora_adapter_metadata", metadata);
    dpo_writer_add(w, down, "F32", 2, D, l->down);
    dpo_writer_add(w, up, "F32", 2, U, l->up);
    if (alpha) dpo_writer_add(w, alpha, "F32", 0, D, &l->alpha);
    CHECK(dpo_writer_save(w, fill_lora, l), "%s: %s", path, why(c));
}

#define FC1 "encoder.layers.0.mlp.fc1"
#define FC1_ "text_model_encoder_layers_0_mlp_fc1"
#define TO_Q "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"

static void test_dialects(void)
{
    static const struct { const char *down, *up, *alpha, *metadata; double scale; int which; } cases[] = {
        { "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
          "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
          "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha", NULL, 3, -1 },
        { "unet." TO_Q ".lora_A.weight", "unet." TO_Q ".lora_B.weight", NULL, NULL, 1, -1 },
        { "unet." TO_Q ".lora_A.weight", "unet." TO_Q ".lora_B.weight", NULL, "{\"unet.lora_alpha\": 2, \"unet.r\": 1}", 2, -1 },
        { "unet." TO_Q ".lora_A.weight", "unet." TO_Q ".lora_B.weight", NULL,
          "{\"unet.lora_alpha\": 2, \"unet.alpha_pattern\": {\"attn1.to_k\": 9, \"^" TO_Q "\": 5}}", 5, -1 },
        { "unet." TO_Q ".lora_A.weight", "unet." TO_Q ".lora_B.weight", NULL, "{\"text_encoder.lora_alpha\": 2}", 1, -1 },
        { "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
          "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_B.weight", NULL, NULL, 1, -1 },
        { "lora_te1_" FC1_ ".lora_down.weight", "lora_te1_" FC1_ ".lora_up.weight", NULL, NULL, 1, 0 },
        { "lora_te2_" FC1_ ".lora_down.weight", "lora_te2_" FC1_ ".lora_up.weight", NULL, NULL, 1, 1 },
        { "text_encoder.text_model." FC1 ".lora_linear_layer.down.weight",
          "text_encoder.text_model." FC1 ".lora_linear_layer.up.weight", NULL, NULL, 1, 0 },
        { "text_encoder_2." FC1 ".lora_A.weight", "text_encoder_2." FC1 ".lora_B.weight", NULL,
          "{\"text_encoder_2.lora_alpha\": 4, \"text_encoder_2.use_rslora\": true}", 4, 1 },
        { "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
          "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight", NULL, NULL, 1, 0 }
    };
    dpo_ctx   *c = open_plain();
    dpo_model *m = dpo_model_load(c, FOLDER "/sdxl", DPO_F32);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dpo_net *n = cases[i].which < 0 ? dpo_model_unet(m) : dpo_model_text(m, cases[i].which);
        lora     l;
        int      out = strstr(cases[i].down, "to_out") != NULL;
        memset(&l, 0, sizeof l);
        l.alpha = 3;
        l.I = cases[i].which < 0 ? 16 : cases[i].which ? 8 : 12;
        l.O = cases[i].which < 0 || out ? l.I : 12;
        for (int k = 0; k < 64; k++) l.down[k] = l.up[k] = 0.5f;
        put_lora(c, FOLDER "/dialect.safetensors", &l, cases[i].down, cases[i].up, cases[i].alpha, cases[i].metadata);
        CHECK(dpo_model_adapter_load(m, FOLDER "/dialect.safetensors"), "%s: %s", cases[i].down, why(c));
        CHECK(n->adapters.count == 1 && fabs(n->adapters.a[0].scale - cases[i].scale) < 1e-6, "%s: %d adapters, scale %g",
              cases[i].down, (int)n->adapters.count, n->adapters.count ? (double)n->adapters.a[0].scale : 0);
        for (int w = -1; w < 2; w++) dpo_adapter_merge(w < 0 ? dpo_model_unet(m) : dpo_model_text(m, w));
        dpo_clear_error(c);
    }
    CHECK(!logged[0], "something was logged: %s", logged);
    dpo_close(c);
}

/* A file for other networks, or another kind of adapter: named, and nothing has changed. */
static void test_bad_adapters(void)
{
    static const struct { const char *down, *up, *says; } bad[] = {
        { "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
          "adapts a layer of this model; it is Flux" },
        { "unet." TO_Q ".lora_A.weight", "unet." TO_Q ".lora_magnitude_vector", "DoRA" },
        { "unet." TO_Q ".hada_w1_a", "unet." TO_Q ".hada_w1_b", "no plain LoRA but LoHa" },
        { "unet." TO_Q ".lora_A.weight", "unet." TO_Q ".diff", "no plain LoRA but whole differences" },
        { "unet." TO_Q ".lora_A.weight", "lora_te1_" FC1_ ".lora_up.weight", "only one half of what adapts" },
        { "lora_te2_" FC1_ ".lora_down.weight", "lora_te2_" FC1_ ".lora_up.weight", "has shape [1,16], the configuration" }
    };
    dpo_ctx   *c = open_plain();
    dpo_model *m = dpo_model_load(c, FOLDER "/sdxl", DPO_F32);
    int        before, after;
    fill_adapters(dpo_model_unet(m), "to_q", 1, 1);
    dpo_adapter_params(dpo_model_unet(m), &before);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        lora l;
        memset(&l, 0, sizeof l);
        l.I = l.O = 16;
        put_lora(c, FOLDER "/bad.safetensors", &l, bad[i].down, bad[i].up, NULL, NULL);
        CHECK(!dpo_model_adapter_load(m, FOLDER "/bad.safetensors") && strstr(why(c), bad[i].says),
              "'%s' does not say '%s'", why(c), bad[i].says);
        dpo_clear_error(c);
        dpo_adapter_params(dpo_model_unet(m), &after);
        CHECK(after == before, "%s: %d adapter tensors became %d", bad[i].down, before, after);
    }
    dpo_close(c);
}

/* F8 by its bits: 0x38 is 1 in E4M3 (s eeee mmm, bias 7), 0x3c in E5M2 (s eeeee mm, bias 15). */
static void test_eight_bits(void)
{
    static const unsigned char e4m3[] = { 0x38, 0xb8, 0x01, 0x7e, 0x40 }, e5m2[] = { 0x3c, 0xbc, 0x01, 0x7b, 0x40 };
    static const float one[] = { 1, -1, 1.0f/512, 448, 2 }, two[] = { 1, -1, 1.0f/65536, 57344, 2 };
    static const char header[] = "{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[5],\"data_offsets\":[0,5]},"
                                 "\"b\":{\"dtype\":\"F8_E5M2\",\"shape\":[5],\"data_offsets\":[5,10]}}";
    unsigned char bytes[256];
    uint64_t      n = sizeof header - 1;
    dpo_ctx      *c = open_plain();
    dpo_file     *f;
    float         x[5] = { 0 };
    memcpy(bytes, &n, 8);
    memcpy(bytes + 8, header, (size_t)n);
    memcpy(bytes + 8 + n, e4m3, 5);
    memcpy(bytes + 13 + n, e5m2, 5);
    f = dpo_safetensors_memory(c, bytes, 18 + (size_t)n, "eight");
    CHECK(f && dpo_entry_floats(dpo_file_find(f, "a"), 0, 5, x) && !memcmp(x, one, sizeof one), "E4M3: %g %g %g %g: %s",
          (double)x[0], (double)x[1], (double)x[2], (double)x[3], why(c));
    CHECK(f && dpo_entry_floats(dpo_file_find(f, "b"), 0, 5, x) && !memcmp(x, two, sizeof two), "E5M2: %g %g %g %g",
          (double)x[0], (double)x[1], (double)x[2], (double)x[3]);
    dpo_close(c);
}

/* All 65536 values of a 16-bit type in the other, through the table that large tensors take, against one by one. */
static void test_sixteen_bits(void)
{
    static const char *const headers[] = {
        "{\"a\":{\"dtype\":\"F16\",\"shape\":[65536],\"data_offsets\":[0,131072]}}",
        "{\"a\":{\"dtype\":\"BF16\",\"shape\":[65536],\"data_offsets\":[0,131072]}}" };
    for (int from = 0; from < 2; from++) {
        uint64_t       n = strlen(headers[from]);
        unsigned char *bytes = (unsigned char *)calloc(8 + (size_t)n + 131072, 1);
        uint16_t      *out = (uint16_t *)calloc(65536, 2), want;
        dpo_ctx       *c = open_plain();
        dpo_file      *f;
        int            wrong = 0, to = from ? DPO_F16 : DPO_BF16;
        memcpy(bytes, &n, 8);
        memcpy(bytes + 8, headers[from], (size_t)n);
        for (int i = 0; i < 65536; i++) { want = (uint16_t)i; memcpy(bytes + 8 + n + 2*i, &want, 2); }
        f = dpo_safetensors_memory(c, bytes, 8 + (size_t)n + 131072, "sixteen");
        CHECK(f && dpoi_entry_values(dpo_file_find(f, "a"), 0, 65536, to, out), "%s", why(c));
        for (int i = 0; i < 65536; i++) {
            float x = from ? dpoi_bf16_to_f32((uint16_t)i) : dpoi_f16_to_f32((uint16_t)i);
            dpoi_narrow(to, 1, &x, &want);
            wrong += out[i] != want;
        }
        CHECK(!wrong, "%d values of %s are rounded otherwise", wrong, from ? "BF16" : "F16");
        dpo_close(c);
        free(out);
        free(bytes);
    }
}

/* ---- misuse, and allocations that fail --------------------------------------------------------------------------- */

static void test_misuse(void)
{
    dpo_ctx           *c = open_plain();
    dpo_model         *m = dpo_model_load(c, FOLDER "/sd1", DPO_F32);
    dpo_adapter_format d;
    memset(&d, 0, sizeof d);
    CHECK(!dpo_model_save_file(NULL, "x", DPO_F32) && !dpo_model_adapter_load(NULL, "x") && !dpo_adapter_merge(NULL)
          && !dpo_model_load_with(c, "x", NULL) && !dpo_model_load(c, NULL, DPO_F32) && !dpo_error(c), "NULL in, NULL out");
    CHECK(dpo_file_describe(NULL).params == 0 && !dpo_file_describe(NULL).what[0], "nothing is nothing");
    CHECK(!dpo_model_save_file(m, FOLDER "/x.safetensors", DPO_I32) && strstr(why(c), "saved as"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_model_adapter_save(m, FOLDER "/x.safetensors", &d) && strstr(why(c), "no adapters"), "%s", why(c));
    dpo_clear_error(c);
    d.naming = 7;
    CHECK(!dpo_model_adapter_save(m, FOLDER "/x.safetensors", &d) && strstr(why(c), "not 7"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(make(c, FOLDER "/pixels"), "%s", why(c));
    CHECK(!dpo_model_save_file(dpo_model_load(c, FOLDER "/pixels", DPO_F32), FOLDER "/x.safetensors", DPO_F32)
          && strstr(why(c), "a model of pixels has no original naming"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_model_adapter_load(m, FOLDER "/sd1.safetensors") && strstr(why(c), "it is Stable Diffusion 1.x, a whole"),
          "%s", why(c));
    dpo_close(c);
}

/* Pictures and texts may have another type than the UNet's weights. */
static void test_input_types(const family *k)
{
    static const struct { int type; double tolerance; } kinds[] = { { DPO_BF16, 3e-2 }, { DPO_F16, 4e-3 } };
    dpo_ctx *c = open_plain();
    char     folder[128];
    snprintf(folder, sizeof folder, FOLDER "/%s", k->name);
    for (int dtype = DPO_F32; dtype <= DPO_BF16; dtype++) {
        dpo_model  *m = dpo_model_load(c, folder, dtype);
        dpo_unet_in in = input_for(m), other;
        dpo_tensor *want = dpo_unet(dpo_model_unet(m), &in), *y;
        for (int i = 0; i < 2; i++) {
            other = in;
            other.x = dpo_cast(c, in.x, kinds[i].type);
            other.emb = dpo_cast(c, in.emb, kinds[i].type);
            if (in.pooled) other.pooled = dpo_cast(c, in.pooled, kinds[i].type);
            y = dpo_unet(dpo_model_unet(m), &other);
            CHECK(y && difference(y, want) <= kinds[i].tolerance + (dtype ? 3e-2 : 0), "%s, weights of type %d, inputs of %d: %g, %s",
                  k->name, dtype, kinds[i].type, difference(y, want), why(c));
        }
    }
    dpo_close(c);
}

/* Everything once. */
static void all_of_it(dpo_ctx *c)
{
    dpo_adapter_format d;
    dpo_model         *m = load_with(c, FOLDER "/sdxl.safetensors", FOLDER "/sdxl");
    memset(&d, 0, sizeof d);
    d.naming = DPO_PEFT;
    if (!m) return;
    dpo_model_save_file(m, FOLDER "/oom.safetensors", DPO_F16);
    dpo_model_adapter_load(m, FOLDER "/sdxl-kohya.safetensors");
    dpo_model_adapter_save(m, FOLDER "/oom.safetensors", &d);
    dpo_adapter_merge(dpo_model_unet(m));
    dpo_adapter_convert(c, FOLDER "/sdxl-kohya.safetensors", FOLDER "/oom.safetensors", &d, FOLDER "/sdxl");
}

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) test_round_trip(&families[i]);
    test_openclip();
    test_published();
    test_families();
    test_forms();
    test_other_vae();
    test_markers();
    test_tokenizers();
    test_whole_tokenizer();
    test_refused();
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) test_adapters(&families[i]);
    test_dialects();
    test_bad_adapters();
    test_eight_bits();
    test_sixteen_bits();
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) test_input_types(&families[i]);
    test_misuse();
    test_failing(all_of_it, argc > 1 && strcmp(argv[1], "every") == 0, 60);
    return test_report();
}
