/* test_events.c - the TensorBoard file of examples/train: checksums and what its events say, read back.

   build   cc -O1 tests/test_events.c -o build/test_events -lm -lpthread
   run     build/test_events            from the project's folder */
#define main train_main
#include "../examples/train.c"
#undef main
#include "dpo_test.h"

#define FOLDER "build/test_events.tmp"

/* CRC-32C by another way than the program's: a table of half bytes. */
static uint32_t crc_again(const uint8_t *p, size_t n)
{
    uint32_t table[16], c = 0xffffffffu;
    for (uint32_t i = 0; i < 16; i++) {
        table[i] = i;
        for (int k = 0; k < 4; k++) table[i] = table[i] & 1 ? table[i] >> 1 ^ 0x82f63b78u : table[i] >> 1;
    }
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        c = c >> 4 ^ table[c & 15];
        c = c >> 4 ^ table[c & 15];
    }
    return ~c;
}

static uint64_t little(const uint8_t *p, int bytes)
{
    uint64_t x = 0;
    for (int k = 0; k < bytes; k++) x |= (uint64_t)p[k] << 8*k;
    return x;
}

static uint32_t masked_again(const uint8_t *p, size_t n)
{
    uint32_t c = crc_again(p, n);
    return (c >> 15 | c << 17) + 0xa282ead8u;
}

static uint64_t take_varint(const uint8_t **p)
{
    uint64_t x = 0;
    int      shift = 0;
    do x |= (uint64_t)(**p & 127) << shift, shift += 7; while (*(*p)++ > 127 && shift < 64);
    return x;
}

/* The values of one record's summary by tag, until there is none; returns how many. */
static int summary_values(const uint8_t *p, const uint8_t *end, char tag[][32], float *value, int64_t *step)
{
    int n = 0;
    *step = 0;
    while (p < end) {
        uint64_t key = take_varint(&p), length;
        if (key == (1 << 3 | 1)) p += 8;
        else if (key == (2 << 3 | 0)) *step = (int64_t)take_varint(&p);
        else if (key == (3 << 3 | 2) || key == (5 << 3 | 2)) {
            length = take_varint(&p);
            if (key == (3 << 3 | 2)) { p += length; continue; }
            end = p + length;             /* the summary is the last field: go on inside */
        }
        else if (key == (1 << 3 | 2)) {   /* a value { tag, simple_value } */
            uint32_t bits;
            take_varint(&p);
            p++;
            length = take_varint(&p);
            if (n == 32 || length > 31) return -1;
            memcpy(tag[n], p, (size_t)length);
            tag[n][length] = 0;
            p += length + 1;
            bits = (uint32_t)little(p, 4);
            memcpy(&value[n++], &bits, 4);
            p += 4;
        }
        else return -1;
    }
    return n;
}

static void test_checksums(void)
{
    static const uint8_t zeros[32] = { 0 };
    uint8_t              count[32];
    for (int i = 0; i < 32; i++) count[i] = (uint8_t)i;
    /* RFC 3720, appendix B.4, and the usual check value */
    CHECK(crc32c((const uint8_t *)"123456789", 9) == 0xe3069283u, "%08x", (unsigned)crc32c((const uint8_t *)"123456789", 9));
    CHECK(crc32c(zeros, 32) == 0x8a9136aau && crc32c(count, 32) == 0x46dd794eu, "RFC 3720's: %08x %08x", (unsigned)crc32c(zeros, 32),
          (unsigned)crc32c(count, 32));
    CHECK(crc_again(count, 32) == 0x46dd794eu && masked(count, 32) == masked_again(count, 32), "the test's own");
}

static void test_file(void)
{
    static run r;
    static uint8_t data[1 << 16];
    char    path[PATHS], tag[32][32];
    float   value[32];
    int64_t step = -1;
    size_t  size = 0, at = 0;
    int     events = 0;
    FILE   *f;
    r.s.out = FOLDER;
    r.c = dpo_open(NULL);
    CHECK(dpo_make_folder(r.c, FOLDER) && open_events(&r), "no file");
    path_of(&r, path, "metrics.jsonl");
    CHECK((r.metrics = fopen(path, "wb")) != NULL, "no metrics");
    for (int k = 1; k <= 300; k += 299)
        CHECK(put_metrics(&r, "{\"step\": %d, \"loss\": 0.25, \"lr\": 1e-05, \"time\": 12.5}\n", k), "a line");
    fclose(r.metrics);
    fclose(r.events);
    path_of(&r, path, "events.out.tfevents.0.diffdpo");
    if ((f = fopen(path, "rb")) != NULL) { size = fread(data, 1, sizeof data, f); fclose(f); }
    while (at + 12 <= size) {
        uint64_t n = little(data + at, 8);
        CHECK(little(data + at + 8, 4) == masked_again(data + at, 8), "event %d: checksum of its length", events);
        if (n > size - at - 16) break;
        CHECK(little(data + at + 12 + n, 4) == masked_again(data + at + 12, (size_t)n), "event %d: checksum", events);
        if (!events++) CHECK(summary_values(data + at + 12, data + at + 12 + n, tag, value, &step) == 0 && step == 0, "the first event");
        else {
            int count = summary_values(data + at + 12, data + at + 12 + n, tag, value, &step);
            CHECK(count == 2 && step == (events == 2 ? 1 : 300) && !strcmp(tag[0], "loss") && value[0] == 0.25f && !strcmp(tag[1], "lr") &&
                  value[1] == 1e-05f, "event %d: %d values, step %d", events, count, (int)step);
        }
        at += 16 + n;
    }
    CHECK(events == 3 && at == size, "%d events in %zu bytes, %zu were read", events, size, at);
    dpo_close(r.c);
}

int main(void)
{
    test_checksums();
    test_file();
    return test_report();
}
