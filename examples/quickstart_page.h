/* quickstart_page.h - the part of quickstart.c that shows what it found: one HTML file that needs nothing beside it.

   Pictures are PNGs in base64 inside the page, curves are inline SVG; no script, no font, no address outside.  The page
   follows the reader's choice of light or dark, and folds to one column on a phone.

     facts      win rate with its interval, size of the effect, time
     cards      one a prompt: its pictures before and after, those that the judge prefers framed
     curves     loss and implicit accuracy, each step (faint) and the mean of its neighbours
     settings   what it takes to make the same page again */

#include "page.h"

/* ---- Cards ------------------------------------------------------------------------------------------------------ */

static void put_picture(const run *r, FILE *f, uint8_t *rgb, int i, const char *when, int won)
{
    dpo_image x = picture(r, rgb, i);
    size_t    bytes = 0;
    uint8_t  *png = dpo_png_encode(r->c, &x, &bytes);
    fprintf(f, "<img%s width=\"%d\" height=\"%d\" alt=\"", won ? " class=\"won\"" : "", r->size, r->size);
    put_html(f, r->prompt[i / EACH]);
    fprintf(f, ", %s\" src=\"data:image/png;base64,", when);
    put_base64(f, png, bytes);
    fputs("\">", f);
    dpo_png_free(r->c, png, bytes);
}

/* Prompts first ... last-1; each row of a card is one noise, before and after. */
static void put_cards(const run *r, FILE *f, int first, int last)
{
    fputs("<div class=\"cards\">\n", f);
    for (int k = first; k < last; k++) {
        fputs("<figure><div class=\"four\"><span>before</span><span>after</span>", f);
        for (int i = EACH*k; i < EACH*(k + 1); i++) {
            put_picture(r, f, r->before, i, "before", r->score_before[i] > r->score_after[i]);
            put_picture(r, f, r->after, i, "after", r->score_after[i] > r->score_before[i]);
        }
        fputs("</div><figcaption>", f);
        put_html(f, r->prompt[k]);
        fputs("</figcaption></figure>\n", f);
    }
    fputs("</div>\n", f);
}

/* ---- Curves ----------------------------------------------------------------------------------------------------- */

/* The loss is drawn between quarters that hold all of it, up to 4: one that ran away shall not flatten the rest. */
static void put_curves(const run *r, FILE *f)
{
    curve loss = { r->loss, r->s.steps, 0.5, 1 }, accuracy = { r->accuracy, r->s.steps, 0, 1 };
    for (int i = 0; i < r->s.steps; i++) {
        while (r->loss[i] < loss.low && loss.low > 0) loss.low -= 0.25;
        while (r->loss[i] > loss.top && loss.top < 4) loss.top += 0.25;
    }
    fputs("<h2>Training</h2>\n<p>The loss should fall below ln&nbsp;2&nbsp;=&nbsp;0.69, and the share of pairs that "
          "the model ranks as the judge did should rise above one half: the dashed lines are a model that learned "
          "nothing.</p>\n<div class=\"curves\">", f);
    put_curve(f, "loss", &loss, log(2.0));
    put_curve(f, "implicit accuracy", &accuracy, 0.5);
    fputs("</div>\n", f);
}

/* ---- Facts and settings ----------------------------------------------------------------------------------------- */

static void put_rate(FILE *f, const verdict *v)
{
    fprintf(f, "<div class=\"fact\"><span class=\"dim\">win rate against the model before</span><b>%.2f</b>", v->rate);
    fprintf(f, "<div class=\"bar\"><i style=\"left:%.1f%%;width:%.1f%%\"></i><s></s>"
               "<u style=\"left:%.1f%%\"></u></div>", 100 * v->low, 100 * (v->high - v->low), 100 * v->rate);
    fprintf(f, "<span class=\"dim\">95%% CI %.2f-%.2f over %d held-out prompts</span></div>\n", v->low, v->high,
            (int)EVAL);
}

/* A rate says how often, not how much: the second box says that. */
static void put_facts(const run *r, FILE *f, const verdict *v)
{
    const double *t = r->seconds;
    fputs("<div class=\"facts\">", f);
    put_rate(f, v);
    fprintf(f, "<div class=\"fact\"><span class=\"dim\">size of the effect</span><b>%+.2f SD</b><span class=\"dim\">"
               "the judge's mean moved from %.2f to %.2f, in standard deviations over the pictures before</span>"
               "</div>\n", v->effect, v->before, v->after);
    fprintf(f, "<div class=\"fact\"><span class=\"dim\">time on this CPU</span><b>%.0f s</b><span class=\"dim\">"
               "%.0f s for the pairs, %.0f s to train, %.0f s to compare</span></div></div>\n", t[0] + t[1] + t[2],
            t[0], t[1], t[2]);
}

/* In millions. */
static double weights(dpo_tensor **params, int count)
{
    double n = 0;
    for (int i = 0; i < count; i++) n += (double)dpo_count(params[i]) / 1e6;
    return n;
}

static void put_settings(const run *r, FILE *f)
{
    const settings *s = &r->s;
    dpo_net        *unet = dpo_model_unet(r->m);
    int             n = 0, n_low = 0;
    dpo_tensor    **all = dpo_net_params(unet, &n), **low = dpo_adapter_params(unet, &n_low);
    fputs("<h2>Settings</h2>\n<table>\n", f);
    put_row(f, "model", "%s: a UNet of %.2f million weights, pictures of %dx%d pixels", s->model, weights(all, n),
            r->size, r->size);
    put_row(f, "judge", "%s: %s", r->j->name, r->j->wants);
    put_row(f, "pairs", "%d, from %d prompts with two pictures each", r->pairs, s->pair_prompts);
    put_row(f, "drawing", "%d steps, guidance %g", s->sample_steps, s->guidance);
    put_row(f, "adapters", "rank %d: %.2f million weights", s->rank, weights(low, n_low));
    put_row(f, "training", "%d steps of %d pairs, beta %g, learning rate %g", s->steps, s->pairs_a_step, s->beta,
            s->lr);
    put_row(f, "seed", "%llu", (unsigned long long)s->seed);
    put_row(f, "memory", "%.0f MB for tensors, at most", (double)dpo_memory_peak(r->c, 0) / 1e6);
    fputs("</table>\n", f);
}

/* ---- All of it -------------------------------------------------------------------------------------------------- */

static void put_head(const run *r, FILE *f, const verdict *v)
{
    fputs("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
          "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n", f);
    fprintf(f, "<title>Diffusion-DPO: judge %s, win rate %.2f</title>\n<style>\n%s</style></head>\n<body>\n",
            r->j->name, v->rate, STYLE);
    fprintf(f, "<h1>A text-to-image model, before and after Diffusion&#8209;DPO</h1>\n<p>The model drew two pictures "
               "for each of %d prompts, and a judge named <b>%s</b>, who wants %s, picked one of the two. From %d such "
               "pairs, %d steps of training taught it the judge's taste. What it learned is measured on %d prompts "
               "that no pair used.</p>\n", r->s.pair_prompts, r->j->name, r->j->wants, r->pairs, r->s.steps, (int)EVAL);
}

static void put_page(const run *r, FILE *f, const verdict *v)
{
    put_head(r, f, v);
    put_facts(r, f, v);
    fputs("<h2>Before and after</h2>\n<p>Both pictures of a row start from the same noise; a frame marks the one that "
          "the judge prefers. The prompts are in random order, not chosen.</p>\n", f);
    put_cards(r, f, 0, SHOWN);
    fprintf(f, "<details><summary>The other %d prompts</summary>\n", EVAL - SHOWN);
    put_cards(r, f, SHOWN, EVAL);
    fputs("</details>\n", f);
    put_curves(r, f);
    put_settings(r, f);
    fputs("<p class=\"dim\">Made by examples/quickstart.c of diffdpo.h. The pictures, pairs and adapters are in "
          "quickstart-out/.</p>\n</body></html>\n", f);
}
