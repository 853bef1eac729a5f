/* pretrain.c - train a small text-to-image model from nothing, on the emoji of emoji_data.c.

   build   cc -O2 examples/pretrain.c -o pretrain -lm -lpthread
   run     ./emoji_data emoji-data --size 16
           ./pretrain emoji-data emoji [--steps 12000] [--batch 16] [--lr 1e-3] [--seed 1] [--bias 2]
                      [--stop STEP] [--minutes M] [--threads N] [--from PIPELINE] [--bf16]
                      [--device cpu|cuda]
   result  emoji/            a pipeline folder in the layout of diffusers, F16: tokenizer, text encoder, UNet, schedule
           emoji-state/      the state of the run; called again with the same settings, it goes on from there

   The vocabulary is trained first, by byte-pair merging of the training captions; then the UNet and the text encoder
   learn together, by the objective of arXiv 2006.11239 with v prediction (2202.00512); what is saved is the moving
   average of their weights.  Pictures whose captions are "held" are never seen. */
#include <stdio.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"

/* ---- Vocabulary: byte-pair merges of the captions' words (arXiv 1508.07909), in CLIP's two files --------------- */

enum { MERGES = 3000, TOKENS = 16, WORD = 48, WORDS = 4096, UNITS = 512, LAST = 256 };

/* A symbol is a number: 0..255 a byte, 256..511 a byte that ends a word, 512+k the result of merge k. */
typedef struct { int symbol[WORD], length, count; } word;
typedef struct { word words[WORDS]; int count; int left[MERGES], right[MERGES], merges; } vocabulary;

/* The character that stands for a byte in the files: itself where it prints, else one from 256 up, as GPT-2 chose. */
static int unit_of(int byte)
{
    int above = 256;
    if ((byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173)) return byte;
    for (int b = 0; b < byte; b++) above += !((b >= 33 && b <= 126) || (b >= 161 && b != 173));
    return above;
}

/* The text of a symbol; `quoted` escapes what JSON must not hold raw. */
static void put_symbol(FILE *f, const vocabulary *v, int s, int quoted)
{
    if (s >= UNITS) {
        put_symbol(f, v, v->left[s - UNITS], quoted);
        put_symbol(f, v, v->right[s - UNITS], quoted);
        return;
    }
    int u = unit_of(s % LAST);
    if (quoted && (u == '"' || u == '\\')) fputc('\\', f);
    if (u < 0x80) fputc(u, f);
    else { fputc(0xc0 | u >> 6, f); fputc(0x80 | (u & 63), f); }
    if (s >= LAST) fputs("</w>", f);
}

static int is_letter(int b) { return (b >= 'a' && b <= 'z') || b >= 128; }

/* Count the words of a caption, cut as the tokenizer cuts: letters, one digit, or other signs. */
static void add_caption(vocabulary *v, const char *text)
{
    const unsigned char *p = (const unsigned char *)text;
    while (*p) {
        word w = { { 0 }, 0, 1 };
        int  digit = *p >= '0' && *p <= '9', letter = is_letter(*p);
        if (*p == ' ') { p++; continue; }
        do w.symbol[w.length++] = *p++;
        while (!digit && *p && *p != ' ' && !(*p >= '0' && *p <= '9') && is_letter(*p) == letter && w.length < WORD);
        w.symbol[w.length - 1] += LAST;
        int i = 0;
        while (i < v->count && (v->words[i].length != w.length || memcmp(v->words[i].symbol, w.symbol, sizeof w.symbol))) i++;
        if (i < v->count) v->words[i].count++;
        else if (v->count < WORDS) v->words[v->count++] = w;
    }
}

/* The pair of neighbours that occurs most often, the first found of equals; 0 if none is left: then every word is one
   token, and a network this small need not learn to spell. */
static int best_pair(const vocabulary *v, int *left, int *right)
{
    enum { SIZE = UNITS + MERGES };
    int *seen = (int *)calloc((size_t)SIZE * SIZE, sizeof *seen), best = 0;
    if (!seen) return 0;
    for (int i = 0; i < v->count; i++)
        for (int k = 0; k + 1 < v->words[i].length; k++) {
            int *n = &seen[v->words[i].symbol[k] * SIZE + v->words[i].symbol[k + 1]];
            *n += v->words[i].count;
            if (*n > best) { best = *n; *left = v->words[i].symbol[k]; *right = v->words[i].symbol[k + 1]; }
        }
    free(seen);
    return best > 0;
}

static void merge_pair(vocabulary *v, int left, int right)
{
    int made = UNITS + v->merges;
    v->left[v->merges] = left;
    v->right[v->merges++] = right;
    for (int i = 0; i < v->count; i++) {
        word *w = &v->words[i];
        int   n = 0;
        for (int k = 0; k < w->length; k++) {
            int both = k + 1 < w->length && w->symbol[k] == left && w->symbol[k + 1] == right;
            w->symbol[n++] = both ? made : w->symbol[k];
            k += both;
        }
        w->length = n;
    }
}

static FILE *create(const char *folder, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (!f) fprintf(stderr, "pretrain: cannot write %s\n", path);
    return f;
}

static int write_vocabulary(const vocabulary *v, const char *folder)
{
    FILE *f = create(folder, "tokenizer/vocab.json"), *g = create(folder, "tokenizer/merges.txt");
    int   n = UNITS + v->merges, ok = f && g;
    for (int s = 0; ok && s < n; s++) {
        fputs(s ? ", \"" : "{\"", f);
        put_symbol(f, v, s, 1);
        fprintf(f, "\": %d", s);
    }
    if (ok) fprintf(f, ", \"<|startoftext|>\": %d, \"<|endoftext|>\": %d}", n, n + 1);
    if (ok) fputs("#version: 0.2\n", g);
    for (int k = 0; ok && k < v->merges; k++) {
        put_symbol(g, v, v->left[k], 0);
        fputc(' ', g);
        put_symbol(g, v, v->right[k], 0);
        fputc('\n', g);
    }
    if (f && fclose(f)) ok = 0;
    if (g && fclose(g)) ok = 0;
    return ok;
}

/* ---- Configuration: what the networks are, in the words of diffusers and transformers --------------------------- */

static const char MODEL[] = "{\"_class_name\": \"StableDiffusionPipeline\", \"_diffusers_version\": \"0.30.0\",\n"
    " \"scheduler\": [\"diffusers\", \"DDIMScheduler\"], \"text_encoder\": [\"transformers\", \"CLIPTextModel\"],\n"
    " \"tokenizer\": [\"transformers\", \"CLIPTokenizer\"], \"unet\": [\"diffusers\", \"UNet2DConditionModel\"]}\n";
static const char SCHEDULE[] = "{\"_class_name\": \"DDIMScheduler\", \"_diffusers_version\": \"0.30.0\", \"num_train_timesteps\": 1000,\n"
    " \"beta_schedule\": \"squaredcos_cap_v2\", \"beta_start\": 0.0001, \"beta_end\": 0.02, \"prediction_type\": \"v_prediction\",\n"
    " \"timestep_spacing\": \"trailing\", \"steps_offset\": 0, \"clip_sample\": true, \"set_alpha_to_one\": true}\n";
static const char UNET[] = "{\"_class_name\": \"UNet2DConditionModel\", \"_diffusers_version\": \"0.30.0\", \"sample_size\": 16,\n"
    " \"in_channels\": 3, \"out_channels\": 3, \"block_out_channels\": [32, 64, 96], \"layers_per_block\": 1,\n"
    " \"down_block_types\": [\"DownBlock2D\", \"CrossAttnDownBlock2D\", \"CrossAttnDownBlock2D\"],\n"
    " \"up_block_types\": [\"CrossAttnUpBlock2D\", \"CrossAttnUpBlock2D\", \"UpBlock2D\"],\n"
    " \"cross_attention_dim\": 128, \"attention_head_dim\": 4, \"norm_num_groups\": 16}\n";
static const char TEXT[] = "{\"architectures\": [\"CLIPTextModel\"], \"model_type\": \"clip_text_model\", \"vocab_size\": %d,\n"
    " \"hidden_size\": 128, \"intermediate_size\": 512, \"num_hidden_layers\": 2, \"num_attention_heads\": 4,\n"
    " \"max_position_embeddings\": %d, \"hidden_act\": \"quick_gelu\", \"layer_norm_eps\": 1e-05, \"projection_dim\": 128,\n"
    " \"bos_token_id\": %d, \"eos_token_id\": %d, \"pad_token_id\": %d}\n";
static const char TOKENIZER[] = "{\"tokenizer_class\": \"CLIPTokenizer\", \"model_max_length\": %d, \"pad_token\": \"<|endoftext|>\",\n"
    " \"bos_token\": \"<|startoftext|>\", \"eos_token\": \"<|endoftext|>\", \"unk_token\": \"<|endoftext|>\"}\n";

static int write_text(const char *folder, const char *name, const char *format, int a, int b, int c, int d, int e)
{
    FILE *f = create(folder, name);
    if (!f) return 0;
    fprintf(f, format, a, b, c, d, e);
    return fclose(f) == 0;
}

static int write_folder(dpo_ctx *c, const vocabulary *v, const char *folder)
{
    static const char *const parts[] = { "tokenizer", "text_encoder", "unet", "scheduler" };
    char path[1024];
    int  end = UNITS + v->merges + 1;
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, parts[i]);
        if (!dpo_make_folder(c, path)) return 0;
    }
    return write_vocabulary(v, folder)
        && write_text(folder, "model_index.json", MODEL, 0, 0, 0, 0, 0)
        && write_text(folder, "scheduler/scheduler_config.json", SCHEDULE, 0, 0, 0, 0, 0)
        && write_text(folder, "unet/config.json", UNET, 0, 0, 0, 0, 0)
        && write_text(folder, "tokenizer/tokenizer_config.json", TOKENIZER, TOKENS, 0, 0, 0, 0)
        && write_text(folder, "text_encoder/config.json", TEXT, end + 1, TOKENS, end - 1, end, end);
}

/* ---- Data and the run ------------------------------------------------------------------------------------------- */

typedef struct {
    const char *data, *out, *from;
    int64_t     steps, stop;
    int         batch, threads, bf16, cuda;     /* bf16: products of rounded factors, where the CPU has AMX */
    float       lr, bias;
    uint64_t    seed;
    double      minutes, start;
} settings;

/* Training rows of captions.jsonl: into the vocabulary (v) or, if v is NULL, with their pictures into the pairs. */
static int64_t read_captions(dpo_ctx *c, const settings *s, vocabulary *v, dpo_pairs *pairs)
{
    char    path[1024], line[1024], picture[1100];
    int64_t n = 0;
    snprintf(path, sizeof path, "%s/captions.jsonl", s->data);
    FILE *f = fopen(path, "rb");
    if (!f) { fprintf(stderr, "pretrain: cannot read %s: make it with emoji_data\n", path); return 0; }
    while (fgets(line, sizeof line, f)) {
        dpo_json   *row = dpo_json_parse(c, line, strlen(line), path);
        const char *caption = dpo_json_text(dpo_json_get(row, "caption"), NULL);
        const char *image = dpo_json_text(dpo_json_get(row, "image"), NULL);
        const char *split = dpo_json_text(dpo_json_get(row, "split"), NULL);
        if (caption && image && split && !strcmp(split, "train")) {
            n++;
            if (v) add_caption(v, caption);
            else {
                snprintf(picture, sizeof picture, "%s/%s", s->data, image);
                dpo_pairs_add_files(pairs, caption, picture, NULL, 1);
            }
        }
        dpo_json_free(row);
    }
    fclose(f);
    return n;
}

static int report(void *user, const dpo_progress *p)
{
    const settings *s = (const settings *)user;
    double          seconds = dpo_seconds() - s->start;
    if (p->step % 50 == 0 || p->step == p->steps)
        printf("step %lld/%lld  loss %.4f  lr %.5f  |g| %.2f  %.0f pictures/s  %.0f s\n", (long long)p->step,
               (long long)p->steps, p->loss, p->lr, p->grad_norm, p->pairs_per_second, seconds);
    fflush(stdout);
    return (s->minutes > 0 && seconds > s->minutes * 60) || p->step == s->stop;
}

static dpo_train_desc recipe(const settings *s, const char *state)
{
    dpo_train_desc t;
    memset(&t, 0, sizeof t);
    t.objective = DPO_SFT;
    t.steps = s->steps;
    t.batch = s->batch;
    t.lr = s->lr;
    t.lr_schedule = DPO_LR_COSINE;
    t.warmup = 200;
    t.adamw.beta2 = 0.99f;                /* small batches, many steps: a short memory of squares */
    t.adamw.weight_decay = 0.01f;
    t.adamw.max_norm = 1;
    t.train_text = 1;
    t.average = 0.999f;
    t.empty_prompts = 0.1f;
    t.timestep_bias = s->bias;            /* much noise is where the prompt decides */
    t.seed = s->seed;
    t.output = state;
    t.save_every = 1000;
    t.resume = 1;
    return t;
}

/* Train, then save the averages: a run that was stopped goes on where it was. */
static int run(dpo_ctx *c, settings *s)
{
    char         state[1024];
    vocabulary  *v = (vocabulary *)calloc(1, sizeof *v);
    int          left = 0, right = 0;
    dpo_progress p;
    snprintf(state, sizeof state, "%s-state", s->out);
    if (!v || !read_captions(c, s, v, NULL)) { free(v); return 0; }
    while (v->merges < MERGES && best_pair(v, &left, &right)) merge_pair(v, left, right);
    printf("%d different words, %d merges\n", v->count, v->merges);
    int ok = write_folder(c, v, s->out);
    free(v);
    if (!ok) return 0;
    dpo_model *m = s->from ? dpo_model_load(c, s->from, DPO_F32) : dpo_model_create(c, s->out, s->seed);
    dpo_pairs *pairs = dpo_pairs_new(c);
    printf("%lld pictures\n", (long long)read_captions(c, s, NULL, pairs));
    dpo_train_desc t = recipe(s, state);
    t.on_step = report;
    t.user = s;
    s->start = dpo_seconds();
    dpo_trainer *trainer = dpo_train_begin(m, pairs, &t);
    while (dpo_train_step(trainer, &p)) {}
    ok = dpo_train_average(trainer) && dpo_model_save(m, s->out, DPO_F16) && dpo_train_average(trainer);
    return dpo_train_end(trainer) && ok;
}

int main(int argc, char **argv)
{
    settings s = { NULL, NULL, NULL, 12000, 0, 16, 0, 0, 0, 1e-3f, 2, 1, 0, 0 };
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--steps"))        { s.steps = atoi(value); i++; }
        else if (!strcmp(argv[i], "--batch"))   { s.batch = atoi(value); i++; }
        else if (!strcmp(argv[i], "--device")) { s.cuda = !strcmp(value, "cuda"); i++; }
        else if (!strcmp(argv[i], "--threads")) { s.threads = atoi(value); i++; }
        else if (!strcmp(argv[i], "--from"))    { s.from = value; i++; }
        else if (!strcmp(argv[i], "--bf16"))    s.bf16 = 1;
        else if (!strcmp(argv[i], "--bias"))    { s.bias = (float)atof(value); i++; }
        else if (!strcmp(argv[i], "--stop"))    { s.stop = atoi(value); i++; }
        else if (!strcmp(argv[i], "--lr"))      { s.lr = (float)atof(value); i++; }
        else if (!strcmp(argv[i], "--seed"))    { s.seed = (uint64_t)atoll(value); i++; }
        else if (!strcmp(argv[i], "--minutes")) { s.minutes = atof(value); i++; }
        else if (!s.data) s.data = argv[i];
        else s.out = argv[i];
    }
    if (!s.out) { fprintf(stderr, "usage: pretrain DATA OUT [--steps N] [--batch N] [--lr X] [--seed N]\n"
            "                [--bias B] [--stop STEP] [--minutes M] [--threads N] [--from PIPELINE] [--bf16] [--device cpu|cuda]\n"); return 2; }
    dpo_desc desc = { 0 };
    desc.log = dpo_log_stderr;
    desc.threads = s.threads;
    desc.products = s.bf16 ? DPO_BF16 : DPO_F32;
#ifdef DIFFDPO_CUDA
    if (s.cuda) {
        desc.backend = dpo_cuda_open(0, DIFFDPO_VERSION);
        dpo_cuda_set(desc.backend, DPO_CUDA_PRODUCTS, desc.products);
    }
#else
    if (s.cuda) { fprintf(stderr, "pretrain: this build has no CUDA; diffdpo_cuda.cu says how to make one\n"); return 2; }
#endif
    dpo_ctx *c = dpo_open(&desc);
    int      ok = run(c, &s);
    if (!ok && !dpo_error(c)) fprintf(stderr, "pretrain: stopped\n");
    dpo_close(c);
    return !ok;
}
