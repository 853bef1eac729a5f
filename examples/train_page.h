/* train_page.h - the part of train.c that shows what happened: a TensorBoard file as it goes, report.html at the end.

   Both are made of the lines of metrics.jsonl, which is the one record of a run: a resumed run writes both anew. */
#include "page.h"

/* The number of a key in one line of metrics.jsonl, whose keys are ours: no general JSON. */
static int line_number(const char *line, const char *key, double *out)
{
    char        name[64];
    const char *p;
    char       *end;
    snprintf(name, sizeof name, "\"%s\": ", key);
    if (!(p = strstr(line, name))) return 0;
    *out = strtod(p + strlen(name), &end);
    return end != p + strlen(name);
}

/* ---- TensorBoard ------------------------------------------------------------------------------------------------ */

/* CRC-32C of Castagnoli, bit by bit: a line is 1 KB. */
static uint32_t crc32c(const uint8_t *p, size_t n)
{
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
    }
    return ~crc;
}

/* As TFRecord has it: rotated and shifted, so that a checksum of checksums is no checksum. */
static uint32_t masked(const uint8_t *p, size_t n)
{
    uint32_t crc = crc32c(p, n);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

/* A protobuf message in the making. */
typedef struct { uint8_t byte[4096]; size_t n; } message;

static void put_bytes(message *m, const void *p, size_t n)
{
    if (m->n + n > sizeof m->byte) return;
    memcpy(m->byte + m->n, p, n);
    m->n += n;
}

static void put_varint(message *m, uint64_t x)
{
    uint8_t byte;
    for (; x > 127; x >>= 7) { byte = (uint8_t)(x | 128); put_bytes(m, &byte, 1); }
    byte = (uint8_t)x;
    put_bytes(m, &byte, 1);
}

/* Little-endian whatever the machine. */
static void put_fixed(message *m, uint64_t x, int bytes)
{
    for (int k = 0; k < bytes; k++) { uint8_t byte = (uint8_t)(x >> 8*k); put_bytes(m, &byte, 1); }
}

static void put_field(message *m, int field, int wire) { put_varint(m, (uint64_t)(field << 3 | wire)); }

static void put_text(message *m, int field, const void *p, size_t n)
{
    put_field(m, field, 2);
    put_varint(m, n);
    put_bytes(m, p, n);
}

/* Event: 1 wall_time, 2 step, 3 file_version, 5 summary { 1 value { 1 tag, 2 simple_value } }. */
static void begin_event(message *m, double seconds, int64_t step)
{
    uint64_t bits;
    memcpy(&bits, &seconds, 8);
    m->n = 0;
    put_field(m, 1, 1);
    put_fixed(m, bits, 8);
    put_field(m, 2, 0);
    put_varint(m, (uint64_t)step);
}

static void put_scalar(message *summary, const char *tag, double x)
{
    message  value;
    float    f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    value.n = 0;
    put_text(&value, 1, tag, strlen(tag));
    put_field(&value, 2, 5);
    put_fixed(&value, bits, 4);
    put_text(summary, 1, value.byte, value.n);
}

/* TFRecord: length, its checksum, bytes, their checksum. */
static int send_event(run *r, const message *m)
{
    message head, tail;
    head.n = tail.n = 0;
    put_fixed(&head, m->n, 8);
    put_fixed(&head, masked(head.byte, 8), 4);
    put_fixed(&tail, masked(m->byte, m->n), 4);
    errno = 0;
    if (fwrite(head.byte, 1, head.n, r->events) == head.n && fwrite(m->byte, 1, m->n, r->events) == m->n &&
        fwrite(tail.byte, 1, tail.n, r->events) == tail.n && !fflush(r->events)) return 1;
    return broken("the TensorBoard file");
}

static const char *const scalars[] = {
    "loss", "implicit_acc", "policy_w", "policy_l", "reference_w", "reference_l", "margin", "grad_norm", "lr",
    "skipped", "bytes", "seconds", "held_accuracy", "held_0", "held_1", "held_2", "held_3", "held_policy_w",
    "held_policy_l", "held_reference_w", "held_reference_l"
};

/* One line of metrics.jsonl as an event. */
static int put_event(run *r, const char *line)
{
    message m, summary;
    double  step = 0, seconds = 0, x;
    line_number(line, "step", &step);
    line_number(line, "time", &seconds);
    begin_event(&m, seconds, (int64_t)step);
    summary.n = 0;
    for (size_t k = 0; k < sizeof scalars / sizeof *scalars; k++)
        if (line_number(line, scalars[k], &x)) put_scalar(&summary, scalars[k], x);
    put_text(&m, 5, summary.byte, summary.n);
    return send_event(r, &m);
}

static void replay_event(run *r, const char *line) { put_event(r, line); }

/* One file a run, under one name: a resumed run's lines replace it. */
static int open_events(run *r)
{
    char    path[PATHS];
    message m;
    path_of(r, path, "events.out.tfevents.0.diffdpo");
    if (!(r->events = fopen(path, "wb"))) return broken(path);
    begin_event(&m, 0, 0);
    put_text(&m, 3, "brain.Event:2", 13);
    return send_event(r, &m);
}

/* ---- report.html ------------------------------------------------------------------------------------------------ */

/* One key of every line of metrics.jsonl that has it: memory of the context. */
typedef struct { float *y; int n; } series;

static series read_series(run *r, const char *key)
{
    char   path[PATHS], line[4096];
    series s = { NULL, 0 };
    double x;
    FILE  *f;
    int    room = r->s.steps + 2;
    path_of(r, path, "metrics.jsonl");
    if (!(f = fopen(path, "rb"))) return s;
    s.y = (float *)dpo_scope_alloc(r->c, (size_t)room * sizeof *s.y);
    while (s.y && s.n < room && fgets(line, sizeof line, f))
        if (line_number(line, key, &x)) s.y[s.n++] = (float)x;
    fclose(f);
    return s;
}

/* A curve between bounds that hold all of it.  A long run is thinned to means of equal stretches. */
static void put_series(run *r, FILE *f, const char *title, const char *key, double low, double top, double even)
{
    enum { POINTS = 600 };
    static float y[POINTS];
    series       s = read_series(r, key);
    curve        c;
    int          n = s.n < POINTS ? s.n : POINTS;
    if (s.n < 2) return;
    c.low = low;
    c.top = top;
    for (int i = 0; i < n; i++) {
        int    from = (int)((int64_t)i * s.n / n), to = (int)((int64_t)(i + 1) * s.n / n);
        double sum = 0;
        for (int k = from; k < to; k++) sum += s.y[k];
        y[i] = (float)(sum / (to - from));
        if (low == top) { if (!i || y[i] < c.low) c.low = y[i];  if (!i || y[i] > c.top) c.top = y[i]; }
        else { if (y[i] < c.low) c.low = y[i];  if (y[i] > c.top) c.top = y[i]; }
    }
    if (c.top <= c.low) { c.low -= 0.5*fabs(c.low);  c.top += c.top == 0 ? 1 : 0.5*fabs(c.top); }  /* one value */
    c.y = y;
    c.n = n;
    put_curve(f, title, &c, even);
}

/* The PNG of a sample as it lies in OUT/samples. */
static void put_sample(run *r, FILE *f, int64_t step, int prompt, int i)
{
    char     name[64], path[PATHS];
    uint8_t *png = NULL;
    FILE    *in;
    long     n = 0;
    snprintf(name, sizeof name, "samples/step-%06lld-%d-%d.png", (long long)step, prompt, i);
    path_of(r, path, name);
    if (!(in = fopen(path, "rb"))) return;
    if (!fseek(in, 0, SEEK_END)) n = ftell(in);
    if (n > 0 && n < 1 << 26) png = (uint8_t *)dpo_scope_alloc(r->c, (size_t)n);
    rewind(in);
    if (png && fread(png, 1, (size_t)n, in) == (size_t)n) {
        fprintf(f, "<figure><img width=\"%d\" height=\"%d\" alt=\"", r->width, r->height);
        put_html(f, r->s.prompts[prompt]);
        fputs("\" style=\"width:100%;height:auto;border-radius:6px\" src=\"data:image/png;base64,", f);
        put_base64(f, png, (size_t)n);
        fprintf(f, "\"><figcaption>step %lld: ", (long long)step);
        put_html(f, r->s.prompts[prompt]);
        fputs("</figcaption></figure>\n", f);
    }
    fclose(in);
}

/* First and last pictures of every prompt. */
static void put_samples(run *r, FILE *f)
{
    if (!r->s.prompt_count) return;
    fputs("<h2>Samples</h2>\n<p>Before the first step and after the last, from the same noise.</p>\n"
          "<div class=\"cards\">\n", f);
    for (int k = 0; k < r->s.prompt_count; k++)
        for (int i = 0; i < r->s.images; i++) {
            put_sample(r, f, 0, k, i);
            put_sample(r, f, r->stop_at ? r->stop_at : r->s.steps, k, i);
        }
    fputs("</div>\n", f);
}

/* What differs from the defaults. */
static void put_options(run *r, FILE *f)
{
    settings d = defaults();
    char     mine[1024], theirs[1024];
    fputs("<h2>Settings</h2>\n<p>All that differs from the program's defaults.</p>\n<table>\n", f);
    for (int i = 0; i < OPTIONS; i++) {
        option_text(&r->s, &options[i], mine, sizeof mine);
        option_text(&d, &options[i], theirs, sizeof theirs);
        if (mine[0] && strcmp(mine, theirs)) put_row(f, options[i].name, "%s", mine);
    }
    fputs("</table>\n", f);
}

static void put_report(run *r, FILE *f, double seconds)
{
    double even = r->s.objective == DPO_DPO && r->s.kind == DPO_PREF_SIGMOID ? log(2.0) : 0;
    fputs("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
          "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
          "<title>Training on preferences</title>\n", f);
    fprintf(f, "<style>\n%s</style></head>\n<body>\n<h1>Training on preferences</h1>\n<p>%lld pairs, %d steps, %.0f s.",
            STYLE, (long long)r->trained, r->s.steps, seconds);
    if (r->best >= 0) fprintf(f, " The best held-out accuracy is <b>%.3f</b>; its checkpoint is in best/.", r->best);
    fputs("</p>\n<h2>Curves</h2>\n<p>For Diffusion-DPO the loss starts at ln&nbsp;2&nbsp;=&nbsp;0.69 and stays near "
          "it for long. Watch the share of pairs that are ranked right, and that the error on chosen pictures does not "
          "rise.</p>\n"
          "<div class=\"curves\">", f);
    put_series(r, f, "loss", "loss", even > 0 ? 0.5 : 0, even > 0 ? 1 : 0, even);
    put_series(r, f, "implicit accuracy", "implicit_acc", 0, 1, 0.5);
    put_series(r, f, "held-out accuracy", "held_accuracy", 0, 1, 0.5);
    put_series(r, f, "error on chosen pictures", "policy_w", 0, 0, 0);
    put_series(r, f, "error on rejected pictures", "policy_l", 0, 0, 0);
    put_series(r, f, "gradient norm", "grad_norm", 0, 0, 0);
    put_series(r, f, "learning rate", "lr", 0, 0, 0);
    fputs("</div>\n", f);
    put_samples(r, f);
    put_options(r, f);
    fputs("<p class=\"dim\">Made by examples/train.c of diffdpo.h.</p>\n</body></html>\n", f);
}

/* Whole under its name, or not there. */
static int write_page(run *r, double seconds)
{
    char  path[PATHS], aside[PATHS];
    FILE *f;
    int   bad;
    path_of(r, path, "report.html");
    path_of(r, aside, "report.html.tmp");
    if (!(f = fopen(aside, "wb"))) return broken(path);
    put_report(r, f, seconds);
    bad = ferror(f);
    if (fclose(f) || bad || rename(aside, path)) { remove(aside); return broken(path); }
    printf("%s\n", path);
    return 1;
}
