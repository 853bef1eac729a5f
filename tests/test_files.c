/* test_files.c - JSON, safetensors, saving, tokenizer: good files, hostile files, full disks, failing allocations.

   build   cc -O1 -g -fsanitize=address,undefined tests/test_files.c -o build/test_files -lm -lpthread
   run     build/test_files [GOLDEN]          (GOLDEN: the folder of reference cases, ../shared/golden if it is there)
           build/test_files interop PYTHON    (what Python's safetensors thinks of our files) */
#define DIFFDPO_IMPLEMENTATION
#ifndef FILES_HEADER
#define FILES_HEADER "../diffdpo.h"
#endif
#include FILES_HEADER
#include "dpo_test.h"
#include <locale.h>
#if defined(DPOI_FILES_POSIX)
#include <signal.h>
#include <sys/resource.h>
#endif

#define FOLDER "build/test_files.tmp"

static dpo_ctx *open_context(void)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    return dpo_open(&d);
}

/* The error there is must say `what`; then all is forgotten. */
static void expect_error(dpo_ctx *c, int failed, const char *what, const char *label)
{
    CHECK(failed && dpo_error(c) && strstr(dpo_error(c), what), "%s: wanted an error with \"%s\", got \"%s\"", label,
          what,
          dpo_error(c) ? dpo_error(c) : "none");
    dpo_clear_error(c);
}

/* ---------------------------------------------------------------------------------------------- JSON */

static void test_json_values(dpo_ctx *c)
{
    static const char text[] = "\xEF\xBB\xBF {\"i\": 42, \"d\":-2.5e-3, "
        "\"s\":\"a\\u00e9\\ud83d\\ude00\\/\\n\\u0000b\", "
        "\"t\":true, \"f\":false, \"n\":null, \"list\":[1, 2.0, [], {}], \"big\":9223372036854775807, "
        "\"bigger\":9223372036854775808, \"caf\xC3\xA9\":1}";
    dpo_json       *j = dpo_json_parse(c, text, sizeof text - 1, "text");
    const dpo_json *list = dpo_json_get(j, "list");
    int64_t         i = 0;
    double          x = 0;
    size_t          n = 0;
    const char     *s;
    CHECK(j && dpo_json_type(j) == DPO_JSON_OBJECT && dpo_json_count(j) == 10, "parse: %s", dpo_error(c));
    CHECK(dpo_json_int(dpo_json_get(j, "i"), &i) && i == 42, "i");
    CHECK(dpo_json_double(dpo_json_get(j, "d"), &x) && x == -2.5e-3, "d %.17g", x);
    s = dpo_json_text(dpo_json_get(j, "s"), &n);
    CHECK(s && n == 11 && !memcmp(s, "a\xC3\xA9\xF0\x9F\x98\x80/\n\0b", 12), "s, %d bytes", (int)n);
    CHECK(dpo_json_bool(dpo_json_get(j, "t")) && !dpo_json_bool(dpo_json_get(j, "f")), "booleans");
    CHECK(dpo_json_type(dpo_json_get(j, "n")) == DPO_JSON_NULL, "null");
    CHECK(dpo_json_count(list) == 4 && dpo_json_int(dpo_json_at(list, 1), &i) && i == 2, "2.0 is whole");
    CHECK(!dpo_json_at(list, 4) && !dpo_json_at(list, -1) && !dpo_json_get(list, "x") && !dpo_json_get(j, "x"),
          "nothing there");
    CHECK(dpo_json_int(dpo_json_get(j, "big"), &i) && i == INT64_MAX, "int64");
    CHECK(!dpo_json_int(dpo_json_get(j, "bigger"), &i) && dpo_json_double(dpo_json_get(j, "bigger"), &x) &&
          x == 9223372036854775808.0, "2^63");
    CHECK(!strcmp(dpo_json_key(dpo_json_at(j, 9)), "caf\xC3\xA9") && !dpo_json_key(j), "key");
    CHECK(dpo_json_want_int(j, "i", 7, 0, 100) == 42 && dpo_json_want_int(j, "none", 7, 0, 1) == 7 &&
          dpo_json_want_int(j, "n", 7, 0, 1) == 7, "want");
    CHECK(!strcmp(dpo_json_want_text(j, "none", "x"), "x") && dpo_json_want_bool(j, "t", 0) && !dpo_error(c), "want");
    dpo_json_want_int(j, "i", 7, 0, 41);
    expect_error(c, 1, "\"i\" is 42, but must be a whole number from 0 to 41", "range");
    dpo_json_want_double(j, "s", 7, 0, 41);
    expect_error(c, 1, "text: \"s\" is a string, but must be a number", "type");
    dpo_json_want_int(j, "d", 7, -9, 41);
    expect_error(c, 1, "whole number", "fraction");
    CHECK(dpo_json_want_text(j, "list", "x") == NULL, "want_text");
    expect_error(c, 1, "a list, but must be a string", "type");
    dpo_json_free(j);
    CHECK(!dpo_json_get(NULL, "x") && !dpo_json_count(NULL) && dpo_json_type(NULL) == DPO_JSON_NONE,
          "NULL in, NULL out");
}

static void test_json_refused(dpo_ctx *c)
{
    static const struct { const char *text, *error; } bad[] = {
        { "", "byte 0" }, { " ", "byte 1" }, { "{", "name of a member" }, { "[", "byte 1" }, { "[1",
                "',' or ']'" }, { "[1,]", "a value" },
        { "{\"a\":1,}", "name of a member" }, { "{\"a\" 1}", "':'" }, { "{a:1}", "name of a member" }, { "[1 2]",
                                                                                                        "',' or ']'" },
        { "nul", "a value" }, { "truE", "a value" }, { "NaN", "a value" }, { "Infinity", "a value" }, { "-",
                "a value" }, { "+1", "a value" },
        { "01", "starts with 0" }, { "1.", "after the point" }, { ".5", "a value" }, { "1e", "exponent" }, { "1e+",
                "exponent" },
        { "1e999", "too large" }, { "-1e400", "too large" }, { "0x10", "follows" }, { "1 2", "follows" }, { "[1]]",
                                                                                                           "follows" },
        { "\"abc", "does not end" }, { "\"\\x\"", "escape" }, { "\"\\u12x4\"", "hexadecimal" },
        { "\"\\u12", "cut off" },
        { "\"\\ud800\"", "surrogate" }, { "\"\\ud800\\u0041\"", "surrogate" }, { "\"\\udc00\"",
                                                                                "surrogate" }, { "\"\t\"", "control" },
        { "\"\xC0\xAF\"", "not UTF-8" }, { "\"\xED\xA0\x80\"", "not UTF-8" }, { "\"\xF4\x90\x80\x80\"",
                "not UTF-8" }, { "\"\xC3\"", "not UTF-8" },
        { "\"\xE2\x82", "not UTF-8" }, { "{\"a\":1,\"b\":2,\"a\":3}",
                                        "\"a\" stands twice" }, { "{\"a\":1,\"\\u0061\":2}", "twice" },
        { "{\"a\\u0000\":1}", "zero byte" }, { "'a'", "a value" }, { "/**/1", "a value" }, { "[1,\xA0" "2]",
                                                                                            "a value" } };
    char deep[200];
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++)
        expect_error(c, !dpo_json_parse(c, bad[k].text, strlen(bad[k].text), "bad.json"), bad[k].error, bad[k].text);
    for (int depth = 64; depth <= 65; depth++) {
        memset(deep, '[', 65);
        memset(deep + depth, ']', 65);
        if (depth == 64) CHECK(dpo_json_parse(c, deep, 128, "deep") != NULL, "64 levels: %s", dpo_error(c));
        else expect_error(c, !dpo_json_parse(c, deep, 130, "deep"), "64 levels", "65 levels");
    }
    expect_error(c, !dpo_json_parse(c, "[1]\0", 4, "zero"), "follows", "a zero at the end");
}

/* Our decimals against the C library's, in the "C" locale. */
static void test_json_numbers(dpo_ctx *c)
{
    static const char *const hard[] = { "2.2250738585072014e-308", "5e-324",
                                       "2.4703282292062327e-324", "1e-400",
        "1.7976931348623157e308", "1.7976931348623158e+308", "9007199254740993", "0.1", "1e22", "1e23",
            "123456789012345678901234567890",
        "6.02214076e23", "0.000000000000000000000000000000000000000000001",
            "8.988465674311580536566680721305029496276241413130815897397134275615e307",
        "9007199254740991.5", "0e999999999999999999999", "100000000000000000000000e-22", "0.30000000000000004",
            "179769313486231570000000000e282" };
    uint64_t rng = 5;
    int      wrong = 0, round = 0;
    char     text[64];
    for (int k = 0; k < 20000 + (int)(sizeof hard / sizeof *hard); k++) {
        const char *t = text;
        uint64_t    bits = test_random(&rng);
        double      want, got = 0;
        dpo_json   *j;
        memcpy(&want, &bits, 8);
        if (k < (int)(sizeof hard / sizeof *hard)) t = hard[k];
        else if (!(fabs(want) <= DBL_MAX)) continue;
        else snprintf(text, sizeof text, "%.*g", 15 + (int)(test_random(&rng) % 5), want);
        want = strtod(t, NULL);
        if (!(fabs(want) <= DBL_MAX)) continue;
        j = dpo_json_parse(c, t, strlen(t), "number");
        if (!dpo_json_double(j, &got) || got != want) { if (!wrong++) printf("%s: %.17g, not %.17g\n", t, got, want); }
        dpo_json_free(j);
        {
            dpoi_text out;
            dpoi_text_start(&out, c);
            dpoi_text_number(&out, want);
            if (strtod(out.at, NULL) != want) round++;
            dpoi_text_free(&out);
        }
    }
    CHECK(wrong == 0, "%d numbers are not strtod's", wrong);
    CHECK(round == 0, "%d numbers do not survive being written", round);
}

/* A host may have set a locale with a decimal comma. */
static void test_json_locale(dpo_ctx *c)
{
    static const char *const names[] = { "de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "German_Germany.1252" };
    dpoi_text   out;
    dpo_json   *j;
    double      x = 0;
    const char *set = NULL;
    for (int k = 0; k < 4 && !set; k++) set = setlocale(LC_NUMERIC, names[k]);
    j = dpo_json_parse(c, "0.5", 3, "number");
    dpoi_text_start(&out, c);
    dpoi_text_number(&out, 0.1);
    CHECK(dpo_json_double(j, &x) && x == 0.5 && !strcmp(out.at, "0.1"), "numbers under a locale: %g, %s", x, out.at);
    snprintf(out.at, 8, "-1,5e-7");
    dpoi_text_point(out.at);
    CHECK(!strcmp(out.at, "-1.5e-7"), "decimal comma: %s", out.at);
    dpoi_text_free(&out);
    dpo_json_free(j);
    setlocale(LC_NUMERIC, "C");
}

/* 50,000 members, names that share a hash or a long beginning: still n log n. */
static void test_json_large(dpo_ctx *c)
{
    dpoi_text   t;
    double      start = dpo_seconds();
    dpo_json   *j;
    int64_t     v = 0;
    int         missed = 0;
    char        key[64];
    dpoi_text_start(&t, c);
    for (int k = 0; k < 50000; k++) dpoi_text_format(&t, "%s\"down_blocks.0.attentions.%d.weight\":%d", k ? ","
                                                     : "{", k * 7 % 50000, k * 7 % 50000);
    dpoi_text_add(&t, "}");
    j = dpo_json_parse(c, t.at, (size_t)t.n, "large");
    CHECK(dpo_json_count(j) == 50000, "large: %s", dpo_error(c));
    for (int k = 0; k < 50000; k++) {
        snprintf(key, sizeof key, "down_blocks.0.attentions.%d.weight", k);
        if (!dpo_json_int(dpo_json_get(j, key), &v) || v != k) missed++;
    }
    CHECK(!missed, "%d of 50000 not found", missed);
    CHECK(dpo_seconds() - start < 10, "50,000 members took %.1f s", dpo_seconds() - start);
    dpo_json_free(j);
    dpoi_text_free(&t);
}

static void test_json_writing(dpo_ctx *c)
{
    dpoi_text t;
    dpoi_text_start(&t, c);
    dpoi_text_quote(&t, "a\"b\\c\n\x01\x1F\x7F\xC3\xA9\xFFz");
    CHECK(!strcmp(t.at, "\"a\\\"b\\\\c\\n\\u0001\\u001f\x7F\xC3\xA9\xEF\xBF\xBDz\""), "quoted: %s", t.at);
    dpoi_text_free(&t);
    dpoi_text_number(&t, 1e-5); dpoi_text_add(&t, " "); dpoi_text_number(&t, 0.0/1 - 3); dpoi_text_add(&t, " ");
    dpoi_text_number(&t, HUGE_VAL);
    CHECK(!strcmp(t.at, "1e-05 -3 null"), "numbers: %s", t.at);
    dpoi_text_free(&t);
}

/* ---------------------------------------------------------------------------------------------- files */

static int read_back(dpo_ctx *c, const char *path, const char *want, size_t n)
{
    char  *text;
    size_t got;
    int    same;
    if (!dpoi_read_file(c, path, 1 << 20, &text, &got)) return 0;
    same = got == n && !memcmp(text, want, n) && !text[n];
    dpoi_release(c, text, got + 1);
    return same;
}

static void test_files(dpo_ctx *c)
{
    char *joined[3];
    char *text;
    size_t n;
    CHECK(dpoi_mkdirs(c, FOLDER "/a/b") && dpoi_mkdirs(c, FOLDER "/a/b/") && dpoi_is_folder(FOLDER "/a/b"),
          "mkdirs: %s", dpo_error(c));
    joined[0] = dpoi_join(c, "x", "y"); joined[1] = dpoi_join(c, "x/", "y"); joined[2] = dpoi_join(c, "", "y");
    CHECK(!strcmp(joined[0], "x/y") && !strcmp(joined[1], "x/y") && !strcmp(joined[2], "y"), "join");
    for (int k = 0; k < 3; k++) dpoi_strfree(c, joined[k]);
    CHECK(dpoi_write_file(c, FOLDER "/f\xC3\xA9.txt", "one", 3) && read_back(c, FOLDER "/f\xC3\xA9.txt", "one", 3),
          "write: %s", dpo_error(c));
    CHECK(dpoi_write_file(c, FOLDER "/f\xC3\xA9.txt", "two!", 4) && read_back(c, FOLDER "/f\xC3\xA9.txt", "two!", 4),
          "overwrite: %s", dpo_error(c));
    CHECK(!dpoi_exists(FOLDER "/f\xC3\xA9.txt.tmp"), "the temporary is gone");
    remove(FOLDER "/log");                    /* of an earlier run in this folder */
    CHECK(dpoi_append_file(c, FOLDER "/log", "a\n", 2) && dpoi_append_file(c, FOLDER "/log", "b\n", 2) &&
          read_back(c, FOLDER "/log", "a\nb\n", 4), "append");
    CHECK(dpoi_file_size(FOLDER "/log") == 4 && dpoi_file_size(FOLDER "/none") == -1 && dpoi_file_size(FOLDER) == -1,
          "size");
    CHECK(dpoi_write_file(c, FOLDER "/empty", "", 0) && read_back(c, FOLDER "/empty", "", 0), "an empty file");
    expect_error(c, !dpoi_read_file(c, FOLDER "/none", 9, &text, &n), "no such file", "missing");
    expect_error(c, !dpoi_read_file(c, FOLDER "/log", 3, &text, &n), "4 bytes, at most 3", "limit");
    expect_error(c, !dpoi_read_file(c, FOLDER, 9, &text, &n), FOLDER, "a folder");
    expect_error(c, !dpoi_write_file(c, FOLDER, "x", 1), "it is a folder", "writing a folder");
    expect_error(c, !dpoi_write_file(c, FOLDER "/no/such/x", "x", 1), "no such file or folder", "no folder");
    expect_error(c, !dpo_json_load(c, FOLDER "/log"), "log: broken JSON at byte 0", "not JSON");
    expect_error(c, !dpoi_mkdirs(c, FOLDER "/log/x"), "cannot make the folder", "a file in the way");
#if defined(DPOI_FILES_POSIX)
    expect_error(c, !dpoi_write_file(c, "/dev/full", "x", 1), "not a plain file", "a device");
    expect_error(c, !dpoi_read_file(c, "/dev/zero", 9, &text, &n), "not a plain file", "a device");
#endif
}

/* ---------------------------------------------------------------------------------------------- safetensors */

/* What Python's safetensors 0.8.0 wrote (safetensors.torch.save) of twelve tensors of all kinds. */
static const unsigned char reference[] = {
    224, 2, 0, 0, 0, 0, 0, 0, 123, 34, 95, 95, 109, 101, 116, 97, 100, 97, 116, 97, 95, 95, 34, 58, 123, 34, 102, 111,
    114, 109, 97, 116, 34, 58, 34, 112, 116, 34, 125, 44, 34, 105, 100, 115, 34, 58, 123, 34, 100, 116, 121, 112, 101,
    34, 58, 34, 73, 54, 52, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 49, 44, 50, 93, 44, 34, 100, 97, 116, 97,
    95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 48, 44, 49, 54, 93, 125, 44, 34, 100, 34, 58, 123, 34, 100,
    116, 121, 112, 101, 34, 58, 34, 70, 54, 52, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 49, 93, 44, 34, 100,
    97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 49, 54, 44, 50, 52, 93, 125, 44, 34, 98, 46, 119,
    101, 105, 103, 104, 116, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34, 70, 51, 50, 34, 44, 34, 115, 104,
    97, 112, 101, 34, 58, 91, 50, 44, 51, 93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58,
    91, 50, 52, 44, 52, 56, 93, 125, 44, 34, 110, 111, 110, 101, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34,
    70, 51, 50, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 48, 44, 52, 93, 44, 34, 100, 97, 116, 97, 95, 111,
    102, 102, 115, 101, 116, 115, 34, 58, 91, 52, 56, 44, 52, 56, 93, 125, 44, 34, 115, 99, 97, 108, 101, 34, 58, 123,
    34, 100, 116, 121, 112, 101, 34, 58, 34, 70, 51, 50, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 93, 44, 34,
    100, 97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 52, 56, 44, 53, 50, 93, 125, 44, 34, 105, 34,
    58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34, 73, 51, 50, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 49,
    93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 53, 50, 44, 53, 54, 93, 125, 44,
    34, 122, 92, 34, 92, 92, 195, 169, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34, 66, 70, 49, 54, 34, 44,
    34, 115, 104, 97, 112, 101, 34, 58, 91, 50, 93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115,
    34, 58, 91, 53, 54, 44, 54, 48, 93, 125, 44, 34, 97, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34, 70, 49,
    54, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 51, 93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101,
    116, 115, 34, 58, 91, 54, 48, 44, 54, 54, 93, 125, 44, 34, 101, 52, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34,
    58, 34, 70, 56, 95, 69, 52, 77, 51, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 52, 93, 44, 34, 100, 97, 116,
    97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 54, 54, 44, 55, 48, 93, 125, 44, 34, 101, 53, 34, 58, 123,
    34, 100, 116, 121, 112, 101, 34, 58, 34, 70, 56, 95, 69, 53, 77, 50, 34, 44, 34, 115, 104, 97, 112, 101, 34, 58,
    91, 52, 93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 55, 48, 44, 55, 52, 93,
    125, 44, 34, 117, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34, 85, 56, 34, 44, 34, 115, 104, 97, 112,
    101, 34, 58, 91, 50, 93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101, 116, 115, 34, 58, 91, 55, 52, 44,
    55, 54, 93, 125, 44, 34, 109, 97, 115, 107, 34, 58, 123, 34, 100, 116, 121, 112, 101, 34, 58, 34, 66, 79, 79, 76,
    34, 44, 34, 115, 104, 97, 112, 101, 34, 58, 91, 51, 93, 44, 34, 100, 97, 116, 97, 95, 111, 102, 102, 115, 101,
    116, 115, 34, 58, 91, 55, 54, 44, 55, 57, 93, 125, 125, 32, 32, 32, 32, 3, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255,
    255, 255, 255, 255, 255, 154, 153, 153, 153, 153, 153, 185, 63, 0, 0, 0, 0, 0, 0, 128, 62, 0, 0, 0, 63, 0, 0, 64,
    63, 0, 0, 128, 63, 0, 0, 160, 63, 205, 204, 204, 61, 251, 255, 255, 255, 128, 63, 73, 64, 0, 62, 0, 192, 255, 123,
    56, 152, 126, 127, 60, 172, 123, 124, 7, 255, 1, 0, 1,};

typedef struct sample {                   /* the same tensors, as they were given to Python, in no order */
    const char *name, *dtype;
    int         rank;
    int64_t     shape[2];
    float       values[6];
} sample;

static const sample samples[] = {
    { "b.weight", "F32", 2, { 2, 3 }, { 0, 0.25f, 0.5f, 0.75f, 1, 1.25f } }, { "a", "F16", 1, { 3, 0 }, { 1.5f, -2,
            65504, 0, 0, 0 } },
    { "scale", "F32", 0, { 0, 0 }, { 0.1f, 0, 0, 0, 0, 0 } }, { "ids", "I64", 2, { 1, 2 }, { 3, -1, 0, 0, 0, 0 } },
    { "z\"\\\xC3\xA9", "BF16", 1, { 2, 0 }, { 1, 3.140625f, 0, 0, 0, 0 } }, { "none", "F32", 2, { 0, 4 }, { 0, 0, 0,
                                                                                                           0, 0, 0 } },
    { "d", "F64", 1, { 1, 0 }, { 0.1f, 0, 0, 0, 0, 0 } }, { "mask", "BOOL", 1, { 3, 0 }, { 1, 0, 1, 0, 0, 0 } },
    { "u", "U8", 1, { 2, 0 }, { 7, 255, 0, 0, 0, 0 } }, { "i", "I32", 1, { 1, 0 }, { -5, 0, 0, 0, 0, 0 } },
    { "e4", "F8_E4M3", 1, { 4, 0 }, { 1, -0.0625f, 448, 0, 0, 0 } }, { "e5", "F8_E5M2", 1, { 4, 0 }, { 1, -0.0625f,
            57344, 0, 0, 0 } } };
enum { SAMPLES = sizeof samples / sizeof *samples };

static void test_reading(dpo_ctx *c)
{
    dpo_file   *f = dpo_safetensors_memory(c, reference, sizeof reference, "reference");
    float       x[6];
    int64_t     k[6];
    const char *value = NULL;
    CHECK(f && dpo_file_count(f) == SAMPLES, "reference: %s", dpo_error(c));
    for (int i = 0; i < SAMPLES; i++) {
        const sample *s = &samples[i];
        dpo_entry    *e = dpo_file_find(f, s->name);
        int           same = e && !strcmp(e->dtype, s->dtype) && e->rank == s->rank;
        for (int a = 0; same && a < s->rank; a++) same = e->shape[a] == s->shape[a];
        CHECK(same && dpo_entry_floats(e, 0, e->count, x), "%s: %s", s->name, dpo_error(c));
        for (int64_t v = 0; same && v < e->count && v < 3; v++) CHECK(x[v] == s->values[v], "%s[%d] = %g", s->name,
                                                                      (int)v, x[v]);
    }
    CHECK(dpo_entry_floats(dpo_file_find(f, "e4"), 3, 1, x) && x[0] != x[0], "F8_E4M3 has a NaN");
    CHECK(dpo_entry_floats(dpo_file_find(f, "e5"), 3, 1, x) && x[0] > FLT_MAX, "F8_E5M2 has an infinity");
    CHECK(dpo_entry_floats(dpo_file_find(f, "b.weight"), 2, 3, x) && x[0] == 0.5f && x[2] == 1.0f, "a part");
    CHECK(dpo_entry_ints(dpo_file_find(f, "ids"), 0, 2, k) && k[0] == 3 && k[1] == -1, "whole numbers");
    CHECK(dpo_entry_ints(dpo_file_find(f, "u"), 0, 2, k) && k[1] == 255, "bytes");
    expect_error(c, !dpo_entry_ints(dpo_file_find(f, "a"), 0, 2, k),
                 "\"a\" is F16, which cannot be read as whole numbers", "type");
    expect_error(c, !dpo_entry_floats(dpo_file_find(f, "a"), 1, 3, x), "has 3 elements", "range");
    expect_error(c, !dpo_entry_floats(dpo_file_find(f, "a"), -1, 1, x), "has 3 elements", "range");
    expect_error(c, !dpo_entry_floats(dpo_file_find(f, "a"), 1, INT64_MAX, x), "has 3 elements", "range");
    CHECK(!dpo_file_find(f, "b") && !dpo_error(c) && !dpo_file_entry(f, 12) && !dpo_entry_floats(NULL, 0, 0, x),
          "nothing there");
    CHECK(!strcmp(dpo_file_metadata(f, "format"), "pt") && !dpo_file_metadata(f, "x"), "metadata");
    CHECK(!strcmp(dpo_file_metadata_at(f, 0, &value), "format") && !strcmp(value, "pt") &&
          !dpo_file_metadata_at(f, 1, NULL), "metadata");
    dpo_file_close(f);
}

/* Every prefix of a good file, and every byte of its header changed: an error or a file, never a crash. */
static void test_damaged(dpo_ctx *c)
{
    int opened = 0;
    for (size_t n = 0; n < sizeof reference; n++) {
        unsigned char *p = (unsigned char *)malloc(n ? n : 1);
        memcpy(p, reference, n);
        opened += dpo_safetensors_memory(c, p, n, "cut") != NULL;
        dpo_clear_error(c);
        free(p);
    }
    CHECK(!opened, "%d cut files were accepted", opened);
    for (size_t at = 0; at < 744; at++) {
        unsigned char p[sizeof reference];
        memcpy(p, reference, sizeof p);
        p[at] = (unsigned char)(p[at] ^ (1 << at % 8));
        dpo_file_close(dpo_safetensors_memory(c, p, sizeof p, "changed"));
        dpo_clear_error(c);
    }
}

/* header, its length in front (or `length` if that is not -1), then `data` zero bytes */
static void refuse(dpo_ctx *c, const char *header, int64_t length, size_t data, const char *error)
{
    size_t         n = strlen(header);
    uint64_t       N = length < 0 ? n : (uint64_t)length;
    unsigned char *p = (unsigned char *)calloc(8 + n + data, 1);
    memcpy(p, &N, 8);
    memcpy(p + 8, header, n);
    if (error) expect_error(c, !dpo_safetensors_memory(c, p, 8 + n + data, "bad"), error, header);
    else {
        dpo_file *f = dpo_safetensors_memory(c, p, 8 + n + data, "good");
        CHECK(f, "%s: %s", header, dpo_error(c));
        dpo_file_close(f);
    }
    dpo_clear_error(c);
    free(p);
}

#define T(dtype, shape, from, to) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" from "," to "]}"

static void test_hostile(dpo_ctx *c)
{
    refuse(c, "{}", -1, 0, NULL);
    refuse(c, "{\"a\":" T("F32", "[2]", "0", "8") "}   ", -1, 8, NULL);
    refuse(c, "{\"b\":" T("F32", "[2]", "8", "16") ",\"a\":" T("I64", "[]", "0", "8") "}", -1, 16, NULL);
    refuse(c, "{\"a\":" T("F32", "[0,5]", "0", "0") ",\"b\":" T("F32", "[1]", "0", "4") ",\"c\":" T("F32", "[0]",
            "4", "4") "}", -1, 4, NULL);
    refuse(c, "{\"a\":" T("F4", "[4]", "0", "2") "}", -1, 2, NULL);
    refuse(c, "{}", 100000001, 0, "at most 100000000");
    refuse(c, "{}", INT64_MAX, 0, "at most 100000000");
    refuse(c, "{}", 50, 0, "the header has 50 bytes, the file 10");
    refuse(c, "{}", 0, 0, "does not start with '{'");
    refuse(c, " {}", -1, 0, "does not start with '{'");
    refuse(c, "[]", -1, 0, "does not start with '{'");
    refuse(c, "{\"a\":", -1, 0, "broken JSON");
    refuse(c, "{\"\xFF\":1}", -1, 0, "not UTF-8");
    refuse(c, "{}x", -1, 0, "follows");
    refuse(c, "{\"__metadata__\":{\"a\":1}}", -1, 0, "metadata \"a\" is not a string");
    refuse(c, "{\"__metadata__\":[]}", -1, 0, "__metadata__ is not an object");
    refuse(c, "{\"a\":1}", -1, 0, "\"a\": needs dtype");
    refuse(c, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", -1, 4, "needs dtype");
    refuse(c, "{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4, "needs dtype");
    refuse(c, "{\"a\":" T("F32", "1", "0", "4") "}", -1, 4, "needs dtype");
    refuse(c, "{\"a\":" T("F32", "[1]", "0,2", "4") "}", -1, 4, "needs dtype");
    refuse(c, "{\"a\":" T("F31", "[1]", "0", "4") "}", -1, 4, "unknown dtype \"F31\"");
    refuse(c, "{\"a\":" T("F32", "[-1]", "0", "4") "}", -1, 4, "an axis is not");
    refuse(c, "{\"a\":" T("F32", "[1.5]", "0", "4") "}", -1, 4, "an axis is not");
    refuse(c, "{\"a\":" T("F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", -1, 4, "more than 8 axes");
    refuse(c, "{\"a\":" T("F32", "[1]", "-4", "0") "}", -1, 4, "an offset is not");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "1e30") "}", -1, 4, "an offset is not");
    refuse(c, "{\"a\":" T("F32", "[1]", "4", "0") "}", -1, 4, "its data is at 4 to 0");
    refuse(c, "{\"a\":" T("F32", "[1]", "4", "8") "}", -1, 8, "\"a\": its data is at 4");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "4") ",\"b\":" T("F32", "[1]", "2", "6") "}", -1, 6,
           "\"b\": its data is at 2 to 6");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "4") ",\"b\":" T("F32", "[1]", "0", "4") "}", -1, 4,
           "its data is at 0 to 4");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "4") ",\"b\":" T("F32", "[1]", "8", "12") "}", -1, 12,
           "\"b\": its data is at 8");
    refuse(c, "{\"a\":" T("F32", "[2]", "0", "4") "}", -1, 4, "\"a\": shape and dtype make 8 bytes, the file has 4");
    refuse(c, "{\"a\":" T("F4", "[3]", "0", "2") "}", -1, 2, "not a whole number of bytes");
    refuse(c, "{\"a\":" T("F32", "[4294967296,4294967296]", "0", "0") "}", -1, 0, "too large");
    refuse(c, "{\"a\":" T("F32", "[9223372036854775807]", "0", "4") "}", -1, 4, "too large");
    refuse(c, "{\"a\":" T("F64", "[2305843009213693952]", "0", "0") "}", -1, 0, "too large");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "4") "}", -1, 3, "\"a\": its data ends at byte");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "4") "}", -1, 5, "1 bytes follow the last tensor");
    refuse(c, "{\"a\":" T("F32", "[1]", "0", "4") ",\"a\":" T("F32", "[1]", "4", "8") "}", -1, 8, "\"a\" stands twice");
    refuse(c, "{\"a\\nb\\u001b[31m\":1}", -1, 0, "\"a?b?[31m\"");
}

static void test_other_formats(dpo_ctx *c)
{
    static const struct { const char *bytes; size_t n; const char *error; } files[] = {
        { "PK\3\4\0\0\0\0\0\0\0\0", 12, "convert it in Python" }, { "\x80\2}q\0(X\1\0\0\0", 11,
                                                                   "convert it in Python" }, { "", 0, "empty" },
        { "abc", 3, "3 bytes, too short" }, { "GGUF\3\0\0\0\0\0\0\0", 12, "GGUF" }, { "{\"weights\": [1, 2, 3]}", 22,
                                                                                     "a text file" },
        { "<!DOCTYPE html><html>", 21, "a text file" }, { "version https://git-lfs.github.com/spec/v1\n", 43,
                                                         "git lfs pull" },
        { "just some words in a file", 25, "not safetensors" } };
    for (size_t k = 0; k < sizeof files / sizeof *files; k++) {
        CHECK(dpoi_write_file(c, FOLDER "/other.safetensors", files[k].bytes, files[k].n), "%s", dpo_error(c));
        expect_error(c, !dpo_safetensors_open(c, FOLDER "/other.safetensors"), files[k].error, files[k].error);
    }
    expect_error(c, !dpo_safetensors_open(c, FOLDER "/missing.safetensors"), "missing.safetensors: no such file",
                 "missing");
    expect_error(c, !dpo_safetensors_open(c, FOLDER), FOLDER, "a folder");
    expect_error(c, !dpo_safetensors_open_folder(c, FOLDER, "model"), "neither model.safetensors nor", "nothing");
    dpoi_write_file(c, FOLDER "/old.bin", "PK\3\4zipped", 10);
    expect_error(c, !dpo_safetensors_open_folder(c, FOLDER, "old"), "old.bin: a pickle", "only a pickle");
}

/* ---------------------------------------------------------------------------------------------- writing */

static int add_samples(dpo_writer *w)
{
    int ok = w != NULL;
    for (int i = 0; ok && i < SAMPLES; i++)
        ok = dpo_writer_add(w, samples[i].name, samples[i].dtype, samples[i].rank, samples[i].shape,
                            (void *)(uintptr_t)&samples[i]);
    return ok;
}

/* Tags are samples; user: NULL, "stop", "more" (values than there are), or a tensor that is handed over in part. */
static int fill_sample(void *user, dpo_writer *w, void *tag)
{
    const sample *s = (const sample *)tag;
    int64_t       n = s->rank == 0 ? 1 : s->rank == 1 ? s->shape[0] : s->shape[0] * s->shape[1];
    const char   *wrong = (const char *)user;
    if (wrong && !strcmp(wrong, "stop")) return 0;
    if (wrong && !strcmp(wrong, s->name)) return dpo_writer_floats(w, s->values, n - 1);
    if (wrong && !strcmp(wrong, "more") && !strcmp(s->name, "b.weight"))
        return dpo_writer_floats(w, s->values, 6) &&
        dpo_writer_floats(w, s->values, 1);
    if (!strcmp(s->name, "d")) { double d = 0.1; return dpo_writer_bytes(w, &d, 8); }
    if (!strcmp(s->name, "e4")) return dpo_writer_bytes(w, "\x38\x98\x7E\x7F", 4);
    if (!strcmp(s->name, "e5")) return dpo_writer_bytes(w, "\x3C\xAC\x7B\x7C", 4);
    if (!strcmp(s->name, "mask")) return dpo_writer_bytes(w, "\1\0\1", 3);
    if (!strcmp(s->name, "u")) return dpo_writer_bytes(w, "\7\xFF", 2);
    return dpo_writer_floats(w, s->values, n / 2) && dpo_writer_floats(w, s->values + n / 2, n - n / 2);
}

static int save_samples(dpo_ctx *c, const char *path, const char *wrong)
{
    dpo_writer *w = dpo_writer_new(c, path);
    if (add_samples(w)) return dpo_writer_save(w, fill_sample, (void *)(uintptr_t)wrong);
    dpo_writer_free(w);
    return 0;
}

static void test_writing(dpo_ctx *c)
{
    const char *path = FOLDER "/s.safetensors";
    dpo_writer *w;
    int64_t     one = 1, huge[2] = { INT64_MAX, 2 };
    dpo_file   *f;
    CHECK(save_samples(c, path, NULL), "save: %s", dpo_error(c));
    CHECK(read_back(c, path, (const char *)reference, sizeof reference), "not the bytes of the reference writer");
    f = dpo_safetensors_open(c, path);
    CHECK(dpo_file_count(f) == SAMPLES, "reopened: %s", dpo_error(c));
    dpo_entry_done(dpo_file_find(f, "b.weight"));
#if !defined(_WIN32)                      /* Windows lets no file be replaced that is mapped */
    CHECK(save_samples(c, path, NULL), "saved over an open file: %s", dpo_error(c));
#endif
    dpo_file_close(f);
    expect_error(c, !save_samples(c, path, "a"), "\"a\": 2 bytes were not handed over", "too few");
    expect_error(c, !save_samples(c, path, "more"), "\"b.weight\": 4 bytes too many", "too many");
    expect_error(c, !save_samples(c, path, "stop"), "stopped by its caller", "stopped");
    CHECK(read_back(c, path, (const char *)reference, sizeof reference) && !dpoi_exists(FOLDER "/s.safetensors.tmp"),
          "the older file stays, alone");
    w = dpo_writer_new(c, path);
    CHECK(dpo_writer_add(w, "x", "F32", 1, &one, NULL) && dpo_writer_add(w, "x", "F16", 1, &one, NULL), "add");
    expect_error(c, !dpo_writer_save(w, fill_sample, NULL), "\"x\" was added twice", "twice");
    w = dpo_writer_new(c, path);
    expect_error(c, !dpo_writer_add(w, "x", "F33", 1, &one, NULL), "cannot be written", "dtype");
    expect_error(c, !dpo_writer_add(w, "x", "F32", 2, huge, NULL), "cannot be written", "overflow");
    expect_error(c, !dpo_writer_add(w, "__metadata__", "F32", 1, &one, NULL), "cannot be written", "name");
    dpo_writer_free(w);
    w = dpo_writer_new(c, FOLDER "/m.safetensors");
    CHECK(dpo_writer_metadata(w, "z", "last \"\n\"") && dpo_writer_metadata(w, "a", "1") &&
          dpo_writer_metadata(w, "a", "2"), "metadata");
    CHECK(dpo_writer_save(w, fill_sample, NULL), "no tensors: %s", dpo_error(c));
    f = dpo_safetensors_open(c, FOLDER "/m.safetensors");
    CHECK(f && !strcmp(dpo_file_metadata(f, "a"), "2") && !strcmp(dpo_file_metadata(f, "z"), "last \"\n\""),
          "metadata: %s", dpo_error(c));
    CHECK(f && !strcmp(dpo_file_metadata_at(f, 0, NULL), "a") && !strcmp(dpo_file_metadata_at(f, 2, NULL), "z"),
          "sorted");
    dpo_file_close(f);
    expect_error(c, !save_samples(c, FOLDER "/nowhere/s.safetensors", NULL),
                 "cannot write " FOLDER "/nowhere/s.safetensors: no such", "folder");
    CHECK(!dpo_writer_save(NULL, fill_sample, NULL) && !dpo_writer_floats(NULL, NULL, 0), "NULL in, 0 out");
}

static int fill_zeros(void *user, dpo_writer *w, void *tag)
{
    static const float zeros[1024];
    (void)user; (void)tag;
    for (int k = 0; k < 1024; k++) if (!dpo_writer_floats(w, zeros, 1024)) return 0;
    return 1;
}

/* Files may only grow to 1 MB here, which looks like a disk that fills up. */
static void test_full_disk(dpo_ctx *c)
{
#if defined(DPOI_FILES_POSIX)
    struct rlimit was, small;
    dpo_writer   *w;
    int64_t       n = 1 << 20;
    CHECK(dpoi_write_file(c, FOLDER "/big.safetensors", "old", 3), "%s", dpo_error(c));
    if (getrlimit(RLIMIT_FSIZE, &was)) { SKIP("full disk: no RLIMIT_FSIZE"); return; }
    small = was;
    small.rlim_cur = 1 << 20;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    w = dpo_writer_new(c, FOLDER "/big.safetensors");
    dpo_writer_add(w, "x", "F32", 1, &n, NULL);
    expect_error(c, !dpo_writer_save(w, fill_zeros, NULL),
                 "cannot write " FOLDER "/big.safetensors: larger than a file may be", "full");
    setrlimit(RLIMIT_FSIZE, &was);
    CHECK(read_back(c, FOLDER "/big.safetensors", "old", 3) && !dpoi_exists(FOLDER "/big.safetensors.tmp"),
          "the older file stays, alone");
#else
    SKIP("full disk: needs RLIMIT_FSIZE");
    (void)c; (void)fill_zeros;
#endif
}

/* ---------------------------------------------------------------------------------------------- shards */

static void write_index(dpo_ctx *c, const char *text) { CHECK(dpoi_write_file(c,
        FOLDER "/sharded.safetensors.index.json", text, strlen(text)), "%s", dpo_error(c)); }

static int fill_one(void *user, dpo_writer *w,
                    void *tag) { float x = *(const float *)tag; (void)user; return dpo_writer_floats(w, &x, 1); }

static void test_shards(dpo_ctx *c)
{
    const char *index = FOLDER "/sharded.safetensors.index.json";
    float       values[2] = { 1, 2 };
    dpo_file   *f;
    for (int k = 0; k < 2; k++) {
        char        path[64];
        dpo_writer *w;
        snprintf(path, sizeof path, FOLDER "/sharded-%d.safetensors", k);
        w = dpo_writer_new(c, path);
        CHECK(dpo_writer_add(w, k ? "y" : "x", "F32", 0, NULL, &values[k]) && dpo_writer_save(w, fill_one, NULL),
              "%s", dpo_error(c));
    }
    write_index(c, "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"y\":\"sharded-1.safetensors\","
                   "\"x\":\"sharded-0.safetensors\"}}");
    f = dpo_safetensors_open_folder(c, FOLDER, "sharded");
    CHECK(dpo_file_count(f) == 2, "shards: %s", dpo_error(c));
    for (int k = 0; k < 2; k++) {
        float x = 0;
        CHECK(dpo_entry_floats(dpo_file_find(f, k ? "y" : "x"), 0, 1, &x) && x == values[k], "shard %d: %g", k, x);
    }
    dpo_file_close(f);
    write_index(c, "{\"weight_map\":{\"x\":\"../sharded-0.safetensors\"}}");
    expect_error(c, !dpo_safetensors_open(c, index), "the shard of \"x\" is not a plain file name", "..");
    write_index(c, "{\"weight_map\":{\"x\":\"/etc/passwd\"}}");
    expect_error(c, !dpo_safetensors_open(c, index), "not a plain file name", "/");
    write_index(c, "{\"weight_map\":{\"x\":\"a\\\\b\"}}");
    expect_error(c, !dpo_safetensors_open(c, index), "not a plain file name", "backslash");
    write_index(c, "{\"weight_map\":{\"x\":7}}");
    expect_error(c, !dpo_safetensors_open(c, index), "not a plain file name", "number");
    write_index(c, "{\"weight_map\":{\"x\":\"gone.safetensors\"}}");
    expect_error(c, !dpo_safetensors_open(c, index), "gone.safetensors: no such file", "missing shard");
    write_index(c, "{\"weight_map\":{\"z\":\"sharded-0.safetensors\"}}");
    expect_error(c, !dpo_safetensors_open(c, index), "\"z\" is not in sharded-0.safetensors", "missing tensor");
    write_index(c, "{\"weight_map\":{\"x\":\"sharded-1.safetensors\",\"y\":\"sharded-0.safetensors\"}}");
    expect_error(c, !dpo_safetensors_open(c, index), "is not in", "wrong shard");
    write_index(c, "{}");
    expect_error(c, !dpo_safetensors_open(c, index), "no weight_map", "no map");
}

/* ---------------------------------------------------------------------------------------------- tokenizer */

static const char merges[] =
    "#version: 0.2\nt h\nth e</w>\na n\nan d</w>\nc a\nca t</w>\n# #</w>\n' s</w>\n! !\n!! !</w>\ne r</w>\n";

/* A vocabulary of the 512 byte symbols and what `merges` makes; then <|startoftext|> 523, <|endoftext|> 524. */
static void small_vocab(dpo_ctx *c, dpoi_text *t)
{
    static const char *const more[] = { "th", "the</w>", "an", "and</w>", "ca", "cat</w>", "##</w>", "'s</w>", "!!",
                                       "!!!</w>", "er</w>",
                                        "<|startoftext|>", "<|endoftext|>" };
    char symbol[16];
    int  id = 0;
    dpoi_text_start(t, c);
    for (int end = 0; end < 2; end++) {
        for (int b = 0; b < 256; b++) {
            int n = dpoi_utf8_write(symbol, dpoi_tok_symbol(b));
            strcpy(symbol + n, end ? "</w>" : "");
            dpoi_text_add(t, id ? "," : "{");
            dpoi_text_quote(t, symbol);
            dpoi_text_format(t, ":%d", id++);
        }
    }
    for (size_t k = 0; k < sizeof more / sizeof *more; k++) dpoi_text_format(t, ",\"%s\":%d", more[k], id++);
    dpoi_text_add(t, "}");
}

enum { BOS = 523, EOS = 524, END = 256 };  /* a byte's symbol has the byte as its id, + END at a word's end */

static void expect_tokens(dpo_tokenizer *t, const char *text, const int *want, int n)
{
    int32_t ids[16];
    int     got = dpo_tokenize(t, text, ids, 16), same = got == n + 2 && ids[0] == BOS && ids[n + 1] == EOS;
    for (int k = 0; same && k < n; k++) same = ids[k + 1] == want[k];
    for (int k = n + 2; same && k < 16; k++) same = ids[k] == EOS;
    CHECK(same, "\"%s\": %d tokens, first %d %d %d", text, got - 2, (int)ids[1], (int)ids[2], (int)ids[3]);
}

static void test_tokenizer(dpo_ctx *c)
{
    static const int cat[] = { 513, 517, 519 }, caps[] = { 513, 517 }, bang[] = { 521, 521, '!',
                                                                                 '!' + END }, hash[] = { 518 };
    static const int e1[] = { 0xC3, 0xA9 + END }, special[] = { 'a' + END, EOS, 'b' + END }, digits[] = { '1' + END,
                                                                                                         '2' + END };
    static const int bad[] = { 0xEF, 0xBF, 0xBD + END }, hangul[] = { 0xEA, 0xB0, 0x81 + END };
    dpoi_text      v;
    dpo_tokenizer *t;
    int32_t        ids[16];
    dpo_token_info i;
    small_vocab(c, &v);
    t = dpo_tokenizer_new(c, v.at, (size_t)v.n, merges, sizeof merges - 1);
    CHECK(t, "small vocabulary: %s", dpo_error(c));
    i = dpo_tokenizer_info(t);
    CHECK(i.bos == BOS && i.eos == EOS && i.pad == EOS && i.vocab == 525 && i.length == 77, "info");
    expect_tokens(t, "", cat, 0);
    expect_tokens(t, " \t\n ", cat, 0);
    expect_tokens(t, "the cat's", cat, 3);
    expect_tokens(t, " THE\xC2\xA0\xE3\x80\x80" "Cat ", caps, 2);
    expect_tokens(t, "!!! !!! !!", bang, 4);
    expect_tokens(t, "##", hash, 1);
    expect_tokens(t, "\xC3\xA9", e1, 2);
    expect_tokens(t, "e\xCC\x81", e1, 2);
    expect_tokens(t, "\xC3\x89", e1, 2);
    expect_tokens(t, "a<|endoftext|>b", special, 3);
    expect_tokens(t, "12", digits, 2);
    expect_tokens(t, "\xFF", bad, 3);
    expect_tokens(t, "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8", hangul, 3);
    CHECK(dpo_tokenize(t, "x x x x x x x x x x x x x x x x x x x x", ids, 16) == 16 && ids[15] == EOS &&
          ids[14] == 'x' + END, "cut");
    CHECK(dpo_tokenize(t, "the", ids, 2) == 2 && ids[1] == EOS, "room for the frame alone");
    expect_error(c, !dpo_tokenize(t, "the", ids, 1), "room for 1", "no room");
    CHECK(!dpo_tokenize(NULL, "x", ids, 16) && !dpo_tokenize(t, NULL, ids, 16) &&
          dpo_tokenizer_info(NULL).vocab == 0, "NULL");
    dpo_tokenizer_free(t);
    expect_error(c, !dpo_tokenizer_new(c, v.at, (size_t)v.n, "t h\nq q\n", 8), "line 2: not two tokens",
                 "a merge of nothing");
    expect_error(c, !dpo_tokenizer_new(c, v.at, (size_t)v.n, "th", 2), "line 1: not two tokens", "half a merge");
    expect_error(c, !dpo_tokenizer_new(c, "{\"a\":1}", 7, "", 0), "\"<|startoftext|>\" is not in it",
                 "no special token");
    expect_error(c, !dpo_tokenizer_new(c, "{\"<|startoftext|>\":0,\"<|endoftext|>\":-1}", 40, "", 0), "is not",
                 "a negative id");
    expect_error(c, !dpo_tokenizer_new(c, "[]", 2, "", 0), "is not in it", "no object");
    dpoi_text_free(&v);
}

/* One word of a million letters, and a million combining marks: a second or so, a hundred under valgrind on a busy machine,
   and an hour if the time grew with the square. */
static void test_long_prompts(dpo_ctx *c)
{
    enum { N = 1000000 };
    dpoi_text      v;
    char          *text = (char *)malloc(2 * N + 2);
    double         start = dpo_seconds();
    int32_t        ids[77];
    dpo_tokenizer *t;
    small_vocab(c, &v);
    t = dpo_tokenizer_new(c, v.at, (size_t)v.n, merges, sizeof merges - 1);
    for (int k = 0; k < N; k++) text[k] = "thecat"[k % 6];
    text[N] = 0;
    CHECK(dpo_tokenize(t, text, ids, 77) == 77, "a long word: %s", dpo_error(c));
    text[0] = 'e';
    for (int k = 0; k < N; k++) memcpy(text + 1 + 2 * k, k % 2 ? "\xCC\x81" : "\xCC\xA7", 2);
    text[1 + 2 * N] = 0;
    CHECK(dpo_tokenize(t, text, ids, 77) == 77, "many marks: %s", dpo_error(c));
    CHECK(dpo_seconds() - start < 300, "long prompts took %.1f s", dpo_seconds() - start);
    free(text);
    dpo_tokenizer_free(t);
    dpoi_text_free(&v);
}

static void test_tokenizer_folder(dpo_ctx *c)
{
    static const char config[] = "{\"pad_token\":{\"content\":\"!\",\"normalized\":false},\"model_max_length\":16,"
        "\"bos_token\":\"<|startoftext|>\",\"unk_token\":{\"content\":\"<|endoftext|>\",\"normalized\":true}}";
    static const char map[] = "{\"pad_token\":\"#\",\"eos_token\":{\"content\":\"<|endoftext|>\",\"normalized\":true}}";
    dpoi_text      v;
    dpo_tokenizer *t;
    int32_t        ids[6];
    dpo_token_info i;
    small_vocab(c, &v);
    CHECK(dpoi_mkdirs(c, FOLDER "/tok") && dpoi_write_file(c, FOLDER "/tok/vocab.json", v.at, (size_t)v.n) &&
          dpoi_write_file(c, FOLDER "/tok/merges.txt", merges, sizeof merges - 1) &&
          dpoi_write_file(c, FOLDER "/tok/tokenizer_config.json", config, sizeof config - 1) &&
          dpoi_write_file(c, FOLDER "/tok/special_tokens_map.json", map, sizeof map - 1), "%s", dpo_error(c));
    t = dpo_tokenizer_load(c, FOLDER "/tok");
    i = dpo_tokenizer_info(t);
    CHECK(t && i.pad == '!' && i.length == 16, "folder: pad %d, length %d, %s", (int)i.pad, (int)i.length,
          dpo_error(c));
    CHECK(dpo_tokenize(t, "the! ", ids, 6) == 4 && ids[1] == 513 && ids[2] == '!' && ids[3] == EOS && ids[4] == '!',
          "the padding token in a text");
    CHECK(dpo_tokenize(t, "<|EndOfText|>", ids, 6) == 3 && ids[1] == EOS,
          "a token that is looked for after normalising");
    dpo_tokenizer_free(t);
    expect_error(c, !dpo_tokenizer_load(c, FOLDER "/none"), "vocab.json: no such file", "missing");
    dpoi_text_free(&v);
}

/* The ids that transformers' CLIPTokenizer gave. */
static void test_golden_tokens(dpo_ctx *c, const char *golden)
{
    static const char *const cases[][2] = { { "sd15/tokens_1.json", "sd15/pipeline/tokenizer" },
                                           { "sd21/tokens_1.json", "sd21/pipeline/tokenizer" },
        { "sdxl/tokens_1.json", "sdxl/pipeline/tokenizer" }, { "sdxl/tokens_2.json", "sdxl/pipeline/tokenizer_2" } };
    for (int k = 0; k < 4; k++) {
        char          *path = dpoi_join(c, golden, cases[k][0]), *folder = dpoi_join(c, golden, cases[k][1]);
        dpo_json      *j = dpoi_exists(path) ? dpo_json_load(c, path) : NULL;
        double         start = dpo_seconds();
        dpo_tokenizer *t = j ? dpo_tokenizer_load(c, folder) : NULL;
        int            wrong = 0;
        start = dpo_seconds() - start;
        for (int64_t p = 0; p < dpo_json_count(dpo_json_get(j, "prompts")); p++) {
            const dpo_json *ids = dpo_json_at(dpo_json_get(j, "ids"), p);
            int32_t         got[77];
            dpo_tokenize(t, dpo_json_text(dpo_json_at(dpo_json_get(j, "prompts"), p), NULL), got, 77);
            for (int i = 0; i < 77; i++) { int64_t want = -1; wrong += !dpo_json_int(dpo_json_at(ids, i), &want) ||
                                          want != got[i]; }
        }
        if (j) CHECK(t && !wrong, "%s: %d wrong ids, %s", cases[k][0], wrong, dpo_error(c));
        else SKIP("%s is not there", path);
        if (j && start > 1) printf("note: opening a vocabulary took %.2f s\n", start);
        dpo_tokenizer_free(t);
        dpo_json_free(j);
        dpoi_strfree(c, path);
        dpoi_strfree(c, folder);
    }
}

/* ---------------------------------------------------------------------------------------------- failing allocations */

typedef struct tight { int64_t live, calls, fail_at; } tight;

static void *tight_alloc(void *user, void *old, size_t old_size, size_t new_size)
{
    tight *t = (tight *)user;
    (void)old_size;
    if (!new_size) { t->live -= old != NULL; free(old); return NULL; }
    if (++t->calls == t->fail_at) return NULL;
    t->live += old == NULL;
    return realloc(old, new_size);
}

static void tight_run(dpo_ctx *c, const char *vocab, size_t vocab_bytes)
{
    float          x[6];
    int32_t        ids[16];
    dpo_json      *j = dpo_json_parse(c, "{\"a\":[1,2,{}],\"b\":\"x\"}", 22, "text");
    dpo_file      *f = dpo_safetensors_memory(c, reference, sizeof reference, "reference");
    dpo_tokenizer *t = dpo_tokenizer_new(c, vocab, vocab_bytes, merges, sizeof merges - 1);
    dpo_entry_floats(dpo_file_find(f, "a"), 0, 3, x);
    dpo_tokenize(t, "the cat \xC3\x89 e\xCC\x81 <|ENDOFTEXT|>!", ids, 16);
    dpo_file_close(dpo_safetensors_open(c, FOLDER "/good.safetensors.index.json"));
    save_samples(c, FOLDER "/tight.safetensors", NULL);
    dpo_tokenizer_free(dpo_tokenizer_load(c, FOLDER "/tok"));
    dpo_json_free(j);
}

/* Every allocation made to fail in turn: an error that says so, nothing lost, no crash. */
static void test_allocations(dpo_ctx *plain)
{
    dpoi_text v;
    int64_t   n = 1, silent = 0, lost = 0, calls = 0;
    small_vocab(plain, &v);
    write_index(plain, "{\"weight_map\":{\"y\":\"sharded-1.safetensors\",\"x\":\"sharded-0.safetensors\"}}");
    dpoi_sys_rename(FOLDER "/sharded.safetensors.index.json", FOLDER "/good.safetensors.index.json");
    for (int more = 1; more; n++) {
        tight    t = { 0, 0, 0 };
        dpo_desc d;
        dpo_ctx *c;
        memset(&d, 0, sizeof d);
        d.threads = 1;
        d.alloc = tight_alloc;
        d.user = &t;
        if (!(c = dpo_open(&d))) { CHECK(0, "no context"); break; }
        t.fail_at = t.calls + n;
        tight_run(c, v.at, (size_t)v.n);
        more = t.calls >= t.fail_at;
        calls = t.calls;
        if (more) silent += dpo_status(c) != DPO_OUT_OF_MEMORY;
        else CHECK(!dpo_error(c), "with all allocations: %s", dpo_error(c));
        dpo_close(c);
        lost += t.live != 0;
    }
    CHECK(!silent, "%d failed allocations of %d gave no error", (int)silent, (int)calls);
    CHECK(!lost, "%d runs of %d lost memory", (int)lost, (int)n);
    CHECK(n > 100, "only %d allocations", (int)n);
    CHECK(!dpoi_exists(FOLDER "/tight.safetensors.tmp"), "a temporary file stayed");
    dpoi_text_free(&v);
}

/* ---------------------------------------------------------------------------------------------- by name: Python */

/* Our file read and written again by Python's safetensors: the same bytes. */
static int interop(dpo_ctx *c, const char *python)
{
    char    command[1024], *text;
    size_t  n;
    dpoi_mkdirs(c, FOLDER);
    CHECK(save_samples(c, FOLDER "/ours.safetensors", NULL), "%s", dpo_error(c));
    snprintf(command, sizeof command, "%s -c \"from safetensors.torch import load_file, save_file; "
             "d = load_file('" FOLDER "/ours.safetensors'); "
             "save_file(d, '" FOLDER "/theirs.safetensors', {'format': 'pt'}); "
             "assert d['b.weight'].tolist() == [[0, .25, .5], [.75, 1, 1.25]]\"", python);
    CHECK(system(command) == 0, "Python could not read it");
    if (dpoi_read_file(c, FOLDER "/theirs.safetensors", 1 << 20, &text, &n)) {
        CHECK(read_back(c, FOLDER "/ours.safetensors", text, n), "the bytes differ");
        dpoi_release(c, text, n + 1);
    } else CHECK(0, "%s", dpo_error(c));
    dpo_close(c);
    return test_report();
}

int main(int argc, char **argv)
{
    dpo_ctx *c = open_context();
    if (argc == 3 && !strcmp(argv[1], "interop")) return interop(c, argv[2]);
    CHECK(dpoi_mkdirs(c, FOLDER), "%s", dpo_error(c));
    test_json_values(c);
    test_json_refused(c);
    test_json_numbers(c);
    test_json_locale(c);
    test_json_large(c);
    test_json_writing(c);
    test_files(c);
    test_reading(c);
    test_damaged(c);
    test_hostile(c);
    test_other_formats(c);
    test_writing(c);
    test_full_disk(c);
    test_shards(c);
    test_tokenizer(c);
    test_long_prompts(c);
    test_tokenizer_folder(c);
    test_golden_tokens(c, argc > 1 ? argv[1] : "../shared/golden");
    test_allocations(c);
    CHECK(!dpo_error(c), "an error was left: %s", dpo_error(c));
    dpo_close(c);
    return test_report();
}
