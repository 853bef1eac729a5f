/* test_data.c - pairs in every form and every kind of bad row, views, buckets, the loader beside the caller's thread, keys,
   and the cache through kills, damage and full disks; every allocation made to fail in turn.

   build   cc -O2 tests/test_data.c -o build/test_data -lm -lpthread
   run     build/test_data          from the project's folder */
#define DIFFDPO_IMPLEMENTATION
#ifndef DATA_HEADER
#define DATA_HEADER "../diffdpo.h"
#endif
#include DATA_HEADER
#include "dpo_test.h"
#if defined(DPOI_FILES_POSIX)
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#endif

#define FOLDER "build/test_data.tmp"

/* ---- what the tests share --------------------------------------------------------------------------------------- */

/* All lines of the log, one after another. */
typedef struct { char text[16384]; size_t n; int errors; } lines;

static void keep_lines(void *user, int level, const char *text)
{
    lines *l = (lines *)user;
    size_t n = strlen(text);
    if (level == DPO_LOG_ERROR) l->errors++;
    if (l->n + n + 2 > sizeof l->text) return;
    memcpy(l->text + l->n, text, n);
    l->n += n;
    l->text[l->n++] = '\n';
    l->text[l->n] = 0;
}

static void forget(lines *l) { memset(l, 0, sizeof *l); }

static dpo_ctx *open_logging(lines *l)
{
    dpo_desc d;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    d.log = l ? keep_lines : NULL;
    d.user = l;
    return dpo_open(&d);
}

static const char *why(dpo_ctx *c) { return dpo_error(c) ? dpo_error(c) : "no error"; }

static void put_bytes(const char *path, const void *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (f) { fwrite(bytes, 1, n, f); fclose(f); }
}

static void put(const char *path, const char *text) { put_bytes(path, text, strlen(text)); }

static size_t get_bytes(const char *path, uint8_t *p, size_t room)
{
    FILE  *f = fopen(path, "rb");
    size_t n = f ? fread(p, 1, room, f) : 0;
    if (f) fclose(f);
    return n;
}

static int remove_one(void *user, const char *name)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", (const char *)user, name);
    dpoi_sys_remove(path);
    return 1;
}

/* The files in a folder, not the folders. */
static void empty(dpo_ctx *c, const char *folder)
{
    char name[400];
    snprintf(name, sizeof name, "%s", folder);
    dpo_make_folder(c, folder);
    dpoi_sys_list(folder, remove_one, name);
}

static void fill(dpo_image *x, uint64_t seed)
{
    for (int64_t i = 0; i < (int64_t)x->width * x->height * 3; i++) x->rgb[i] = (uint8_t)test_random(&seed);
}

/* Without stb only the names of pictures can be tested. */
static int put_picture(dpo_ctx *c, const char *path, int width, int height, uint64_t seed)
{
    dpo_image x;
    int       ok;
    put(path, "");
    if (!dpo_image_new(c, width, height, &x)) return 0;
    fill(&x, seed);
    ok = dpo_image_save(c, path, &x);
    if (!ok && dpo_status(c) == DPO_UNSUPPORTED) dpo_clear_error(c);
    dpo_image_free(c, &x);
    return ok;
}

static int has_stb;

static void make_pictures(dpo_ctx *c)
{
    static const char *const folders[] = { "", "/train", "/test", "/pairs", "/pairs/w", "/pairs/l", "/kohya", "/kohya/10_cat",
        "/kohya/10_cat/w", "/kohya/10_cat/l", "/kohya/dog", "/kohya/dog/w", "/kohya/dog/l", "/bad", "/bad/w", "/bad/l", "/half",
        "/half/w", "/none" };
    char path[400];
    for (size_t k = 0; k < sizeof folders / sizeof *folders; k++) {
        snprintf(path, sizeof path, FOLDER "%s", folders[k]);
        empty(c, path);
    }
    has_stb = put_picture(c, FOLDER "/a.png", 12, 8, 1);
    put(FOLDER "/text.png", "no picture");
    put_picture(c, FOLDER "/b.png", 12, 8, 2);
    put_picture(c, FOLDER "/c.png", 20, 30, 3);
    put_picture(c, FOLDER "/small.png", 4, 6, 4);
    put_picture(c, FOLDER "/d, d.png", 12, 8, 5);
    put_picture(c, FOLDER "/train/a.png", 12, 8, 1);
    put_picture(c, FOLDER "/train/b.png", 12, 8, 2);
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, FOLDER "/test/%d.png", i);
        put_picture(c, path, 8, 8, (uint64_t)i);
    }
}

/* ---- rows that are good ----------------------------------------------------------------------------------------- */

/* Pair i must have these; the ends of paths are compared. */
static void want(const dpo_pairs *p, int64_t i, const char *prompt, const char *won, const char *lost, int liked, int line)
{
    const dpoi_duel *x = dpoi_pairs_has(p, i) ? &p->pair[i] : NULL;
    if (!x) { CHECK(0, "no pair %d", (int)i); return; }
    CHECK(!strcmp(x->prompt, prompt), "pair %d: prompt \"%.60s\", not \"%.60s\"", (int)i, x->prompt, prompt);
    CHECK(x->path[0] && dpoi_ends_with(x->path[0], won), "pair %d: %s, not %s", (int)i, x->path[0], won);
    CHECK(lost ? x->path[1] && dpoi_ends_with(x->path[1], lost) : !x->path[1], "pair %d: the other is %s, not %s", (int)i,
          x->path[1] ? x->path[1] : "none", lost ? lost : "none");
    CHECK(dpo_pairs_liked(p, i) == liked && x->line == line, "pair %d: liked %d, line %d", (int)i, x->liked, (int)x->line);
}

static dpo_pairs *load(dpo_ctx *c, const char *name, const char *text, int64_t count, int64_t ties)
{
    char       path[400];
    dpo_pairs *p;
    snprintf(path, sizeof path, FOLDER "/%s", name);
    if (text) put(path, text);
    p = dpo_pairs_load(c, path);
    CHECK(p && dpo_pairs_count(p) == count && dpo_pairs_ties(p) == ties, "%s: %d pairs, %d ties, %s", name,
          (int)dpo_pairs_count(p), (int)dpo_pairs_ties(p), why(c));
    dpo_clear_error(c);
    return p;
}

static void test_json(dpo_ctx *c)
{
    dpo_pairs *p = load(c, "good.jsonl", "\xef\xbb\xbf{\"prompt\": \"a\", \"chosen\": \"a.png\", \"rejected\": \"b.png\", \"weight\": 2}\r\n\n"
        "{\"caption\": \"b\", \"image_0\": \"a.png\", \"image_1\": \"b.png\", \"label_0\": 0, \"label_1\": 1}\n"
        "{\"caption\": \"b\", \"image_0\": \"a.png\", \"image_1\": \"b.png\", \"label_0\": 0.5}\n"
        "{\"prompt\": \"r\", \"images\": [\"a.png\", \"b.png\", \"c.png\", \"small.png\"], \"rank\": [2, 1, 2, 3.5]}\n"
        "{\"prompt\": \"l\", \"image\": \"a.png\", \"liked\": true}\n{\"prompt\": \"l\", \"image\": \"b.png\", \"liked\": 0}\n"
        "{\"prompt\": \"s\", \"chosen\": \"a.png\", \"rejected\": null}", 10, 2);
    char       where[100];
    want(p, 0, "a", "/a.png", "/b.png", 0, 1);
    want(p, 1, "b", "/b.png", "/a.png", 0, 3);
    want(p, 2, "r", "/b.png", "/a.png", 0, 5);
    want(p, 3, "r", "/a.png", "/small.png", 0, 5);        /* a and c have one rank: a tie */
    want(p, 4, "r", "/b.png", "/c.png", 0, 5);
    want(p, 5, "r", "/b.png", "/small.png", 0, 5);
    want(p, 6, "r", "/c.png", "/small.png", 0, 5);
    want(p, 7, "l", "/a.png", NULL, 1, 6);
    want(p, 8, "l", "/b.png", NULL, -1, 7);
    want(p, 9, "s", "/a.png", NULL, 0, 8);
    CHECK(dpo_pairs_weight(p, 0) == 2 && dpo_pairs_weight(p, 1) == 1, "weights");
    CHECK(p && p->pictures == 4, "four files are four pictures");
    CHECK(!strcmp(dpo_pairs_where(p, 4, where, sizeof where), FOLDER "/good.jsonl:5"), "%s", where);

    p = load(c, "train.json", "[{\"human_preference\": [0, 1], \"prompt\": \"x ]},[\\\" y\", \"file_path\": [\"a.png\", \"b.png\"],"
        " \"user_hash\": \"\\\\\"},\n\n {\"human_preference\": [1, 0], \"prompt\": \"z\", \"file_path\": [\"a.png\", \"b.png\"]}]\n", 2, 0);
    want(p, 0, "x ]},[\" y", "/b.png", "/a.png", 0, 1);
    want(p, 1, "z", "/a.png", "/b.png", 0, 3);
    p = load(c, "test.json", "\n[\n {\"prompt\": \"k\", \"image_path\": [\"0.png\", \"1.png\", \"2.png\"], \"rank\": [2, 0, 1],\n"
        "  \"raw_annotations\": [{\"rank\": [2, 1, 3], \"user_hash\": \"h\"}]}\n]", 3, 0);
    want(p, 0, "k", "/test/1.png", "/test/0.png", 0, 3);
    want(p, 1, "k", "/test/2.png", "/test/0.png", 0, 3);
    want(p, 2, "k", "/test/1.png", "/test/2.png", 0, 3);
    p = load(c, "reward.json", "[{\"id\": \"1\", \"prompt\": \"g\", \"generations\": [\"a.png\", \"b.png\"], \"ranking\": [1, 2]}]", 1, 0);
    want(p, 0, "g", "/a.png", "/b.png", 0, 1);
    load(c, "lines.json", "{\"prompt\": \"a\", \"chosen\": \"a.png\"}\n{\"prompt\": \"b\", \"chosen\": \"a.png\"}\n", 2, 0);
}

static void test_csv(dpo_ctx *c)
{
    static char long_row[10200];
    dpo_pairs  *p = load(c, "good.csv", "\xef\xbb\xbfprompt,chosen,rejected,weight,rater\r\na,a.png,b.png,2,me\r\n"
        "\"two\r\nlines, \"\"quoted\"\"\",\"d, d.png\",b.png,,\r\n\r\n\"\",a.png,,0.25,\"x\"", 3, 0);
    want(p, 0, "a", "/a.png", "/b.png", 0, 2);
    want(p, 1, "two\r\nlines, \"quoted\"", "/d, d.png", "/b.png", 0, 3);
    want(p, 2, "", "/a.png", NULL, 0, 6);
    CHECK(dpo_pairs_weight(p, 0) == 2 && dpo_pairs_weight(p, 1) == 1 && dpo_pairs_weight(p, 2) == 0.25f, "weights");
    p = load(c, "good.tsv", "label_0\tcaption\timage_0\timage_1\n1\ta, b\ta.png\tb.png\n0.5\tc\ta.png\tb.png\n0\td\ta.png\tb.png\n", 2, 1);
    want(p, 0, "a, b", "/a.png", "/b.png", 0, 2);
    want(p, 1, "d", "/b.png", "/a.png", 0, 4);
    p = load(c, "liked.txt", "image,prompt,liked\na.png,x,True\nb.png,y,0\nb.png,y,FALSE\na.png,z,1\n", 4, 0);
    want(p, 0, "x", "/a.png", NULL, 1, 2);
    want(p, 1, "y", "/b.png", NULL, -1, 3);
    want(p, 2, "y", "/b.png", NULL, -1, 4);
    want(p, 3, "z", "/a.png", NULL, 1, 5);
    strcpy(long_row, "prompt,chosen\n");
    memset(long_row + 14, 'x', 10000);
    strcpy(long_row + 10014, ",a.png\n");
    p = load(c, "long.csv", long_row, 1, 0);
    CHECK(p && strlen(dpo_pairs_prompt(p, 0)) == 10000, "a prompt of 10,000 letters");
}

static void test_folders(dpo_ctx *c)
{
    static const char *const w[] = { "b.png", "a-1.png", "a.png", "Z.png" }, *const l[] = { "Z.png", "a.bmp", "a-1.png", "b.png" };
    dpo_pairs *p;
    char       path[400], where[200];
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, FOLDER "/pairs/w/%s", w[i]);
        put(path, "");
        snprintf(path, sizeof path, FOLDER "/pairs/l/%s", l[i]);
        put(path, "");
    }
    put(FOLDER "/pairs/w/a.txt", "\xef\xbb\xbf\n  first line \r\nsecond\n");
    put(FOLDER "/pairs/l/a.txt", "not this one");
    put(FOLDER "/pairs/l/a-1.caption", "of the loser");
    put(FOLDER "/pairs/w/b.caption", "");
    put(FOLDER "/pairs/l/Z.txt", "z");
    put(FOLDER "/pairs/w/.hidden.png", "");
    put(FOLDER "/pairs/w/a.npz", "");
    p = load(c, "pairs", NULL, 4, 0);
    want(p, 0, "z", "pairs/w/Z.png", "pairs/l/Z.png", 0, 0);
    want(p, 1, "first line", "pairs/w/a.png", "pairs/l/a.bmp", 0, 0);
    want(p, 2, "of the loser", "pairs/w/a-1.png", "pairs/l/a-1.png", 0, 0);
    want(p, 3, "", "pairs/w/b.png", "pairs/l/b.png", 0, 0);
    CHECK(!strcmp(dpo_pairs_where(p, 3, where, sizeof where), FOLDER "/pairs/w/b.png"), "%s", where);
    put(FOLDER "/kohya/dog/w/1.png", "");
    put(FOLDER "/kohya/dog/l/1.png", "");
    put(FOLDER "/kohya/dog/w/1.txt", "dog");
    put(FOLDER "/kohya/10_cat/w/1.jpg", "");
    put(FOLDER "/kohya/10_cat/l/1.jpg", "");
    put(FOLDER "/kohya/10_cat/l/1.txt", "cat");
    p = load(c, "kohya", NULL, 2, 0);
    want(p, 0, "cat", "10_cat/w/1.jpg", "10_cat/l/1.jpg", 0, 0);
    want(p, 1, "dog", "dog/w/1.png", "dog/l/1.png", 0, 0);
}

/* ---- rows that are not ------------------------------------------------------------------------------------------ */

/* A file of rows, those of `bad` must be told as NAME:LINE with words, all others are good. */
typedef struct { const char *name, *text, *bad[12]; int good; } bad_case;

#define PAIR "{\"prompt\": \"a\", \"chosen\": \"a.png\", \"rejected\": \"b.png\"}"
static const bad_case bad_cases[] = {
    { "bad.jsonl", "{\"prompt\": \"a\", \"chosen\": \"a.png\"\n[1]\n" PAIR "\n{\"chosen\": \"a.png\"}\n{\"prompt\": \"a\"}\n"
        "{\"prompt\": \"a\", \"chosen\": \"nowhere.png\", \"rejected\": \"b.png\"}\n{\"prompt\": 3, \"chosen\": \"a.png\"}\n"
        "{\"prompt\": \"a\", \"chosen\": \"a.png\", \"rejected\": \"no\\u0000.png\"}\n{\"prompt\": \"a\", \"chosen\": \"a.png\", \"weight\": -1}\n"
        "{\"prompt\": \"a\", \"image_0\": \"a.png\", \"image_1\": \"b.png\", \"label_0\": 0.7}\n"
        "{\"prompt\": \"a\", \"image_0\": \"a.png\", \"label_0\": 1}\n" PAIR " x\n{\"prompt\": \"\xff\", \"chosen\": \"a.png\"}\n",
        { ":1: ", ":2: a row must be an object", ":4: there is no \"prompt\"", ":5: there is no \"chosen\"", ":6: there is no file \"nowhere.png\"",
          ":7: no plain text in \"prompt\"", ":8: no plain text in \"rejected\"", ":9: \"weight\"", ":10: \"label_0\"", ":11: there is no \"image_1\"",
          ":12: ", ":13: " }, 1 },
    { "ranks.jsonl", "{\"prompt\": \"a\", \"images\": [\"a.png\"], \"rank\": [1]}\n{\"prompt\": \"a\", \"images\": [\"a.png\", \"b.png\"], \"rank\": [1]}\n"
        "{\"prompt\": \"a\", \"images\": [\"a.png\", \"b.png\"]}\n{\"prompt\": \"a\", \"images\": [\"a.png\", 2], \"rank\": [1, 2]}\n"
        "{\"prompt\": \"a\", \"images\": [\"a.png\", \"b.png\"], \"rank\": [1, \"2\"]}\n"
        "{\"prompt\": \"a\", \"images\": [\"a.png\", \"b.png\", \"no.png\"], \"rank\": [1, 2, 3]}\n{\"prompt\": \"a\", \"image\": \"a.png\", \"liked\": 2}\n"
        "{\"prompt\": \"a\", \"image\": \"a.png\"}\n{\"prompt\": \"a\", \"image\": \"no.png\", \"liked\": true}\n" PAIR,
        { ":1: 1 pictures", ":2: 2 pictures and 1 ranks", ":3: 2 pictures and 0 ranks", ":4: picture 1 has no plain name",
          ":5: picture 1 has no number", ":6: there is no file \"no.png\"", ":7: \"liked\" must be", ":8: \"liked\" must be", ":9: there is no file" }, 1 },
    { "bad.json", "[\n" PAIR ",\n{\"prompt\": \"a\",\n \"chosen\"},\n,\n 7, " PAIR "\n] x\n", { ":3: ", ":5: ", ":6: a row must be", ":7: something follows" }, 2 },
    { "open.json", "[" PAIR ",\n" PAIR "\n", { ":3: the list does not end" }, 2 },
    { "bad.csv", "prompt,chosen,rejected,weight\na,a.png,b.png\na,a.png,b.png,1,2\n\"a\nb\"x,a.png,b.png,1\na\"b,a.png,b.png,1\na,no.png,b.png,1\n"
        "a,,b.png,1\n,a.png,b.png,1\na,a.png,b.png,1 \na,a.png,b.png,1e9\na\xff,a.png,b.png,\na,a.png,b.png,\na,a.png,\"b.png,1\n",
        { ":2: 3 fields, where", ":3: 5 fields", ":4: something follows a closing quote", ":6: a quote inside", ":7: there is no file \"no.png\"",
          ":8: there is no \"chosen\"", ":9: there is no \"prompt\"", ":10: \"weight\"", ":11: \"weight\"", ":12: not UTF-8",
          ":14: a quoted field does not end" }, 1 },
    { "labels.csv", "prompt,image_0,image_1,label_0,image,liked\na,a.png,b.png,yes,,\na,,,,a.png,maybe\na,a.png,,1,,\na,a.png,b.png,1,,\n",
        { ":2: \"label_0\" must be", ":3: \"liked\" must be", ":4: there is no \"image_1\"" }, 1 },
};

static void test_bad(dpo_ctx *c, lines *log)
{
    for (size_t k = 0; k < sizeof bad_cases / sizeof *bad_cases; k++) {
        const bad_case *b = &bad_cases[k];
        dpo_pairs_counts counts;
        dpo_pairs *p;
        char       path[400], place[500];
        int        n = 0;
        snprintf(path, sizeof path, FOLDER "/%s", b->name);
        put(path, b->text);
        forget(log);
        p = dpo_pairs_load_good(c, path);
        for (; n < 12 && b->bad[n]; n++) {
            snprintf(place, sizeof place, "%s%s", path, b->bad[n]);
            CHECK(strstr(log->text, place) != NULL, "%s: nobody said \"%s\" in:\n%s", b->name, b->bad[n], log->text);
        }
        CHECK(p && log->errors == n && dpo_pairs_count(p) == b->good, "%s: %d errors, %d pairs, %s:\n%s", b->name, log->errors,
              (int)dpo_pairs_count(p), why(c), log->text);
        if (has_stb) CHECK(dpo_pairs_survey(p, 0, &counts) && counts.bad_rows == n && counts.rows == n + b->good, "%s: %d rows, %d bad",
                           b->name, (int)counts.rows, (int)counts.bad_rows);
        dpo_pairs_free(p);
        snprintf(place, sizeof place, "%d more", n - 1);
        CHECK(!dpo_pairs_load(c, path) && strstr(why(c), path) && (n == 1 || strstr(why(c), place)), "%s: %s", b->name, why(c));
        dpo_clear_error(c);
    }
}

/* Whole files that are refused. */
static void test_refused(dpo_ctx *c)
{
    static const struct { const char *name, *text, *words; } cases[] = {
        { "header.csv", "chosen,rejected\na.png,b.png\n", "header.csv:1: the header line has no column \"prompt\"" },
        { "twice.csv", "prompt,chosen,chosen\na,a.png,a.png\n", "twice.csv:1: two columns have the name \"chosen\"" },
        { "broken.csv", "\"prompt,chosen\n", "broken.csv:1: a quoted field does not end" },
        { "empty.jsonl", "", "empty.jsonl: no pairs in it" }, { "empty.csv", "prompt,chosen\n", "no pairs in it" },
        { "empty.json", " [ ]", "no pairs in it" }, { "a.parquet", "PAR1....", "parquet_manifest.py" },
        { "none", NULL, "no folders w and l" }, { "half", NULL, "cannot list the folder " FOLDER "/half/l: no such file" },
        { "nowhere.jsonl", NULL, "cannot open " FOLDER "/nowhere.jsonl: no such file" },
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        char path[400];
        snprintf(path, sizeof path, FOLDER "/%s", cases[k].name);
        if (cases[k].text) put(path, cases[k].text);
        CHECK(!dpo_pairs_load(c, path) && strstr(why(c), cases[k].words), "%s: %s", cases[k].name, why(c));
        dpo_clear_error(c);
    }
    CHECK(!dpo_pairs_load(c, NULL) && !dpo_pairs_load(NULL, "x") && !dpo_error(c), "NULL");
}

static void test_bad_folder(dpo_ctx *c, lines *log)
{
    static const char *const files[] = { "w/good.png", "l/good.png", "w/good.txt", "w/alone.png", "w/alone.txt", "l/lonely.png", "w/mute.png",
        "l/mute.png", "w/web.webp", "l/web.png", "w/web.txt", "w/two.jpg", "w/two.png", "l/two.png", "w/two.txt", "w/odd.png", "l/odd.png" };
    static const char *const words[] = { "/w/alone.png: no picture of that name in l/", "/l/lonely.png: no picture of that name in w/",
        "/w/mute.png: no caption", "/w/web.webp: a kind of picture", "/w/two.png: no picture", "/l/odd.txt: not UTF-8" };
    dpo_pairs *p;
    char       path[400];
    for (size_t k = 0; k < sizeof files / sizeof *files; k++) {
        snprintf(path, sizeof path, FOLDER "/bad/%s", files[k]);
        put(path, "x");
    }
    put(FOLDER "/bad/l/odd.txt", "\xff");
    forget(log);
    p = dpo_pairs_load_good(c, FOLDER "/bad");
    for (size_t k = 0; k < 6; k++) CHECK(strstr(log->text, words[k]) != NULL, "nobody said \"%s\" in:\n%s", words[k], log->text);
    CHECK(p && log->errors == 6 && p->bad == 6 && p->rows == 8 && dpo_pairs_count(p) == 2, "%d errors, %d rows, %d pairs", log->errors,
          p ? (int)p->rows : 0, (int)dpo_pairs_count(p));
    want(p, 0, "x", "bad/w/good.png", "bad/l/good.png", 0, 0);
    CHECK(!dpo_pairs_load(c, FOLDER "/bad") && strstr(why(c), "alone.png") && strstr(why(c), "5 more"), "%s", why(c));
    dpo_clear_error(c);
}

static void test_survey(dpo_ctx *c, lines *log)
{
    static uint8_t   png[4096];
    dpo_pairs_counts n;
    dpo_pairs       *p;
    size_t           bytes = get_bytes(FOLDER "/a.png", png, sizeof png);
    if (!has_stb) { SKIP("no stb_image: pictures cannot be looked at"); return; }
    put_bytes(FOLDER "/cut.png", png, bytes / 2);         /* its header is whole */
    p = load(c, "survey.jsonl", PAIR "\n{\"prompt\": \"a\", \"chosen\": \"a.png\", \"rejected\": \"c.png\"}\n"
        "{\"prompt\": \"a\", \"chosen\": \"a.png\", \"rejected\": \"text.png\"}\n{\"prompt\": \"a\", \"chosen\": \"text.png\", \"rejected\": \"a.png\"}\n"
        "{\"prompt\": \"a\", \"image\": \"cut.png\", \"liked\": true}\n{\"prompt\": \"a\", \"image\": \"a.png\", \"liked\": false}\n", 6, 0);
    forget(log);
    CHECK(dpo_pairs_survey(p, 0, &n) && n.pairs == 4 && n.liked == 1 && n.disliked == 1 && n.pictures == 5 && n.unreadable == 1 && n.different == 1,
          "headers: %d pairs, %d pictures, %d unreadable, %d differ, %s", (int)n.pairs, (int)n.pictures, (int)n.unreadable, (int)n.different, why(c));
    CHECK(strstr(log->text, "survey.jsonl:3: ") && strstr(log->text, "text.png") && strstr(log->text, "survey.jsonl:2: pictures of different sizes, 12x8 and 20x30") &&
          log->errors == 1, "%s", log->text);
    CHECK(dpo_pairs_survey(p, 1, &n) && n.unreadable == 2 && strstr(log->text, "survey.jsonl:5: ") && !dpo_error(c), "decoded: %d unreadable, %s",
          (int)n.unreadable, log->text);
    CHECK(!dpo_pairs_check(p) && strstr(why(c), "survey.jsonl:3"), "%s", why(c));
    dpo_clear_error(c);
}

/* ---- views and buckets ------------------------------------------------------------------------------------------ */

static dpo_window window(int width, int height, float x, float y, int flip)
{
    dpo_window v;
    v.width = width; v.height = height; v.at_x = x; v.at_y = y; v.flip = flip;
    return v;
}

/* What a view must be: all of the covering picture, then cut and mirrored by hand. */
static void expect_view(dpo_ctx *c, const dpo_image *x, const dpo_window *v, int w, int h, const uint8_t *got)
{
    dpo_image cover;
    int       left = (int)rint((w - v->width) * (double)v->at_x), top = (int)rint((h - v->height) * (double)v->at_y), bad = 0, l = -1, t = -1;
    CHECK(dpo_window_place(v, x->width, x->height, &l, &t) && l == left && t == top, "the cut is at %d,%d, not %d,%d", l, t, left, top);
    if (!dpo_image_fit(c, x, w, h, &cover)) { CHECK(0, "%s", why(c)); return; }
    for (int i = 0; i < v->height; i++)
        for (int j = 0; j < v->width; j++)
            for (int k = 0; k < 3; k++)
                bad += got[(i*v->width + (v->flip ? v->width - 1 - j : j))*3 + k] != cover.rgb[((top + i)*w + left + j)*3 + k];
    CHECK(!bad, "a view %dx%d at %g,%g flip %d of %dx%d: %d bytes differ", v->width, v->height, v->at_x, v->at_y, v->flip, x->width, x->height, bad);
    dpo_image_free(c, &cover);
}

static void test_views(dpo_ctx *c)
{
    static uint8_t rgb[64*64*3];
    dpo_image      x, fit;
    dpo_window     v;
    if (!dpo_image_new(c, 40, 20, &x)) return;
    fill(&x, 9);
    for (int k = 0; k < 12; k++) {
        v = window(k % 3 ? 10 : 16, k % 3 == 2 ? 14 : 10, (float)(k % 4) / 3, (float)(k % 5) / 4, k & 1);
        CHECK(dpo_image_view(c, &x, &v, rgb), "%s", why(c));
        expect_view(c, &x, &v, 40 * v.height / 20, v.height, rgb);
    }
    v = window(10, 12, 0.5f, 0.5f, 0);
    CHECK(dpo_image_view(c, &x, &v, rgb) && dpo_image_fit(c, &x, 10, 12, &fit) && !memcmp(rgb, fit.rgb, 360), "the centre is dpo_image_fit's");
    v = window(64, 64, 0, 1, 1);
    CHECK(dpo_image_view(c, &x, &v, rgb), "enlarged: %s", why(c));
    expect_view(c, &x, &v, 128, 64, rgb);
    for (int k = 0; k < 5; k++) {
        v = window(k == 0 ? 0 : 8, k == 1 ? -1 : 8, k == 2 ? 1.5f : k == 3 ? (float)NAN : 0, k == 4 ? -0.1f : 0, 0);
        CHECK(!dpo_image_view(c, &x, &v, rgb) && dpo_status(c) == DPO_BAD_ARGUMENT, "an impossible window %d", k);
        dpo_clear_error(c);
    }
}

static void test_pair_views(dpo_ctx *c)
{
    static uint8_t rgb[12*8*3], again[12*8*3];
    dpo_pairs     *p = dpo_pairs_new(c);
    dpo_image      x;
    dpo_window     v = window(6, 8, 1, 0, 1);
    int            w = 0, h = 0;
    if (!has_stb) { SKIP("no stb_image: files cannot be viewed"); return; }
    dpo_pairs_add_files(p, "a", FOLDER "/a.png", FOLDER "/text.png", 1);
    if (dpo_image_load(c, FOLDER "/a.png", &x)) dpo_pairs_add(p, "b", &x, NULL, 1);
    CHECK(dpo_pairs_view(p, 0, 0, &v, rgb) && dpo_pairs_view(p, 1, 0, &v, again) && !memcmp(rgb, again, 6*8*3), "%s", why(c));
    expect_view(c, &x, &v, 12, 8, rgb);
    CHECK(dpo_pairs_size(p, 0, 0, &w, &h) && w == 12 && h == 8, "a size: %dx%d", w, h);
    CHECK(!dpo_pairs_view(p, 0, 1, &v, rgb) && strstr(why(c), "pair 0: ") && strstr(why(c), "text.png"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_pairs_view(p, 1, 1, &v, rgb) && strstr(why(c), "no rejected picture"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_pairs_size(p, 2, 0, &w, &h) && strstr(why(c), "no pair 2"), "%s", why(c));
    dpo_clear_error(c);
}

/* Numbers from kohya's make_bucket_resolutions and select_bucket, run in Python. */
static void test_buckets(dpo_ctx *c)
{
    static const int want_of[][6] = { { 512, 512, 512, 64, 512, 512 }, { 1024, 512, 512, 64, 704, 320 }, { 512, 1024, 512, 64, 320, 704 },
        { 1920, 1080, 512, 64, 640, 384 }, { 1080, 1920, 512, 64, 384, 640 }, { 640, 384, 512, 64, 640, 384 }, { 3000, 100, 512, 64, 1024, 256 },
        { 100, 3000, 512, 64, 256, 1024 }, { 1024, 1024, 1024, 64, 1024, 1024 }, { 1344, 768, 1024, 64, 1344, 768 },
        { 1000, 777, 1024, 64, 1152, 896 }, { 4000, 3000, 768, 64, 896, 640 }, { 33, 40, 32, 8, 32, 32 }, { 500, 333, 100, 7, 119, 84 },
        { 90, 10, 100, 64, 128, 64 }, { 1000, 300, 512, 0, 512, 512 } };
    static const int kinds[3][2] = { { 512, 64 }, { 768, 32 }, { 1024, 64 } };
    uint32_t   sum = 0;
    dpo_pairs *p = dpo_pairs_new(c);
    int        w = 0, h = 0;
    for (size_t k = 0; k < sizeof want_of / sizeof *want_of; k++) {
        const int *a = want_of[k];
        CHECK(dpo_bucket(a[0], a[1], a[2], a[3], &w, &h) && w == a[4] && h == a[5], "%dx%d at %d/%d: %dx%d, not %dx%d", a[0], a[1], a[2], a[3], w,
              h, a[4], a[5]);
    }
    for (int i = 64; i < 2049; i += 37)
        for (int j = 64; j < 2049; j += 41)
            for (int k = 0; k < 3; k++) {
                dpo_bucket(i, j, kinds[k][0], kinds[k][1], &w, &h);
                sum = sum * 31 + (uint32_t)w * 7 + (uint32_t)h;
            }
    CHECK(sum == 3196718464u, "the sweep over sizes gives %u", sum);
    CHECK(!dpo_bucket(0, 1, 512, 64, &w, &h) && !dpo_bucket(1, 1, 0, 64, &w, &h) && !dpo_bucket(1, 1, 64, 128, &w, &h), "impossible buckets");
    if (!has_stb) return;
    dpo_pairs_add_files(p, "a", FOLDER "/a.png", FOLDER "/c.png", 1);         /* 12x8 and 20x30 */
    dpo_pairs_add_files(p, "a", FOLDER "/c.png", FOLDER "/small.png", 1);     /* 20x30 and 4x6 */
    CHECK(dpo_pairs_bucket(p, 0, 8, 4, &w, &h) && w == 8 && h == 8, "both cover: %dx%d, %s", w, h, why(c));
    CHECK(!dpo_pairs_bucket(p, 1, 8, 4, &w, &h) && strstr(why(c), "pair 1: pictures of different sizes, 20x30 and 4x6"), "%s", why(c));
    dpo_clear_error(c);
}

/* ---- the loader ------------------------------------------------------------------------------------------------- */

static void test_loader(dpo_ctx *c, int beside)
{
    static uint8_t rgb[16*16*3];
    dpo_pairs     *p = load(c, "loader.jsonl", PAIR "\n{\"prompt\": \"a\", \"chosen\": \"c.png\", \"rejected\": \"text.png\"}\n"
                            "{\"prompt\": \"a\", \"chosen\": \"small.png\"}\n", 3, 0);
    dpo_loader    *l = dpo_loader_new(p, 4, beside);
    const uint8_t *got;
    dpo_image      x;
    dpo_window     v;
    if (!has_stb) { SKIP("no stb_image: nothing can be loaded"); return; }
    if (dpo_image_new(c, 9, 9, &x)) { fill(&x, 8); dpo_pairs_add(p, "m", &x, &x, 1); }
    for (int k = 0; k < 40; k++) {        /* each slot asked for anew while others are being made */
        static const int pair[4] = { 0, 3, 1, 2 };
        for (int s = 0; s < 4 && k % 4 == 0; s++) {
            v = window(4 + (k + s) % 9, 8, (float)s / 3, 0.25f, s & 1);
            CHECK(dpo_loader_ask(l, s, pair[s], 0, &v), "%s", why(c));
            if (s == 1) dpo_pairs_add(p, "more", &x, NULL, 1);              /* the list of pairs may move meanwhile */
        }
        v = window(4 + (k/4*4 + k%4) % 9, 8, (float)(k % 4) / 3, 0.25f, k & 1);
        got = dpo_loader_take(l, k % 4);
        CHECK(got && dpo_pairs_view(p, pair[k % 4], 0, &v, rgb) && !memcmp(got, rgb, (size_t)v.width * 8 * 3), "view %d beside %d: %s", k, beside, why(c));
    }
    v = window(8, 8, 0, 0, 0);
    CHECK(dpo_loader_ask(l, 2, 1, 1, &v) && dpo_loader_ask(l, 3, 0, 1, &v), "%s", why(c));
    CHECK(!dpo_loader_take(l, 2) && strstr(why(c), "loader.jsonl:2: ") && strstr(why(c), "text.png"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(dpo_loader_take(l, 3) != NULL, "after an error: %s", why(c));
    CHECK(!dpo_loader_ask(l, 4, 0, 0, &v) && strstr(why(c), "no slot 4"), "%s", why(c));
    dpo_clear_error(c);
    CHECK(!dpo_loader_ask(l, 0, 2, 1, &v) && strstr(why(c), "loader.jsonl:3: no rejected picture"), "%s", why(c));
    dpo_clear_error(c);
    dpo_loader_free(l);
    l = dpo_loader_new(p, 3, beside);
    CHECK(!dpo_loader_take(l, 0) && strstr(why(c), "not asked for slot 0"), "%s", why(c));
    dpo_clear_error(c);
    for (int s = 0; s < 3; s++) dpo_loader_ask(l, s, 0, 0, &v);
    dpo_loader_new(p, 2, beside);
    dpo_pairs_free(p);                    /* with both loaders, one of them at work */
    CHECK(!dpo_error(c), "%s", why(c));
}

/* ---- keys ------------------------------------------------------------------------------------------------------- */

static int same_key(dpo_key a, dpo_key b) { return !memcmp(&a, &b, sizeof a); }

static void test_keys(dpo_ctx *c)
{
    static const struct { const char *text; uint64_t a, b; } known[] = {   /* of MurmurHash3_x64_128, seed 0 */
        { "", 0, 0 }, { "hello", 0xcbd8a7b341bd9b02u, 0x5b1e906a48ae1d19u }, { "hello, world", 0x342fac623a5ebc8eu, 0x4cdcbc079642414du },
        { "19 Jan 2038 at 3:14:07 AM", 0xb89e5988b737affcu, 0x664fc2950231b2cbu },
        { "The quick brown fox jumps over the lazy dog.", 0xcd99481f9ee902c9u, 0x695da1a38987b6e7u } };
    dpo_hash   h, g;
    dpo_key    a, b, k;
    dpo_pairs *p = dpo_pairs_new(c);
    dpo_image  x;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        for (size_t cut = 0; cut <= strlen(known[i].text); cut++) {
            memset(&h, 0, sizeof h);
            dpo_hash_bytes(&h, known[i].text, cut);
            dpo_hash_bytes(&h, known[i].text + cut, strlen(known[i].text) - cut);
            k = dpo_hash_end(&h);
            CHECK(k.word[0] == known[i].a && k.word[1] == known[i].b, "\"%s\" cut at %d: %016llx %016llx", known[i].text, (int)cut,
                  (unsigned long long)k.word[0], (unsigned long long)k.word[1]);
        }
    }
    dpo_hash_begin(&h, "p"); dpo_hash_text(&h, "ab"); dpo_hash_text(&h, "c");
    dpo_hash_begin(&g, "p"); dpo_hash_text(&g, "a"); dpo_hash_text(&g, "bc");
    CHECK(!same_key(dpo_hash_end(&h), dpo_hash_end(&g)), "texts have ends");
    dpo_hash_begin(&g, "q"); dpo_hash_text(&g, "ab"); dpo_hash_text(&g, "c");
    CHECK(!same_key(dpo_hash_end(&h), dpo_hash_end(&g)), "purposes differ");
    dpo_hash_begin(&h, "p"); dpo_hash_text(&h, NULL);
    dpo_hash_begin(&g, "p"); dpo_hash_text(&g, "");
    CHECK(!same_key(dpo_hash_end(&h), dpo_hash_end(&g)), "NULL is not \"\"");
    dpo_hash_begin(&h, "p"); dpo_hash_float(&h, 0.0);
    dpo_hash_begin(&g, "p"); dpo_hash_float(&g, -0.0);
    CHECK(same_key(dpo_hash_end(&h), dpo_hash_end(&g)), "-0 is 0");

    put(FOLDER "/one.bin", "content");
    put(FOLDER "/two.bin", "content");
    dpo_pairs_add_files(p, "a", FOLDER "/one.bin", FOLDER "/two.bin", 1);
    CHECK(dpo_pairs_key(p, 0, 0, &a) && dpo_pairs_key(p, 0, 1, &b) && same_key(a, b), "the same bytes, the same key: %s", why(c));
    put(FOLDER "/two.bin", "content!");
    CHECK(dpo_pairs_key(p, 0, 1, &b) && !same_key(a, b) && dpo_pairs_key(p, 0, 0, &k) && same_key(a, k), "a changed file has another key");
    dpo_image_new(c, 4, 6, &x);
    dpo_pairs_add(p, "m", &x, NULL, 1);
    CHECK(dpo_pairs_key(p, 1, 0, &a), "%s", why(c));
    x.width = 6; x.height = 4;
    dpo_pairs_add(p, "m", &x, NULL, 1);
    CHECK(dpo_pairs_key(p, 2, 0, &b) && !same_key(a, b), "a picture's shape is in its key");
    dpoi_sys_remove(FOLDER "/one.bin");
    CHECK(!dpo_pairs_key(p, 0, 0, &a) && strstr(why(c), "one.bin"), "%s", why(c));
    dpo_clear_error(c);
}

/* ---- the cache -------------------------------------------------------------------------------------------------- */

#define CACHE FOLDER "/cache"

static dpo_key key_of(int i)
{
    dpo_hash h;
    dpo_hash_begin(&h, "test");
    dpo_hash_int(&h, i);
    return dpo_hash_end(&h);
}

/* Entry i is two tensors or some floats, made of its number alone. */
static float value_of(int i, int j) { return (float)((i*37 + j*11) % 64) - 13.5f; }

static int put_entry(dpo_ctx *c, dpo_cache *k, int i)
{
    static const int types[3] = { DPO_F32, DPO_F16, DPO_BF16 };
    int64_t     scope = dpo_scope(c), shape[4] = { 1, 1, 1, 1 };
    dpo_tensor *x[2];
    float       v[64];
    dpo_key     key = key_of(i);
    int         ok;
    for (int j = 0; j < 64; j++) v[j] = value_of(i, j);
    if (i % 2) ok = dpo_cache_put_floats(k, &key, v, 1 + i % 20);
    else {
        shape[0] = 3; shape[1] = 1 + i % 5;
        x[0] = dpo_tensor_from(c, types[i / 2 % 3], 2, shape, v);
        shape[0] = 2; shape[1] = 3; shape[2] = 2; shape[3] = 5;
        x[1] = dpo_tensor_from(c, types[(i / 2 + 1) % 3], 4, shape, v);
        ok = dpo_cache_put(k, &key, x, 2);
    }
    dpo_scope_end(c, scope, NULL);
    return ok;
}

/* 1 found and right, 0 not there, -1 found and wrong. */
static int get_entry(dpo_ctx *c, dpo_cache *k, int i)
{
    int64_t     scope = dpo_scope(c);
    dpo_tensor *x[2] = { NULL, NULL };
    float       v[64];
    dpo_key     key = key_of(i);
    int         found, count[2] = { 1 + i % 20, 0 };
    found = i % 2 ? dpo_cache_get_floats(k, &key, v, count[0]) : dpo_cache_get(k, &key, x, 2);
    if (found && i % 2 == 0) {
        count[0] = 3 * (1 + i % 5);
        count[1] = 60;
        if (x[0]->rank != 2 || x[0]->shape[1] != 1 + i % 5 || x[1]->rank != 4 || x[1]->shape[3] != 5 || dpo_count(x[1]) != 60 ||
            dpo_count(x[0]) != count[0] || x[0]->dtype == x[1]->dtype) found = -1;
    }
    for (int t = 0; t < 2 && found == 1; t++) {
        if (i % 2 == 0 && !dpo_read(x[t], v)) found = -1;
        for (int j = 0; j < count[t] && found == 1; j++) if (v[j] != value_of(i, j)) found = -1;
    }
    dpo_scope_end(c, scope, NULL);
    return found;
}

static void test_cache(dpo_ctx *c)
{
    dpo_cache  *k, *other;
    dpo_key     key = key_of(1);
    float       v[4];
    int         good = 0;
    dpo_tensor *x[3];
    int64_t     shape[1] = { 2 };
    empty(c, CACHE);
    k = dpo_cache_open(c, CACHE);
    CHECK(k && dpo_cache_count(k) == 0 && !dpo_cache_has(k, &key), "%s", why(c));
    for (int i = 0; i < 150; i++) good += put_entry(c, k, i);
    CHECK(good == 150 && dpo_cache_count(k) == 150 && dpo_cache_has(k, &key), "%d of 150 kept, %s", good, why(c));
    for (int i = good = 0; i < 151; i++) good += get_entry(c, k, i) == (i < 150);
    CHECK(good == 151, "%d of 151 entries are right, %s", good, why(c));
    other = dpo_cache_open(c, CACHE);     /* as another process would, while the first goes on */
    for (int i = good = 0; i < 150; i++) good += get_entry(c, other, i) == 1;
    CHECK(good == 150, "%d of 150 entries are right for another", good);
    for (int i = 150; i < 200; i++) put_entry(c, i % 3 ? k : other, i);
    dpo_cache_close(k);
    dpo_cache_close(other);
    k = dpo_cache_open(c, CACHE);
    for (int i = good = 0; i < 200; i++) good += get_entry(c, k, i) == 1;
    CHECK(good == 200 && dpo_cache_count(k) == 200, "%d of 200 entries of two writers, %d keys", good, (int)dpo_cache_count(k));
    v[0] = 7;                             /* the last of a key holds, now and after opening again */
    CHECK(dpo_cache_put_floats(k, &key, v, 1) && dpo_cache_get_floats(k, &key, v + 1, 1) && v[1] == 7, "put again");
    CHECK(!dpo_cache_get_floats(k, &key, v, 2) && !dpo_cache_get(k, &key, x, 1), "another count is not there");
    key = key_of(0);
    CHECK(!dpo_cache_get(k, &key, x, 3) && !dpo_cache_get_floats(k, &key, v, 1) && get_entry(c, k, 0) == 1, "another number of tensors");
    dpo_cache_close(k);
    k = dpo_cache_open(c, CACHE);
    key = key_of(1);
    CHECK(dpo_cache_get_floats(k, &key, v + 2, 1) && v[2] == 7 && dpo_cache_count(k) == 200, "the last of a key holds");
    x[0] = dpo_tensor_new(c, DPO_I32, 1, shape);
    CHECK(!dpo_cache_put(k, &key, x, 1) && strstr(why(c), "F32, F16 and BF16"), "%s", why(c));
    dpo_clear_error(c);
    dpo_cache_close(k);
    put(FOLDER "/file", "");
    CHECK(!dpo_cache_open(c, FOLDER "/file/cache") && dpo_error(c), "a folder that cannot be");
    dpo_clear_error(c);
}

/* One file of eight entries, damaged in every place: what is found is right, and the rest can be put again. */
static void test_damage(dpo_ctx *c)
{
    static uint8_t bytes[16384];
    size_t     n;
    int        wrong = 0, lost = 0, shorter = 0, again = 0;
    dpo_cache *k;
    empty(c, CACHE);
    k = dpo_cache_open(c, CACHE);
    for (int i = 0; i < 8; i++) put_entry(c, k, i);
    dpo_cache_close(k);
    n = get_bytes(CACHE "/000001.dpocache", bytes, sizeof bytes);
    CHECK(n > 1000 && n < sizeof bytes && n % 64 == 0, "%d bytes", (int)n);
    for (size_t cut = 0; cut < n; cut += 7) {             /* a kill while it was written */
        int found[2] = { 0, 0 }, before = 1;
        empty(c, CACHE);
        put_bytes(CACHE "/000001.dpocache", bytes, cut);
        k = dpo_cache_open(c, CACHE);
        for (int i = 0; i < 8; i++) {
            int got = get_entry(c, k, i);
            wrong += got < 0 || (got && !before);         /* entries stand in their order: none after the first that is lost */
            before = before && got;
            found[0] += got == 1;
        }
        shorter += found[0];
        if (!k || dpo_error(c)) { CHECK(0, "cut at %d: %s", (int)cut, why(c)); dpo_clear_error(c); continue; }
        if (cut % 5) { dpo_cache_close(k); continue; }
        for (int i = 0; i < 8; i++) if (get_entry(c, k, i) != 1) put_entry(c, k, i);
        dpo_cache_close(k);
        k = dpo_cache_open(c, CACHE);
        for (int i = 0; i < 8; i++) again += get_entry(c, k, i) != 1;
        dpo_cache_close(k);
    }
    CHECK(!wrong && !again && shorter > 500, "cut: %d wrong entries, %d not mended, %d found", wrong, again, shorter);
    for (size_t at = 0; at < n; at += 3) {                /* a bit that turned */
        int missing = 0;
        empty(c, CACHE);
        bytes[at] ^= (uint8_t)(1u << at % 8);
        put_bytes(CACHE "/000001.dpocache", bytes, n);
        bytes[at] ^= (uint8_t)(1u << at % 8);
        k = dpo_cache_open(c, CACHE);
        for (int i = 0; i < 8; i++) {
            int got = get_entry(c, k, i);
            wrong += got < 0;
            missing += got == 0;
        }
        lost += missing;
        if (missing > 1 || dpo_error(c)) { CHECK(0, "bit at %d: %d entries lost, %s", (int)at, missing, why(c)); dpo_clear_error(c); }
        dpo_cache_close(k);
    }
    CHECK(!wrong && lost > 100, "turned bits: %d wrong entries, %d lost", wrong, lost);
}

#if defined(DPOI_FILES_POSIX)
/* A child writes entries as fast as it can and is killed; what it leaves is right. */
static void test_kill(dpo_ctx *c)
{
    uint64_t rng = 11;
    int      most = 0, wrong = 0, total = 0;
    empty(c, CACHE);
    for (int round = 0; round < 12; round++) {
        struct timespec nap;
        dpo_cache *k;
        pid_t      child = fork();
        if (child < 0) { SKIP("no fork"); return; }
        if (!child) {
            dpo_ctx *mine = open_logging(NULL);
            k = dpo_cache_open(mine, CACHE);
            for (int i = 0; ; i = (i + 1) % 5000) if (get_entry(mine, k, i) != 1 && !put_entry(mine, k, i)) _exit(1);
        }
        nap.tv_sec = 0;
        nap.tv_nsec = 5000000 + (long)(test_random(&rng) % 60000000);
        nanosleep(&nap, NULL);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        k = dpo_cache_open(c, CACHE);
        for (int i = total = 0; i < 5000; i++) {
            int got = get_entry(c, k, i);
            wrong += got < 0;
            total += got == 1;
        }
        wrong += total < most || dpo_error(c) != NULL;    /* what was there once stays */
        most = total;
        dpo_cache_close(k);
    }
    CHECK(!wrong && most > 20, "killed: %d wrong, %d entries in the end, %s", wrong, most, why(c));
}

/* A file that may not grow: the cache stops keeping, says so once, and nothing fails. */
static void test_full(dpo_ctx *c, lines *log)
{
    struct rlimit was, small;
    dpo_cache *k;
    int        good = 0, found = 0;
    empty(c, CACHE);
    if (getrlimit(RLIMIT_FSIZE, &was)) { SKIP("no RLIMIT_FSIZE"); return; }
    small = was;
    small.rlim_cur = 3000;
    signal(SIGXFSZ, SIG_IGN);
    forget(log);
    k = dpo_cache_open(c, CACHE);
    setrlimit(RLIMIT_FSIZE, &small);
    for (int i = 0; i < 60; i++) good += put_entry(c, k, i);
    setrlimit(RLIMIT_FSIZE, &was);
    for (int i = 0; i < 60; i++) { int got = get_entry(c, k, i); found += got == 1; good += got < 0 ? 1000 : 0; }
    CHECK(good > 5 && good < 60 && found == good && !dpo_error(c), "%d kept, %d found, %s", good, found, why(c));
    CHECK(strstr(log->text, "cannot be written any more (larger than a file may be here)") && strlen(log->text) < 200, "%s", log->text);
    dpo_cache_close(k);
    k = dpo_cache_open(c, CACHE);
    for (int i = found = 0; i < 60; i++) found += get_entry(c, k, i) == 1;
    CHECK(found == good && put_entry(c, k, 59) && get_entry(c, k, 59) == 1, "%d found by the next run", found);
    dpo_cache_close(k);
}
#endif

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

/* Everything once.  The number of what was done, as a sign that nothing went missing without an error. */
static int everything(allocator *a, int *status)
{
    static const char *const names[] = { "good.jsonl", "test.json", "good.csv", "pairs", "kohya", "bad.csv" };
    dpo_desc         d;
    dpo_ctx         *c;
    dpo_pairs       *p = NULL;
    dpo_pairs_counts n;
    dpo_cache       *k;
    dpo_key          key;
    dpo_window       v = window(5, 4, 0.5f, 0, 1);
    uint8_t          rgb[5*4*3];
    int              done = 0, w, h;
    memset(&d, 0, sizeof d);
    d.alloc = counted;
    d.user = a;
    d.threads = 1;
    *status = DPO_OUT_OF_MEMORY;
    if (!(c = dpo_open(&d))) return 0;
    for (int i = 0; i < 6; i++) {
        char path[200];
        snprintf(path, sizeof path, FOLDER "/%s", names[i]);
        p = dpo_pairs_load_good(c, path);
        done += (int)dpo_pairs_count(p);
    }
    p = dpo_pairs_load(c, FOLDER "/loader.jsonl");
    if (has_stb) {
        dpo_loader *l = dpo_loader_new(p, 2, 0);
        done += dpo_pairs_view(p, 0, 0, &v, rgb) && dpo_pairs_bucket(p, 0, 8, 4, &w, &h);
        if (dpo_loader_ask(l, 1, 0, 1, &v)) done += dpo_loader_take(l, 1) != NULL;
        done += dpo_loader_new(p, 2, 1) != NULL;
        done += dpo_pairs_survey(p, 1, &n);
    }
    done += dpo_pairs_key(p, 0, 0, &key);
    k = dpo_cache_open(c, CACHE);
    for (int i = 0; i < 4; i++) { done += put_entry(c, k, i); done += get_entry(c, k, i); }
    *status = dpo_status(c);
    dpo_close(c);
    return done;
}

static void test_allocations(dpo_ctx *c)
{
    allocator a;
    long      total;
    int       want_done, status, bad = 0;
    memset(&a, 0, sizeof a);
    empty(c, CACHE);
    want_done = everything(&a, &status);
    total = a.calls;
    CHECK(status == DPO_OK && !a.live && want_done > (has_stb ? 25 : 20), "%d done, %ld bytes left", want_done, (long)a.live);
    for (long at = 1; at <= total; at++) {
        int done;
        memset(&a, 0, sizeof a);
        a.fail_at = at;
        if (at % 50 == 0) empty(c, CACHE);
        done = everything(&a, &status);
        /* A failure that was got over must leave the whole result. */
        if (a.live || (status != DPO_OUT_OF_MEMORY && (status != DPO_OK || done != want_done)))
            if (bad++ < 5) printf("allocation %ld of %ld: status %d, %d done, %ld bytes left\n", at, total, status, done, (long)a.live);
    }
    CHECK(!bad && total > 300, "%d of %ld failing allocations ended badly", bad, total);
}

int main(void)
{
    static lines log;
    dpo_ctx *c = open_logging(&log);
    make_pictures(c);
    test_json(c);
    test_csv(c);
    test_folders(c);
    test_bad(c, &log);
    test_refused(c);
    test_bad_folder(c, &log);
    test_survey(c, &log);
    test_views(c);
    test_pair_views(c);
    test_buckets(c);
    test_loader(c, 0);
    test_loader(c, 1);
    test_keys(c);
    test_cache(c);
    test_damage(c);
#if defined(DPOI_FILES_POSIX)
    test_kill(c);
    test_full(c, &log);
#else
    SKIP("kills and full disks need POSIX");
#endif
    test_allocations(c);
    CHECK(!dpo_error(c), "%s", why(c));
    dpo_close(c);
    return test_report();
}
