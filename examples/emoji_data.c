/* emoji_data.c - a small data set for text-to-image models: Debian's emoji, each with its name.

   need    apt-get install fonts-noto-color-emoji unicode-data libstb-dev
   build   cc -O2 examples/emoji_data.c -o emoji_data -lm
   run     ./emoji_data OUT [--size 32] [--font F] [--names F]
   result  OUT/0000.png ...     SIZE x SIZE, RGB, on white
           OUT/captions.jsonl   one object a line, written last, so that it lists only what is there:
                                {"image":"0000.png","caption":"grinning face",
                                 "group":"Smileys & Emotion","split":"train"}

   Taken are the fully qualified emoji of a single code point, flags left out.  Variants by skin
   tone, sex or hair are sequences of several code points: they would be hundreds of near copies.
   A tenth of the captions is "held" out of training; a hash of the caption decides which, so that
   neither the order nor a newer list moves a caption from one side to the other.

   A font is a foreign file: every read of it goes through byte_at(), which knows where it ends. */
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_MAX_DIMENSIONS 1024     /* a strike is 136 x 128; a hostile one may claim anything */
#include <stb/stb_image.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>

#define FONT  "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
#define NAMES "/usr/share/unicode/emoji/emoji-test.txt"

/* The first thing that went wrong, in words; empty while all is well.  Later ones are its echo. */
typedef struct { char text[512]; } trouble;

/* Returns 0, so that a helper can say: return fail(t, ...). */
static int fail(trouble *t, const char *format, ...)
{
    va_list args;
    if (t->text[0]) return 0;
    va_start(args, format);
    vsnprintf(t->text, sizeof t->text, format, args);
    va_end(args);
    return 0;
}

/* ---- The font: big-endian tables, found by name (OpenType 1.9: cmap, CBLC, CBDT) ------------- */

typedef struct {
    unsigned char *data;
    size_t         size;
    int            damaged;             /* something was looked for behind the end        */
    uint64_t       codes;               /* cmap's subtable from code points to glyphs     */
    uint64_t       cblc, cbdt;          /* the index of the pictures, and the pictures    */
    uint64_t       strike;              /* in cblc, the record of the largest pictures    */
} font;

typedef struct { uint64_t at, size; } span;      /* a piece of the file; size 0: nothing */

/* Offsets are 64 bits wide: sums of a few 32-bit fields cannot wrap round. */
static uint32_t byte_at(font *f, uint64_t at)
{
    if (at < f->size) return f->data[at];
    f->damaged = 1;
    return 0;
}

/* A read behind the end gives 0 and is remembered, so callers ask about damage once, at the end;
   but a loop whose count came from the file asks each time round, or it might count to 2^32. */
static uint32_t u16(font *f, uint64_t at) { return byte_at(f, at) << 8 | byte_at(f, at + 1); }
static uint32_t u32(font *f, uint64_t at) { return u16(f, at) << 16 | u16(f, at + 2); }

/* Where the table of this four-letter name starts, or 0.  Records of 16 bytes follow byte 12:
   name, checksum, offset, length. */
static uint64_t find_table(font *f, const char *name)
{
    uint32_t tables = u16(f, 4);
    uint32_t wanted = (uint32_t)name[0] << 24 | (uint32_t)name[1] << 16 | (uint32_t)name[2] << 8
                    | (uint32_t)name[3];
    for (uint64_t r = 12; tables-- > 0 && !f->damaged; r += 16)
        if (u32(f, r) == wanted) return u32(f, r + 8);
    return 0;
}

/* The subtable to look code points up in: format 12 knows them all, format 4 those of 16 bits. */
static uint64_t find_codes(font *f, uint64_t cmap)
{
    uint32_t tables = u16(f, cmap + 2);
    uint64_t found = 0;
    for (uint64_t r = cmap + 4; tables-- > 0 && !f->damaged; r += 8) {
        uint64_t table = cmap + u32(f, r + 4);
        uint32_t format = u16(f, table);
        if (format == 12) return table;
        if (format == 4)  found = table;
    }
    return found;
}

/* Of several strikes the one with the most pixels per em: there is more to average from.
   Records of 48 bytes; those read here: the list of ranges at 0, their count at 8, the em at 45. */
static uint64_t largest_strike(font *f)
{
    uint32_t strikes = u32(f, f->cblc + 4), most = 0;
    uint64_t found = 0;
    for (uint64_t r = f->cblc + 8; strikes-- > 0 && !f->damaged; r += 48) {
        uint32_t ppem = byte_at(f, r + 45);
        if (ppem > most) { most = ppem; found = r; }
    }
    return found;
}

/* cmap format 12: groups {first, last, glyph of the first}, 32 bits each.  A few hundred in order:
   walking them takes less time than decoding one picture, so there is no binary search. */
static uint32_t glyph_by_groups(font *f, uint64_t table, uint32_t code)
{
    uint32_t groups = u32(f, table + 12);
    for (uint64_t g = table + 16; groups-- > 0 && !f->damaged; g += 12) {
        uint32_t first = u32(f, g);
        if (code >= first && code <= u32(f, g + 4)) return u32(f, g + 8) + (code - first);
    }
    return 0;
}

/* cmap format 4: four parallel arrays of 16 bits, one entry a segment; a segment either shifts
   its codes by delta or, if range is not 0, points that many bytes ahead to a list of glyphs. */
static uint32_t glyph_by_segments(font *f, uint64_t table, uint32_t code)
{
    uint64_t bytes = u16(f, table + 6), ends = table + 14, starts = ends + bytes + 2;
    for (uint64_t s = 0; s < bytes && !f->damaged; s += 2) {
        if (code > u16(f, ends + s)) continue;
        uint32_t first = u16(f, starts + s), delta = u16(f, starts + bytes + s);
        uint64_t here = starts + 2*bytes + s, range = u16(f, here);
        if (code < first) return 0;
        if (range == 0)   return (code + delta) & 0xFFFF;
        uint32_t glyph = u16(f, here + range + 2*(uint64_t)(code - first));
        return glyph ? (glyph + delta) & 0xFFFF : 0;
    }
    return 0;
}

/* The glyph of a code point, 0 if the font has none. */
static uint32_t find_glyph(font *f, uint32_t code)
{
    return u16(f, f->codes) == 12 ? glyph_by_groups(f, f->codes, code) : glyph_by_segments(f, f->codes, code);
}

/* Index formats 4 and 5 list their glyphs one by one: at which place is this one?  -1: nowhere.
   Glyphs have 16 bits; a longer list only wants to keep us busy. */
static int64_t place_in_list(font *f, uint64_t list, uint32_t count, int stride, uint32_t glyph)
{
    if (count > 0x10000) f->damaged = 1;
    for (int64_t i = 0; i < (int64_t)count && !f->damaged; i++)
        if (u16(f, list + (uint64_t)(i*stride)) == glyph) return i;
    return -1;
}

/* The piece between two offsets from a base; they come from the file, and may be the wrong way round. */
static span between(uint64_t base, uint32_t from, uint32_t to)
{
    span s = { base + from, to > from ? to - from : 0 };
    return s;
}

/* Where an index subtable says that the picture of its i-th glyph lies.  After a head of 8 bytes:
     1  offsets of 32 bits, and one more for the end     3  the same in 16 bits
     4  a count, then pairs {glyph, offset of 16 bits}, and one more for the end
     2  one size for all, 8 bytes of metrics             5  as 2, then a count and a list of glyphs */
static span find_picture_in(font *f, uint64_t sub, uint32_t i, uint32_t glyph)
{
    uint64_t base = f->cbdt + u32(f, sub + 4), at;
    uint32_t format = u16(f, sub), size = u32(f, sub + 8);
    int64_t  place = i;
    if (format == 1) { at = sub + 8 + 4*(uint64_t)i;  return between(base, u32(f, at), u32(f, at + 4)); }
    if (format == 3) { at = sub + 8 + 2*(uint64_t)i;  return between(base, u16(f, at), u16(f, at + 2)); }
    if (format == 4) place = place_in_list(f, sub + 12, size, 4, glyph);
    if (format == 5) place = place_in_list(f, sub + 24, u32(f, sub + 20), 2, glyph);
    if (place < 0 || format < 1 || format > 5) return between(0, 0, 0);
    if (format == 4) { at = sub + 14 + 4*(uint64_t)place;  return between(base, u16(f, at), u16(f, at + 4)); }
    return between(base + (uint64_t)place*size, 0, size);
}

/* A picture record is a PNG behind its length and, by image format, 5, 8 or 0 bytes of metrics. */
static span skip_metrics(font *f, span record, uint32_t format)
{
    uint64_t head = (format == 17 ? 5 : format == 18 ? 8 : 0) + 4, png;
    if (format < 17 || format > 19 || record.size <= head) return between(0, 0, 0);
    png = u32(f, record.at + head - 4);
    if (png > record.size - head || record.at + head + png > f->size) f->damaged = 1;
    return between(record.at + head, 0, f->damaged ? 0 : (uint32_t)png);
}

/* The PNG of a glyph.  A strike lists ranges of glyphs {first, last, offset of the subtable},
   which do not overlap. */
static span find_png(font *f, uint32_t glyph)
{
    uint64_t list = f->cblc + u32(f, f->strike);
    uint32_t ranges = u32(f, f->strike + 8);
    if (ranges > 0x10000) f->damaged = 1;       /* more than there can be glyphs */
    for (uint64_t r = list; ranges-- > 0 && !f->damaged; r += 8) {
        uint32_t first = u16(f, r);
        uint64_t sub = list + u32(f, r + 4);
        if (glyph < first || glyph > u16(f, r + 2)) continue;
        return skip_metrics(f, find_picture_in(f, sub, glyph - first, glyph), u16(f, sub + 2));
    }
    return between(0, 0, 0);
}

/* ---- Files ----------------------------------------------------------------------------------- */

/* A missing file is most often a missing package: say which. */
static FILE *open_input(const char *path, const char *package, trouble *t)
{
    FILE *in = fopen(path, "rb");
    if (!in) fail(t, "%s: %s (Debian package %s has it)", path, strerror(errno), package);
    return in;
}

/* The whole file in memory of its own. */
static int font_read(font *f, const char *path, trouble *t)
{
    FILE *in = open_input(path, "fonts-noto-color-emoji", t);
    long  size = -1;
    if (!in) return 0;
    if (!fseek(in, 0, SEEK_END)) size = ftell(in);
    rewind(in);
    if (size > 0) f->data = (unsigned char *)malloc((size_t)size);
    if (f->data)  f->size = fread(f->data, 1, (size_t)size, in);
    fclose(in);
    return f->size > 0 && f->size == (size_t)size ? 1 : fail(t, "%s: cannot be read", path);
}

/* Finds the tables, once; with all four places known, looking up a picture is only arithmetic. */
static int font_open(font *f, const char *path, trouble *t)
{
    if (!font_read(f, path, t)) return 0;
    f->codes = find_table(f, "cmap");
    f->cblc  = find_table(f, "CBLC");
    f->cbdt  = find_table(f, "CBDT");
    if (f->codes) f->codes = find_codes(f, f->codes);
    if (f->codes && f->cblc && f->cbdt) f->strike = largest_strike(f);
    if (f->damaged) return fail(t, "%s: not a whole font, it ends before its tables do", path);
    return f->strike ? 1 : fail(t, "%s: not a font with colour pictures (CBLC, CBDT)", path);
}

/* A file appears under its name only when it is complete: written aside, then renamed. */
typedef struct { char name[512], aside[520]; FILE *f; } output;

static int output_open(output *o, const char *folder, const char *file, trouble *t)
{
    int n = snprintf(o->name, sizeof o->name, "%s/%s", folder, file);
    o->f = NULL;
    if (n < 0 || (size_t)n >= sizeof o->name) return fail(t, "%s: this path is too long", folder);
    snprintf(o->aside, sizeof o->aside, "%s.part", o->name);
    o->f = fopen(o->aside, "wb");
    return o->f ? 1 : fail(t, "%s: %s", o->aside, strerror(errno));
}

/* Safe to call on one that never opened; after trouble the unfinished file goes. */
static int output_close(output *o, trouble *t)
{
    if (!o->f) return 0;
    int broken = ferror(o->f);
    if (fclose(o->f) || broken) fail(t, "%s: cannot be written (disk full?)", o->aside);
    else if (!t->text[0] && rename(o->aside, o->name)) fail(t, "%s: %s", o->name, strerror(errno));
    if (t->text[0]) remove(o->aside);
    return t->text[0] == 0;
}

/* stb_image_write hands over the finished PNG here. */
static void write_bytes(void *user, void *bytes, int n) { fwrite(bytes, 1, (size_t)n, (FILE *)user); }

static int write_png(const char *folder, const char *file, const unsigned char *rgb, int size, trouble *t)
{
    output o;
    if (!output_open(&o, folder, file, t)) return 0;
    if (!stbi_write_png_to_func(write_bytes, o.f, size, size, 3, rgb, 3*size)) fail(t, "out of memory");
    return output_close(&o, t);
}

/* ---- Pictures -------------------------------------------------------------------------------- */

typedef struct { const unsigned char *rgba; int w, h; } picture;

/* How much of pixel i, which covers [i, i+1], lies in [from, to]. */
static double overlap(double from, double to, int i)
{
    double lo = from > i ? from : i, hi = to < i + 1 ? to : i + 1;
    return hi > lo ? hi - lo : 0;
}

/* The mean colour of the rectangle [x0, x1] x [y0, y1], in pixels of p and fractions of them:
     paint = sum of area*alpha     rgb = (sum of area*alpha*colour + white*(area - paint)) / area
   so that what no paint covers is white, be it clear or beside the picture. */
static void mean_colour(const picture *p, double x0, double y0, double x1, double y1, unsigned char *rgb)
{
    double sum[3] = {0}, paint = 0, area = (x1 - x0) * (y1 - y0);
    for (int y = y0 > 0 ? (int)y0 : 0; y < y1 && y < p->h; y++)
        for (int x = x0 > 0 ? (int)x0 : 0; x < x1 && x < p->w; x++) {
            const unsigned char *px = p->rgba + 4*((size_t)y*(size_t)p->w + (size_t)x);
            double weight = overlap(x0, x1, x) * overlap(y0, y1, y) * px[3] / 255;
            for (int k = 0; k < 3; k++) sum[k] += weight * px[k];
            paint += weight;
        }
    for (int k = 0; k < 3; k++) rgb[k] = (unsigned char)((sum[k] + 255*(area - paint)) / area + 0.5);
}

/* Lays p in the middle of a white square, and shrinks that to size x size by averaging areas. */
static void shrink(const picture *p, int size, unsigned char *rgb)
{
    int    side = p->w > p->h ? p->w : p->h;
    double left = (side - p->w) / 2.0, top = (side - p->h) / 2.0, step = (double)side / size;
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x++, rgb += 3)
            mean_colour(p, x*step - left, y*step - top, (x+1)*step - left, (y+1)*step - top, rgb);
}

/* ---- Names: "1F600 ; fully-qualified # (emoji) E1.0 grinning face", under "# group: ..." ------ */

typedef struct { uint32_t code; char group[64], caption[128]; } emoji;

/* Copies a name as far as its line and the room go.  Only ASCII is lowered: in UTF-8 the bytes
   of all other letters are above it, and the list has no capitals among those. */
static void copy_name(char *to, size_t room, const char *from, int lower)
{
    size_t n = 0;
    for (; *from && *from != '\n' && *from != '\r' && n + 1 < room; from++)
        to[n++] = lower && (unsigned char)*from < 128 ? (char)tolower(*from) : *from;
    to[n] = 0;
}

/* One line of the list: 1 if it names an emoji to take.  A heading is remembered in e: it holds
   for the lines that follow. */
static int parse_line(const char *line, emoji *e)
{
    char *after;
    const char *version;
    if (!strncmp(line, "# group: ", 9)) copy_name(e->group, sizeof e->group, line + 9, 0);
    e->code = (uint32_t)strtoul(line, &after, 16);
    if (after == line || e->code == 0) return 0;
    if (!strncmp(after, " FE0F", 5)) after += 5;        /* "as a picture": no other emoji */
    after += strspn(after, " ");
    if (strncmp(after, "; fully-qualified", 17)) return 0;      /* or more code points follow */
    if (!strcmp(e->group, "Flags")) return 0;
    version = strstr(after, " E");
    if (!version || !(version = strchr(version + 1, ' '))) return 0;
    copy_name(e->caption, sizeof e->caption, version + 1, 1);
    return e->caption[0] != 0;
}

/* FNV-1a, 64 bits: start from the offset basis; for each byte xor it in, multiply by the prime. */
static uint64_t hash(const char *text)
{
    uint64_t h = 14695981039346656037u;
    while (*text) h = (h ^ (unsigned char)*text++) * 1099511628211u;
    return h;
}

/* One in ten, by chance but always the same ones. */
static int is_held_out(const char *caption) { return hash(caption) % 10 == 0; }

/* A JSON string: quotes and backslashes escaped, control characters dropped, UTF-8 as it is. */
static void write_quoted(FILE *out, const char *text)
{
    putc('"', out);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putc('\\', out);
        if ((unsigned char)*text >= 32) putc(*text, out);
    }
    putc('"', out);
}

/* The line of captions.jsonl; its keys are what examples/pretrain.c reads. */
static void write_caption(FILE *out, const char *file, const emoji *e)
{
    fprintf(out, "{\"image\":\"%s\",\"caption\":", file);
    write_quoted(out, e->caption);
    fputs(",\"group\":", out);
    write_quoted(out, e->group);
    fprintf(out, ",\"split\":\"%s\"}\n", is_held_out(e->caption) ? "held" : "train");
}

/* ---- The program ----------------------------------------------------------------------------- */

typedef struct {
    const char *folder, *font, *names;
    int size;
    int train, held, missing;       /* what became of the names so far */
} job;

/* The steps in one place: code point, glyph, PNG, RGBA, white square.
   The picture of a code point as size x size RGB: 1 done, 0 the font has none, or trouble. */
static int draw(font *f, uint32_t code, int size, unsigned char *rgb, trouble *t)
{
    uint32_t glyph = find_glyph(f, code);
    span     png = glyph ? find_png(f, glyph) : between(0, 0, 0);
    picture  p;
    unsigned char *pixels;
    if (f->damaged)    return fail(t, "font damaged: the picture of U+%04X lies outside", (unsigned)code);
    if (png.size == 0) return 0;
    pixels = stbi_load_from_memory(f->data + png.at, (int)png.size, &p.w, &p.h, NULL, 4);
    if (!pixels) return fail(t, "font damaged: the picture of U+%04X is no PNG", (unsigned)code);
    p.rgba = pixels;
    shrink(&p, size, rgb);
    stbi_image_free(pixels);
    return 1;
}

/* One emoji, from its code point to its two outputs.  Pictures are numbered as they are written,
   so a name that the font lacks leaves no gap. */
static void take(job *j, font *f, const emoji *e, unsigned char *rgb, FILE *captions, trouble *t)
{
    char file[32];
    snprintf(file, sizeof file, "%04d.png", j->train + j->held);
    if (!draw(f, e->code, j->size, rgb, t)) { j->missing++; return; }
    if (!write_png(j->folder, file, rgb, j->size, t)) return;
    write_caption(captions, file, e);
    if (is_held_out(e->caption)) j->held++; else j->train++;
}

/* All of the list, or up to the first trouble; then no captions.jsonl is left behind. */
static void take_all(job *j, font *f, FILE *names, unsigned char *rgb, trouble *t)
{
    char   line[1024];
    emoji  e;
    output captions;
    memset(&e, 0, sizeof e);
    if (!output_open(&captions, j->folder, "captions.jsonl", t)) return;
    while (!t->text[0] && fgets(line, sizeof line, names))
        if (parse_line(line, &e)) take(j, f, &e, rgb, captions.f, t);
    if (!t->text[0] && j->train + j->held == 0) fail(t, "%s: no emoji of this font in it", j->names);
    output_close(&captions, t);
}

/* Opens what is needed, from the most likely to be missing on, and closes it again. */
static void run(job *j, trouble *t)
{
    font f;
    FILE *names = NULL;
    unsigned char *rgb = (unsigned char *)malloc(3 * (size_t)j->size * (size_t)j->size);
    memset(&f, 0, sizeof f);
    if (!rgb) fail(t, "out of memory");
    else if (font_open(&f, j->font, t)) names = open_input(j->names, "unicode-data", t);
    if (names && mkdir(j->folder, 0777) && errno != EEXIST) fail(t, "%s: %s", j->folder, strerror(errno));
    if (names && !t->text[0]) take_all(j, &f, names, rgb, t);
    if (names) fclose(names);
    free(f.data);
    free(rgb);
}

/* Every option takes a value; what is no option is the folder. */
static int parse_arguments(job *j, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        if (a[0] != '-' && !j->folder) { j->folder = a; continue; }
        if (i + 1 == argc) return 0;
        if      (!strcmp(a, "--size"))  j->size  = atoi(argv[++i]);
        else if (!strcmp(a, "--font"))  j->font  = argv[++i];
        else if (!strcmp(a, "--names")) j->names = argv[++i];
        else return 0;
    }
    return j->folder && j->size >= 1 && j->size <= 1024;
}

int main(int argc, char **argv)
{
    job     j = { NULL, FONT, NAMES, 32, 0, 0, 0 };
    trouble t = { "" };
    if (!parse_arguments(&j, argc, argv)) {
        fprintf(stderr, "usage: emoji_data OUT [--size 32] [--font F] [--names F]   (size 1 to 1024)\n");
        return 2;
    }
    run(&j, &t);
    if (t.text[0]) { fprintf(stderr, "emoji_data: %s\n", t.text); return 1; }
    if (j.missing) printf("%d names are not in this font\n", j.missing);
    printf("%d pictures of %dx%d: %d to train on, %d held out\n",
           j.train + j.held, j.size, j.size, j.train, j.held);
    return 0;
}
