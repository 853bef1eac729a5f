/* fuzz.c - hostile bytes for the readers: safetensors, JSON, tokenizer.

   fuzzer  clang -g -O1 -fsanitize=fuzzer,address,undefined -DFUZZ_JSON tests/fuzz.c -o fuzz_json -lm -lpthread
           (-DFUZZ_SAFETENSORS, -DFUZZ_TOKENIZER), then ./fuzz_json -runs=1000000
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

/* ---------------------------------------------------------------------------------------------- who calls them */

#if defined(FUZZ_JSON) || defined(FUZZ_SAFETENSORS) || defined(FUZZ_TOKENIZER)
#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
#if defined(FUZZ_JSON)
    fuzz_json(data, n);
    (void)fuzz_safetensors; (void)fuzz_tokenizer;
#elif defined(FUZZ_SAFETENSORS)
    fuzz_safetensors(data, n);
    (void)fuzz_json; (void)fuzz_tokenizer;
#else
    fuzz_tokenizer(data, n);
    (void)fuzz_json; (void)fuzz_safetensors;
#endif
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

typedef void (*fuzz_fn)(const uint8_t *data, size_t n);

/* One to four changes of p[*n], which has room for 512 bytes. */
static void fuzz_change(uint8_t *p, size_t *n, uint64_t *rng)
{
    static const char *const words[] = { "0", "18446744073709551615", "-1", "[", "{", "\"", ",", ":", "}", "]",
                                        "\\u", "F32", "data_offsets",
                                         "\xF0\x9F", "\xCC\x81", "1e999", "<|endoftext|>", "\n", "\0" };
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
    dpo_close(fuzz_context());
    return test_report();
}
#endif
