/* page.h - what the pages of the examples are made of: one HTML file that needs nothing beside it.

   Pictures are PNGs in base64 inside the page, curves are inline SVG; no script, no font, no address outside.  The page
   follows the reader's choice of light or dark, and folds to one column on a phone. */

static const char STYLE[] =
    /* colours, first by day, then by night; --mark is for what the judge prefers, and for the curves */
    ":root{color-scheme:light dark;--ink:#1b2230;--dim:#626c7c;--line:#dde2ea;--paper:#fff;--card:#f5f6f9;"
    "--mark:#d4551c}\n"
    "@media(prefers-color-scheme:dark){:root{--ink:#e7eaf0;--dim:#97a1b2;--line:#333a47;--paper:#14181f;"
    "--card:#1d222c;--mark:#ff8a4c}}\n"
    /* text */
    "*{box-sizing:border-box}\n"
    "body{margin:0 auto;max-width:68rem;padding:2.5rem 1.25rem 4rem;background:var(--paper);color:var(--ink);"
    "font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif}\n"
    "h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.2;text-wrap:balance;margin:0 0 .6rem;"
    "letter-spacing:-.02em}\n"
    "h2{font-size:1.25rem;margin:3rem 0 .4rem;letter-spacing:-.01em}\n"
    "p{max-width:44rem;margin:.4rem 0 1rem}.dim,figcaption,td:first-child{color:var(--dim)}\n"
    /* facts: three boxes; .bar is the line from 0 to 1, i the interval on it, u the win rate, s one half */
    ".facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:1rem;margin:1.8rem 0}\n"
    ".fact{background:var(--card);border-radius:12px;padding:1rem 1.2rem}.fact .dim{font-size:.9rem}\n"
    ".fact b{display:block;font-size:2.2rem;line-height:1.2;font-variant-numeric:tabular-nums}\n"
    ".bar{position:relative;height:8px;border-radius:4px;background:var(--line);margin:.6rem 0 .3rem}\n"
    ".bar i{position:absolute;top:0;height:8px;border-radius:4px;background:var(--mark);opacity:.45}\n"
    ".bar u{position:absolute;top:-3px;width:4px;height:14px;margin-left:-2px;border-radius:2px;"
    "background:var(--mark)}\n"
    ".bar s{position:absolute;top:-3px;left:50%;width:1px;height:14px;background:var(--dim)}\n"
    /* cards: as many beside each other as fit; small pictures keep their pixels */
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:1rem;margin:1rem 0}\n"
    ".cards figure{margin:0;background:var(--card);border-radius:12px;padding:.6rem}\n"
    ".four{display:grid;grid-template-columns:1fr 1fr;gap:.4rem;font-size:.72rem;text-align:center;"
    "color:var(--dim)}\n"
    ".four img{width:100%;height:auto;image-rendering:pixelated;border-radius:6px;background:#fff;display:block}\n"
    ".four .won{outline:2px solid var(--mark);outline-offset:1px}\n"
    ".cards figcaption{font-size:.85rem;line-height:1.35;margin-top:.5rem;text-align:center;"
    "overflow-wrap:anywhere}\n"
    "summary{cursor:pointer;color:var(--mark);padding:.4rem 0}\n"
    /* curves and settings */
    ".curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}\n"
    ".curves figure{background:var(--card);border-radius:12px;padding:1rem 1rem .6rem;margin:0}\n"
    "svg{display:block;width:100%;height:auto;font-size:12px;font-variant-numeric:tabular-nums}\n"
    "svg text{fill:var(--dim)}.axis{stroke:var(--line)}.even{stroke:var(--dim);stroke-dasharray:3 4}\n"
    "polyline{fill:none;stroke:var(--mark);stroke-linejoin:round}.raw{opacity:.35}.mean{stroke-width:2.5}\n"
    "table{border-collapse:collapse;width:100%;max-width:44rem}td:first-child{width:30%}\n"
    "td{padding:.4rem 1rem .4rem 0;vertical-align:top;border-top:1px solid var(--line);overflow-wrap:anywhere}\n";

/* Text between tags or in an attribute; prompts come from a file and may hold anything. */
static void put_html(FILE *f, const char *text)
{
    for (; *text; text++)
        if      (*text == '&') fputs("&amp;", f);
        else if (*text == '<') fputs("&lt;", f);
        else if (*text == '"') fputs("&quot;", f);
        else fputc(*text, f);
}

/* Three bytes are four digits of six bits; '=' stands for those that the last three lack. */
static void put_base64(FILE *f, const uint8_t *p, size_t n)
{
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = (uint32_t)p[i] << 16;
        if (i + 1 < n) v |= (uint32_t)p[i + 1] << 8;
        if (i + 2 < n) v |= p[i + 2];
        for (size_t k = 0; k < 4; k++) fputc(i + k > n ? '=' : digit[v >> (18 - 6*k) & 63], f);
    }
}

/* ---- Curves ----------------------------------------------------------------------------------------------------- */

/* Its drawing is 480 x 230: steps go from 40 to 470 across, values from 195 (low) up to 15 (top). */
typedef struct { const float *y; int n; double low, top; } curve;

static double across(const curve *c, int i) { return 40 + (c->n > 1 ? 430.0 * i / (c->n - 1) : 0); }

static double above(const curve *c, double y)
{
    return 195 - 180 * (fmax(c->low, fmin(y, c->top)) - c->low) / (c->top - c->low);
}

/* The line through y, each point the mean of those at most `reach` steps away. */
static void put_line(FILE *f, const char *kind, const curve *c, int reach)
{
    fprintf(f, "<polyline class=\"%s\" points=\"", kind);
    for (int i = 0; i < c->n; i++) {
        int from = i > reach ? i - reach : 0, to = i + reach < c->n ? i + reach : c->n - 1;
        double sum = 0;
        for (int k = from; k <= to; k++) sum += c->y[k];
        fprintf(f, "%.1f,%.1f ", across(c, i), above(c, sum / (to - from + 1)));
    }
    fputs("\"/>", f);
}

static void put_rule(FILE *f, const char *kind, double y)
{
    fprintf(f, "<line class=\"%s\" x1=\"40\" x2=\"470\" y1=\"%.1f\" y2=\"%.1f\"/>", kind, y, y);
}

/* `even` is where the curve of a model that learned nothing would stay. */
static void put_curve(FILE *f, const char *title, const curve *c, double even)
{
    fprintf(f, "<figure><b>%s</b><svg viewBox=\"0 0 480 230\" overflow=\"visible\" role=\"img\" "
            "aria-label=\"%s, step by step\">", title, title);
    for (int i = 0; i <= 4; i++) {
        double y = c->low + (c->top - c->low) * i / 4;
        put_rule(f, "axis", above(c, y));
        fprintf(f, "<text x=\"34\" y=\"%.1f\" text-anchor=\"end\">%.2g</text>", above(c, y) + 4, y);
    }
    put_rule(f, "even", above(c, even));
    put_line(f, "raw", c, 0);
    put_line(f, "mean", c, 3);
    fprintf(f, "<text x=\"40\" y=\"218\">1</text><text x=\"470\" y=\"218\" text-anchor=\"end\">step %d</text>", c->n);
    fputs("</svg></figure>\n", f);
}

/* ---- Tables ----------------------------------------------------------------------------------------------------- */

/* One row of the table of settings. */
static void put_row(FILE *f, const char *name, const char *format, ...)
{
    char    text[1400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(f, "<tr><td>%s</td><td>", name);
    put_html(f, text);
    fputs("</td></tr>\n", f);
}
