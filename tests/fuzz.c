/* fuzz.c - hostile bytes for the readers: safetensors, JSON, tokenizer, names of checkpoints, adapters, manifests of pairs,
   caches.

   fuzzer  clang -g -O1 -fsanitize=fuzzer,address,undefined -DFUZZ_JSON tests/fuzz.c -o fuzz_json -lm -lpthread
           (-DFUZZ_SAFETENSORS, -DFUZZ_TOKENIZER, -DFUZZ_NAMES, -DFUZZ_ADAPTERS, -DFUZZ_PAIRS, -DFUZZ_CACHE), then ./fuzz_json -runs=1000000
   driver  cc -g -O1 -fsanitize=address,undefined tests/fuzz.c -o fuzz -lm -lpthread, then ./fuzz [N] [seed]: N random
           changes of built-in seeds for each reader */
#define DIFFDPO_IMPLEMENTATION
#ifndef FUZZ_HEADER
#define FUZZ_HEADER "../diffdpo.h"
#endif
#include FUZZ_HEADER
#include "dpo_test.h"

static dpo_ctx *fuzz_context(void)
{
    static dpo_ctx *c;
    if (!c) { dpo_desc d; memset(&d, 0, sizeof d); d.threads = 1; c = dpo_open(&d); }
    return c;
}

static void fuzz_need(int ok, const char *what) { if (!ok) { fprintf(stderr, "fuzz: %s\n", what); abort(); } }

/* An exact copy on the heap, so that a sanitizer sees one byte too many. */
static char *fuzz_copy(const uint8_t *data, size_t n)
{
    char *p = (char *)malloc(n ? n : 1);
    if (!p) abort();
    if (n) memcpy(p, data, n);
    return p;
}

/* ---------------------------------------------------------------------------------------------- JSON */

static int64_t fuzz_walk(const dpo_json *v, int depth)
{
    int64_t n = 1, whole;
    double  x;
    size_t  bytes = 0;
    fuzz_need(depth <= 64, "JSON deeper than 64");
    if (dpo_json_text(v, &bytes)) fuzz_need(dpo_json_text(v, NULL)[bytes] == 0, "a string without its zero");
    if (dpo_json_double(v, &x)) fuzz_need(x == x, "a NaN from JSON");
    dpo_json_int(v, &whole);
    for (int64_t i = 0; i < dpo_json_count(v); i++) {
        const dpo_json *m = dpo_json_at(v, i);
        if (dpo_json_type(v) == DPO_JSON_OBJECT) fuzz_need(dpo_json_get(v, dpo_json_key(m)) == m,
                                                           "a member that is not found");
        n += fuzz_walk(m, depth + 1);
    }
    return n;
}

static void fuzz_json(const uint8_t *data, size_t n)
{
    dpo_ctx  *c = fuzz_context();
    char     *p = fuzz_copy(data, n);
    dpo_json *j = dpo_json_parse(c, p, n, "fuzz.json");
    fuzz_need(!j == !!dpo_error(c), "a result and an error, or neither");
    if (j) {
        fuzz_walk(j, 0);
        dpo_json_want_int(j, "a", 1, 0, 9);
        dpo_json_free(j);
    }
    dpo_clear_error(c);
    free(p);
}

/* ---------------------------------------------------------------------------------------------- safetensors */

static void fuzz_safetensors(const uint8_t *data, size_t n)
{
    dpo_ctx  *c = fuzz_context();
    char     *p = fuzz_copy(data, n);
    dpo_file *f = dpo_safetensors_memory(c, p, n, "fuzz.safetensors");
    float     x[8];
    int64_t   k[8];
    fuzz_need(!f == !!dpo_error(c), "a file and an error, or neither");
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        dpo_entry *e = dpo_file_entry(f, i);
        int64_t    some = e->count < 8 ? e->count : 8;
        fuzz_need(dpo_file_find(f, e->name) == e, "a tensor that is not found");
        fuzz_need(e->bytes <= n, "a tensor larger than its file");
        dpo_entry_floats(e, 0, some, x);
        dpo_entry_floats(e, e->count - some, some, x);
        dpo_clear_error(c);
        dpo_entry_ints(e, e->count - some, some, k);
        dpo_clear_error(c);
    }
    dpo_file_metadata(f, "format");
    dpo_file_close(f);
    dpo_clear_error(c);
    free(p);
}

/* ---------------------------------------------------------------------------------------------- tokenizer */

static const char fuzz_merges[] =
    "#version: 0.2\nt h\nth e</w>\na n\nan d</w>\no n</w>\ni n\nin g</w>\ne r</w>\n' s</w>\n! !\n!! !</w>\n";

/* Byte symbols, their word-end forms, what the merges make, two special tokens. */
static char *fuzz_vocab(void)
{
    static const char *const more[] = { "th", "the</w>", "an", "and</w>", "on</w>", "in", "ing</w>", "er</w>",
                                       "'s</w>", "!!", "!!!</w>",
                                        "<|startoftext|>", "<|endoftext|>" };
    dpoi_text t;
    char      symbol[16];
    int       id = 0;
    dpoi_text_start(&t, fuzz_context());
    for (int end = 0; end < 2; end++) {
        for (int b = 0; b < 256; b++) {
            int n = dpoi_utf8_write(symbol, dpoi_tok_symbol(b));
            strcpy(symbol + n, end ? "</w>" : "");
            dpoi_text_add(&t, id ? "," : "{");
            dpoi_text_quote(&t, symbol);
            dpoi_text_format(&t, ":%d", id++);
        }
    }
    for (size_t k = 0; k < sizeof more / sizeof *more; k++) dpoi_text_format(&t, ",\"%s\":%d", more[k], id++);
    dpoi_text_add(&t, "}");
    {
        char *s = fuzz_copy((const uint8_t *)t.at, (size_t)t.n + 1);
        dpoi_text_free(&t);
        return s;
    }
}

/* First byte even: the rest is a prompt.  Odd: a vocabulary, a zero byte, merges. */
static void fuzz_tokenizer(const uint8_t *data, size_t n)
{
    static dpo_tokenizer *good;
    dpo_ctx *c = fuzz_context();
    int32_t  ids[16];
    if (!good) {
        char *vocab = fuzz_vocab();
        good = dpo_tokenizer_new(c, vocab, strlen(vocab), fuzz_merges, strlen(fuzz_merges));
        free(vocab);
        fuzz_need(good != NULL, dpo_error(c));
    }
    if (!n) return;
    if (data[0] % 2 == 0) {
        char *text = (char *)calloc(n, 1);
        int   used;
        memcpy(text, data + 1, n - 1);
        used = dpo_tokenize(good, text, ids, 16);
        fuzz_need(used >= 2 && used <= 16 && ids[0] == 523 && ids[used - 1] == 524, "a prompt that is not framed");
        for (int i = 0; i < 16; i++) fuzz_need(ids[i] >= 0 && ids[i] < 525, "an id outside the vocabulary");
        free(text);
    } else {
        const uint8_t *cut = (const uint8_t *)memchr(data + 1, 0, n - 1);
        size_t         v = cut ? (size_t)(cut - data - 1) : n - 1, m = cut ? n - v - 2 : 0;
        char          *vocab = fuzz_copy(data + 1, v), *merges = fuzz_copy(cut ? cut + 1 : data, m);
        dpo_tokenizer *t = dpo_tokenizer_new(c, vocab, v, merges, m);
        fuzz_need(!t == !!dpo_error(c), "a tokenizer and an error, or neither");
        if (t) fuzz_need(dpo_tokenize(t, "the an and thing's !!! on", ids, 16) >= 2, "a text that does not pass");
        dpo_tokenizer_free(t);
        free(vocab);
        free(merges);
    }
    dpo_clear_error(c);
}

/* ---------------------------------------------------------------------------------------------- names of files

   An input is lines "name|2,3": a file of such tensors, F32 and zero.  A first line that begins with '{' is the metadata
   of an adapter in peft's form. */

enum { FUZZ_BYTES = 1 << 16 };            /* of such a file */

/* The shape behind the last '|', each axis 0 to 63, four at most; *bytes: of the tensor. */
static int fuzz_shape(const char *s, const char *end, int *shape, size_t *bytes)
{
    int rank = 0, digits = 0;
    *bytes = 4;
    for (shape[0] = 0; s < end && rank < 4; s++) {
        if (*s >= '0' && *s <= '9') { shape[rank] = (shape[rank]*10 + (*s - '0')) % 64; digits = 1; }
        else { rank += digits; digits = 0; if (rank < 4) shape[rank] = 0; }
    }
    rank += digits && rank < 4;
    for (int i = 0; i < rank; i++) *bytes *= (size_t)shape[i];
    return rank;
}

/* The file that the lines describe, in p [FUZZ_BYTES]; its length. */
static size_t fuzz_file(const uint8_t *data, size_t n, uint8_t *p)
{
    const char *at = (const char *)data, *end = at + n;
    uint64_t    offset = 0, header;
    dpoi_text   t;
    int         any = 0;
    dpoi_text_start(&t, fuzz_context());
    dpoi_text_add(&t, "{\"__metadata__\":{\"format\":\"pt\"");
    for (; at < end; any++) {
        const char *line = (const char *)memchr(at, '\n', (size_t)(end - at)), *bar;
        char        name[400];
        int         shape[5], rank;
        size_t      bytes, length;
        if (!line) line = end;
        length = (size_t)(line - at);
        for (bar = line; bar > at && *bar != '|';) bar--;
        if (bar == at) bar = line;
        rank = fuzz_shape(bar, line, shape, &bytes);
        if (!any && *at == '{') bar = line;
        length = (size_t)(bar - at);
        if (length >= sizeof name) length = sizeof name - 1;
        memcpy(name, at, length);
        name[length] = 0;
        if (!any) dpoi_text_add(&t, *at == '{' ? ",\"lora_adapter_metadata\":" : "}");
        if (!any && *at == '{') { dpoi_text_quote(&t, name); dpoi_text_add(&t, "}"); }
        else if (offset + bytes < FUZZ_BYTES / 2) {
            dpoi_text_add(&t, ",");
            dpoi_text_quote(&t, name);
            dpoi_text_add(&t, ":{\"dtype\":\"F32\",\"shape\":[");
            for (int i = 0; i < rank; i++) dpoi_text_format(&t, "%s%d", i ? "," : "", shape[i]);
            dpoi_text_format(&t, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)offset,
                             (unsigned long long)(offset + bytes));
            offset += bytes;
        }
        at = line + 1;
    }
    if (!any) dpoi_text_add(&t, "}");
    dpoi_text_add(&t, "}");
    header = (uint64_t)t.n;
    if (8 + header + offset > FUZZ_BYTES) { dpoi_text_free(&t); return 0; }
    memcpy(p, &header, 8);
    memcpy(p + 8, t.at, (size_t)header);
    memset(p + 8 + header, 0, (size_t)offset);
    dpoi_text_free(&t);
    return (size_t)(8 + header + offset);
}

static const char fuzz_unet[] = "{\"block_out_channels\": [4, 8], \"layers_per_block\": 1, \"norm_num_groups\": 2,"
    "\"down_block_types\": [\"CrossAttnDownBlock2D\", \"DownBlock2D\"], \"up_block_types\": [\"UpBlock2D\","
    "\"CrossAttnUpBlock2D\"], \"cross_attention_dim\": 6, \"attention_head_dim\": 2}";
static const char fuzz_text[] = "{\"hidden_size\": 6, \"intermediate_size\": 8, \"num_hidden_layers\": 2,"
    "\"num_attention_heads\": 2, \"vocab_size\": 10, \"max_position_embeddings\": 4}";
static const char fuzz_vae[] = "{\"block_out_channels\": [4, 8], \"down_block_types\": [\"DownEncoderBlock2D\","
    "\"DownEncoderBlock2D\"], \"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\"], \"norm_num_groups\": 2}";

/* Networks that know their names and have no weights. */
static dpo_net *fuzz_net(int which)
{
    static dpo_net *nets[3];
    if (!nets[0]) {
        nets[0] = dpoi_net_plan(fuzz_context(), &dpoi_unet_kind, fuzz_unet, "unet", DPO_F32);
        nets[1] = dpoi_net_plan(fuzz_context(), &dpoi_clip_text, fuzz_text, "text", DPO_F32);
        nets[2] = dpoi_net_plan(fuzz_context(), &dpoi_vae_kind, fuzz_vae, "vae", DPO_F32);
        fuzz_need(nets[0] && nets[1] && nets[2], dpo_error(fuzz_context()));
    }
    return nets[which];
}

/* What the file is, and whether it holds one of three networks, in one of two namings, as the input's length says; then
   the input itself as one of our names. */
static void fuzz_names(const uint8_t *data, size_t n)
{
    static const dpoi_naming *const namings[] = { &dpoi_unet_naming, &dpoi_openclip_naming, &dpoi_vae_naming };
    static const char *const prefixes[] = { DPOI_UNET_PREFIX, "cond_stage_model.model.", "first_stage_model." };
    static uint8_t bytes[FUZZ_BYTES];
    dpo_ctx    *c = fuzz_context();
    size_t      length = fuzz_file(data, n, bytes);
    dpo_file   *f = length ? dpo_safetensors_memory(c, bytes, length, "fuzz.safetensors") : NULL;
    int         k = (int)(n % 3);
    dpo_net    *net = fuzz_net(k);
    char        name[DPOI_NAME], theirs[DPOI_NAME + 8];
    dpoi_layout layout;
    dpoi_origin s;
    dpo_clear_error(c);
    dpo_file_describe(f);
    dpoi_layout_of(net, &layout);
    memset(&s, 0, sizeof s);
    s.f = f;
    s.prefix = prefixes[k];
    s.layout = &layout;
    s.naming = n / 3 % 2 ? NULL : namings[k];
    if (f) dpoi_net_match(net, &s);
    dpo_clear_error(c);
    length = n < sizeof name - 1 ? n : sizeof name - 1;
    memcpy(name, data, length);
    name[length] = 0;
    strcpy(theirs + DPOI_NAME, "unhurt");
    dpoi_name_theirs(namings[k], &layout, prefixes[k], name, theirs);
    fuzz_need(strlen(theirs) < DPOI_NAME && !strcmp(theirs + DPOI_NAME, "unhurt"), "a name that is too long");
    dpo_file_close(f);
    dpo_clear_error(c);
}

/* The file as an adapter of a UNet and a text encoder: taken, or refused with nothing changed. */
static void fuzz_adapters(const uint8_t *data, size_t n)
{
    static uint8_t bytes[FUZZ_BYTES];
    dpo_ctx            *c = fuzz_context();
    size_t              length = fuzz_file(data, n, bytes);
    dpoi_adapter_source s;
    dpo_net            *nets[2];
    const char         *text;
    nets[0] = fuzz_net(0);
    nets[1] = fuzz_net(1);
    memset(&s, 0, sizeof s);
    s.f = length ? dpo_safetensors_memory(c, bytes, length, "fuzz.safetensors") : NULL;
    if ((text = dpo_file_metadata(s.f, "lora_adapter_metadata")) != NULL)
        s.config = dpo_json_parse(c, text, strlen(text), "lora_adapter_metadata");
    dpo_clear_error(c);
    if (s.f) {
        int ok = dpoi_adapters_read(nets, 2, &s);
        int64_t count = nets[0]->adapters.count + nets[1]->adapters.count;
        fuzz_need(ok == !dpo_error(c) && ok == (count > 0), "adapters and an error, or neither");
        for (int k = 0; k < 2; k++) {
            dpoi_adapter_set none;
            for (int64_t i = 0; i < nets[k]->adapters.count; i++)
                fuzz_need(fabsf(nets[k]->adapters.a[i].scale) <= FLT_MAX, "a scale that is not finite");
            memset(&none, 0, sizeof none);
            dpoi_adapters_set(nets[k], &none);
        }
    }
    dpo_clear_error(c);
    dpoi_adapter_close(&s);
    dpo_clear_error(c);
}

/* ---------------------------------------------------------------------------------------------- pairs

   The first byte chooses the form; pictures are this file, by which rows can be good. */

static void fuzz_pairs(const uint8_t *data, size_t n)
{
    static const char *const names[] = { "tests/fuzz.jsonl", "tests/fuzz.json", "tests/fuzz.csv", "tests/fuzz.tsv", "tests/fuzz" };
    dpo_ctx      *c = fuzz_context();
    dpo_pairs    *p = dpo_pairs_new(c);
    dpoi_manifest m;
    char         *text;
    int           ok;
    if (!n) return;
    text = fuzz_copy(data + 1, n - 1);
    memset(&m, 0, sizeof m);
    m.p = p;
    m.c = c;
    p->path = dpoi_strdup(c, names[data[0] % 5]);
    m.folder = dpoi_strdup(c, "tests");
    ok = dpoi_manifest_text(&m, text, n - 1);
    fuzz_need(ok == !dpo_error(c) && m.bad.count <= p->rows, "a result and an error, or neither");
    fuzz_need(p->rows <= (int64_t)n && p->rows >= m.bad.count, "more rows than bytes");
    for (int64_t i = 0; i < p->count; i++) {
        const dpoi_duel *x = &p->pair[i];
        fuzz_need(x->prompt && x->path[0] && x->weight >= 0 && x->weight <= 1e6f && x->line > 0, "a pair without its parts");
        fuzz_need(!x->liked || !x->path[1], "a single picture with a partner");
        fuzz_need(dpoi_exists(x->path[0]) && (!x->path[1] || dpoi_exists(x->path[1])), "a picture that is not there");
    }
    dpoi_strfree(c, m.folder);
    dpo_pairs_free(p);
    dpo_clear_error(c);
    free(text);
}

/* ---------------------------------------------------------------------------------------------- cache

   A good file of three records, in which the input changes bytes: place of two bytes, value.  Bit 0 of the first byte: the
   checksums of headers are made good again; bit 1: those of data too. */

#define FUZZ_CACHE_FOLDER "build/fuzz.tmp"

static dpo_key fuzz_key(int i) { dpo_key k; k.word[0] = (uint64_t)i; k.word[1] = 0; return k; }

/* Its bytes, made once. */
static const uint8_t *fuzz_cache_file(size_t *n)
{
    static uint8_t bytes[4096];
    static size_t  length;
    dpo_ctx *c = fuzz_context();
    if (!length) {
        int64_t     scope = dpo_scope(c), shape[3] = { 2, 3, 4 };
        float       v[24];
        dpo_tensor *x[2];
        dpo_cache  *k;
        dpo_key     key = fuzz_key(0);
        FILE       *f;
        dpoi_sys_remove(FUZZ_CACHE_FOLDER "/000001.dpocache");
        k = dpo_cache_open(c, FUZZ_CACHE_FOLDER);
        for (int i = 0; i < 24; i++) v[i] = (float)i;
        x[0] = dpo_tensor_from(c, DPO_F32, 3, shape, v);
        x[1] = dpo_tensor_from(c, DPO_F16, 2, shape, v);
        fuzz_need(dpo_cache_put(k, &key, x, 2), "a cache that keeps nothing");
        key = fuzz_key(1);
        fuzz_need(dpo_cache_put_floats(k, &key, v, 5), "a cache that keeps nothing");
        key = fuzz_key(2);
        fuzz_need(dpo_cache_put(k, &key, x + 1, 1), "a cache that keeps nothing");
        dpo_cache_close(k);
        dpo_scope_end(c, scope, NULL);
        f = fopen(FUZZ_CACHE_FOLDER "/000001.dpocache", "rb");
        fuzz_need(f != NULL, "a cache without its file");
        length = fread(bytes, 1, sizeof bytes, f);
        fclose(f);
    }
    *n = length;
    return bytes;
}

/* Checksums that fit what is there. */
static void fuzz_cache_mend(uint8_t *p, size_t n, int data)
{
    for (size_t at = 0; at + 64 <= n; at += 64) {
        uint64_t bytes = dpoi_load64(p + at + 24);
        if (memcmp(p + at, dpoi_cache_magic, 8)) continue;
        if (data && bytes <= n - at - 64) dpoi_store64(p + at + 32, dpoi_checksum(p + at + 64, (size_t)bytes));
        dpoi_store64(p + at + 56, dpoi_checksum(p + at, 56));
    }
}

static void fuzz_cache(const uint8_t *data, size_t n)
{
    static uint8_t bytes[4096];
    dpo_ctx       *c = fuzz_context();
    size_t         length;
    const uint8_t *good = fuzz_cache_file(&length);
    int64_t        scope = dpo_scope(c);
    dpo_cache     *k;
    FILE          *f;
    memcpy(bytes, good, length);
    for (size_t i = 1; i + 2 < n; i += 3) bytes[(size_t)(data[i] << 8 | data[i + 1]) % length] = data[i + 2];
    if (n && data[0] & 1) fuzz_cache_mend(bytes, length, data[0] & 2);
    if ((f = fopen(FUZZ_CACHE_FOLDER "/000001.dpocache", "wb")) != NULL) {
        fwrite(bytes, 1, length, f);
        fclose(f);
    }
    k = dpo_cache_open(c, FUZZ_CACHE_FOLDER);
    fuzz_need(k != NULL && dpo_cache_count(k) <= 16, "a cache that does not open");
    for (int i = 0; i < 3; i++) {
        dpo_key     key = fuzz_key(i);
        dpo_tensor *x[3];
        float       v[5];
        for (int t = 1; t < 4; t++)
            if (dpo_cache_get(k, &key, x, t)) fuzz_need(x[t - 1] && (size_t)dpo_count(x[t - 1]) < length, "a tensor larger than its file");
        dpo_cache_get_floats(k, &key, v, 5);
    }
    fuzz_need(!dpo_error(c), "a damaged cache is an error");
    dpo_cache_close(k);
    dpo_scope_end(c, scope, NULL);
    dpo_clear_error(c);
}

/* ---------------------------------------------------------------------------------------------- who calls them */

#if defined(FUZZ_JSON) || defined(FUZZ_SAFETENSORS) || defined(FUZZ_TOKENIZER) || defined(FUZZ_NAMES) || defined(FUZZ_ADAPTERS) || \
    defined(FUZZ_PAIRS) || defined(FUZZ_CACHE)
#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
#if defined(FUZZ_JSON)
    fuzz_json(data, n);
#elif defined(FUZZ_SAFETENSORS)
    fuzz_safetensors(data, n);
#elif defined(FUZZ_TOKENIZER)
    fuzz_tokenizer(data, n);
#elif defined(FUZZ_NAMES)
    fuzz_names(data, n);
#elif defined(FUZZ_PAIRS)
    fuzz_pairs(data, n);
#elif defined(FUZZ_CACHE)
    fuzz_cache(data, n);
#else
    fuzz_adapters(data, n);
#endif
    (void)fuzz_json; (void)fuzz_safetensors; (void)fuzz_tokenizer; (void)fuzz_names; (void)fuzz_adapters;
    (void)fuzz_pairs; (void)fuzz_cache;
    return 0;
}
#else

static const char *const fuzz_json_seeds[] = {
    "{\"a\":[1,-2.5e3,true,false,null],\"b\":{\"c\":\"x\\u00e9\\ud83d\\ude00\\n\"},\"d\":\"\"}",
        "[[[[]]],{},[0.1,1e308,123456789012345678901]]",
    "\"caf\xC3\xA9\"", " -0 " };
static const char *const fuzz_st_seeds[] = {                /* the 8 bytes in front are added, with the true length */
    "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"b\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[24,26]}}",
    "{\"x\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]},"
        "\"y\":{\"dtype\":\"BOOL\",\"shape\":[0,4],\"data_offsets\":[8,8]},"
        "\"z\":{\"dtype\":\"F8_E4M3\",\"shape\":[18],\"data_offsets\":[8,26]}}" };
static const char *const fuzz_text_seeds[] = { "\2the cat's and  thing!!! on",
        "\2caf\xC3\xA9 e\xCC\x81 \xE1\x84\x80\xE1\x85\xA1 <|endoftext|> <|ENDOFTEXT|>!",
    "\3{\"<|startoftext|>\":0,\"<|endoftext|>\":1,\"a\":2,\"n</w>\":3,\"an</w>\":4}|a n</w>\n" };

static const char *const fuzz_name_seeds[] = {
    "model.diffusion_model.input_blocks.0.0.weight|4,4,3,3\nmodel.diffusion_model.input_blocks.1.0.in_layers.0.weight|4\n"
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight|4,6\n",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight|18,6\ncond_stage_model.model.text_projection|6,6\n"
        "first_stage_model.decoder.up.1.block.2.conv1.weight|8,8,3,3\nv_pred|0\n",
    "up_blocks.1.upsamplers.0.conv.weight", "down_blocks.0.resnets.0.conv_shortcut.weight",
    "text_model.encoder.layers.1.self_attn.q_proj.weight" };
static const char *const fuzz_adapter_seeds[] = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight|2,4\n"
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight|4,2\n"
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha|\n",
    "{\"unet.r\": 2, \"unet.lora_alpha\": 3, \"unet.alpha_pattern\": {\"attn1.to_q\": 4}}\n"
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight|2,4\n"
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight|4,2\n",
    "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight|1,4,3,3\nlora_unet_input_blocks_1_0_in_layers_2.lora_up.weight|4,1,1,1\n"
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight|1,6\n"
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight|8,1\n",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight|1,8\n"
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight|8,1\n" };

static const char *const fuzz_pair_seeds[] = {             /* \5 is form 0 and no end of the string */
    "\5{\"prompt\": \"a\", \"chosen\": \"fuzz.c\", \"rejected\": \"fuzz.c\", \"weight\": 2}\n{\"caption\": \"b\", \"image_0\": \"fuzz.c\","
        "\"image_1\": \"fuzz.c\", \"label_0\": 0.5}\n{\"prompt\": \"l\", \"image\": \"fuzz.c\", \"liked\": false}\n",
    "\1[{\"prompt\": \"a\", \"file_path\": [\"fuzz.c\", \"fuzz.c\", \"fuzz.c\"], \"human_preference\": [1, 0, 0]},\n"
        "{\"prompt\": \"]\\\"\", \"images\": [\"fuzz.c\", \"fuzz.c\"], \"rank\": [1, 2]}]",
    "\2prompt,chosen,rejected,weight,image,liked\r\na,fuzz.c,fuzz.c,1,,\r\n\"x, \"\"y\"\"\r\nz\",,,,fuzz.c,true\n\n",
    "\3caption\timage_0\timage_1\tlabel_0\na\tfuzz.c\tfuzz.c\t1\nb\tfuzz.c\tfuzz.c\t0.5\n",
    "\4prompt,image,liked\na,fuzz.c,1\n" };
static const char *const fuzz_cache_seeds[] = { "\1", "\3\1\30\7\1\50\2", "\3\1\100\2", "\3\1\110\7", "\2\3\20\1" };

typedef void (*fuzz_fn)(const uint8_t *data, size_t n);

/* One to four changes of p[*n], which has room for 512 bytes. */
static void fuzz_change(uint8_t *p, size_t *n, uint64_t *rng)
{
    static const char *const words[] = { "0", "18446744073709551615", "-1", "[", "{", "\"", ",", ":", "}", "]",
                                        "\\u", "F32", "data_offsets",
                                         "\xF0\x9F", "\xCC\x81", "1e999", "<|endoftext|>", "\n", "\0", "|", ".", "_", "lora_",
                                         ".alpha", "unet.", "attn1", "blocks.7." };
    for (int k = (int)(test_random(rng) % 4); k >= 0; k--) {
        size_t at = *n ? (size_t)(test_random(rng) % *n) : 0, w;
        const char *word = words[test_random(rng) % (sizeof words / sizeof *words)];
        switch (test_random(rng) % 5) {
        case 0: if (*n) p[at] = (uint8_t)test_random(rng); break;
        case 1: if (*n) p[at] ^= (uint8_t)(1u << test_random(rng) % 8); break;
        case 2: *n = at; break;
        case 3: if (*n) { memmove(p + at, p + at + 1, *n - at - 1); --*n; } break;
        default:
            w = *word ? strlen(word) : 1;
            if (*n + w > 512) break;
            memmove(p + at + w, p + at, *n - at);
            memcpy(p + at, word, w);
            *n += w;
        }
    }
}

static void fuzz_run(const char *name, fuzz_fn fn, const char *const *seeds, int count, int framed, long runs,
                     uint64_t seed)
{
    uint64_t rng = seed;
    for (long i = 0; i < runs; i++) {
        const char *s = seeds[test_random(&rng) % (uint64_t)count];
        uint8_t     p[600];
        size_t      n = strlen(s);
        uint64_t    header = n;
        memcpy(p + (framed ? 8 : 0), s, n);
        if (framed) { memcpy(p, &header, 8); memset(p + 8 + n, 1, 26); n += 8 + 26; }
        for (size_t k = 0; !framed && k < n; k++) if (p[k] == '|' && s[0] == 3 && k > 40 && p[k + 1] == 'a') p[k] = 0;
        if (i) fuzz_change(p, &n, &rng);
        fn(p, n);
    }
    CHECK(1, "%s", name);
}

int main(int argc, char **argv)
{
    long     runs = argc > 1 ? atol(argv[1]) : 20000;
    uint64_t seed = argc > 2 ? (uint64_t)atol(argv[2]) : 1;
    fuzz_run("json", fuzz_json, fuzz_json_seeds, 4, 0, runs, seed);
    fuzz_run("safetensors", fuzz_safetensors, fuzz_st_seeds, 2, 1, runs, seed);
    fuzz_run("tokenizer", fuzz_tokenizer, fuzz_text_seeds, 3, 0, runs, seed);
    fuzz_run("names", fuzz_names, fuzz_name_seeds, 5, 0, runs / 2 + 1, seed);          /* each looks at a whole network */
    fuzz_run("adapters", fuzz_adapters, fuzz_adapter_seeds, 4, 0, runs / 4 + 1, seed);
    fuzz_run("pairs", fuzz_pairs, fuzz_pair_seeds, 5, 0, runs / 4 + 1, seed);
    fuzz_run("cache", fuzz_cache, fuzz_cache_seeds, 5, 0, runs / 8 + 1, seed);         /* each writes a file */
    dpo_close(fuzz_context());
    return test_report();
}
#endif
