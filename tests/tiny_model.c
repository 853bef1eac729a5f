/* tiny_model.c - a pipeline of two small levels with random weights, and captions for it: for tests of programs.

   build   cc -O1 tests/tiny_model.c -o build/tiny_model -lm -lpthread
   run     build/tiny_model DIR          makes DIR, in the layout of examples/emoji: 8x8 pixels, 16 tokens, 600 captions */
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"
#include <stdio.h>

static const char INDEX[] = "{\"_class_name\": \"StableDiffusionPipeline\", \"_diffusers_version\": \"0.30.0\",\n"
    " \"scheduler\": [\"diffusers\", \"DDIMScheduler\"], \"text_encoder\": [\"transformers\", \"CLIPTextModel\"],\n"
    " \"tokenizer\": [\"transformers\", \"CLIPTokenizer\"], \"unet\": [\"diffusers\", \"UNet2DConditionModel\"]}\n";
static const char SCHEDULE[] = "{\"_class_name\": \"DDIMScheduler\", \"num_train_timesteps\": 1000, \"beta_schedule\": \"squaredcos_cap_v2\",\n"
    " \"beta_start\": 0.0001, \"beta_end\": 0.02, \"prediction_type\": \"v_prediction\", \"timestep_spacing\": \"trailing\",\n"
    " \"steps_offset\": 0, \"clip_sample\": true, \"set_alpha_to_one\": true}\n";
static const char UNET[] = "{\"_class_name\": \"UNet2DConditionModel\", \"sample_size\": 8, \"in_channels\": 3, \"out_channels\": 3,\n"
    " \"block_out_channels\": [8, 16], \"layers_per_block\": 1, \"down_block_types\": [\"DownBlock2D\", \"CrossAttnDownBlock2D\"],\n"
    " \"up_block_types\": [\"CrossAttnUpBlock2D\", \"UpBlock2D\"], \"cross_attention_dim\": 16, \"attention_head_dim\": 2,\n"
    " \"norm_num_groups\": 4}\n";
static const char TEXT[] = "{\"architectures\": [\"CLIPTextModel\"], \"model_type\": \"clip_text_model\", \"vocab_size\": 514,\n"
    " \"hidden_size\": 16, \"intermediate_size\": 32, \"num_hidden_layers\": 1, \"num_attention_heads\": 2,\n"
    " \"max_position_embeddings\": 16, \"hidden_act\": \"quick_gelu\", \"layer_norm_eps\": 1e-05, \"projection_dim\": 16,\n"
    " \"bos_token_id\": 512, \"eos_token_id\": 513, \"pad_token_id\": 513}\n";
static const char TOKENS[] = "{\"tokenizer_class\": \"CLIPTokenizer\", \"model_max_length\": 16, \"pad_token\": \"<|endoftext|>\",\n"
    " \"bos_token\": \"<|startoftext|>\", \"eos_token\": \"<|endoftext|>\", \"unk_token\": \"<|endoftext|>\"}\n";

static FILE *create(const char *folder, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return fopen(path, "wb");
}

static int put(const char *folder, const char *name, const char *text)
{
    FILE *f = create(folder, name);
    if (!f) return 0;
    fputs(text, f);
    return fclose(f) == 0;
}

/* The character that GPT-2 writes for a byte: itself where it prints, else the next one from U+0100 on. */
static void put_byte(FILE *f, int byte, int *above)
{
    int u = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173) ? byte : 256 + (*above)++;
    if (u == '"' || u == '\\') fputc('\\', f);
    if (u < 0x80) fputc(u, f);
    else { fputc(0xc0 | u >> 6, f); fputc(0x80 | (u & 63), f); }
}

/* 256 bytes inside a word, 256 that end one, no merges. */
static int put_vocabulary(const char *folder)
{
    FILE *f = create(folder, "tokenizer/vocab.json");
    if (!f) return 0;
    fputc('{', f);
    for (int k = 0, above = 0; k < 512; k++) {
        if (k == 256) above = 0;
        fputc('"', f);
        put_byte(f, k % 256, &above);
        fprintf(f, "%s\": %d, ", k < 256 ? "" : "</w>", k);
    }
    fputs("\"<|startoftext|>\": 512, \"<|endoftext|>\": 513}\n", f);
    return fclose(f) == 0 && put(folder, "tokenizer/merges.txt", "#version: 0.2\n");
}

/* With all that JSON and HTML must escape. */
static int put_captions(const char *folder)
{
    FILE *f = create(folder, "captions.jsonl");
    if (!f) return 0;
    for (int i = 0; i < 600; i++)
        fprintf(f, "{\"caption\": \"thing <%d> & \\\"more\\\" \\u00e9\", \"split\": \"%s\"}\n", i, i % 10 ? "train" : "held");
    return fclose(f) == 0;
}

static int make(dpo_ctx *c, const char *folder)
{
    static const char *const parts[] = { "unet", "text_encoder", "tokenizer", "scheduler" };
    char path[1024];
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, parts[i]);
        if (!dpo_make_folder(c, path)) return 0;
    }
    return put(folder, "model_index.json", INDEX) && put(folder, "scheduler/scheduler_config.json", SCHEDULE)
        && put(folder, "unet/config.json", UNET) && put(folder, "text_encoder/config.json", TEXT)
        && put(folder, "tokenizer/tokenizer_config.json", TOKENS) && put_vocabulary(folder) && put_captions(folder)
        && dpo_model_save(dpo_model_create(c, folder, 1), folder, DPO_F16);
}

int main(int argc, char **argv)
{
    dpo_desc desc = { 0 };
    dpo_ctx *c = dpo_open(&desc);
    int      ok = argc == 2 && make(c, argv[1]);
    if (!ok) fprintf(stderr, "tiny_model: %s\n", dpo_error(c) ? dpo_error(c) : "usage: tiny_model DIR, which must be writable");
    dpo_close(c);
    return !ok;
}
