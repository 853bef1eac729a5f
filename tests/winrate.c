/* winrate.c - how often the quickstart's judge prefers what examples/train made: full weights and adapters, by objective.

   build   cc -O2 tests/winrate.c -o build/winrate -lm -lpthread
   run     build/winrate pairs OUT              OUT/quickstart-out/pairs.jsonl, as the quickstart makes it
           build/winrate rate OUT RESULT        RESULT: an adapter.safetensors or a model's folder; the last line has the rate
   By name: sh tests/winrate.sh runs it all. */
#define main quickstart_main
#include "../examples/quickstart.c"
#undef main

/* The pictures before are the same for every result: drawn once, kept in OUT/before.rgb. */
static int draw_before(run *r)
{
    char   path[1200];
    size_t bytes = (size_t)EVAL * EACH * 3 * (size_t)r->size * (size_t)r->size;
    FILE  *f;
    snprintf(path, sizeof path, "%s/before.rgb", r->s.out);
    if ((f = fopen(path, "rb")) != NULL) {
        int ok = (r->before = (uint8_t *)dpo_scope_alloc(r->c, bytes)) != NULL && fread(r->before, 1, bytes, f) == bytes;
        fclose(f);
        return ok;
    }
    if (!(r->before = draw(r, 0, EVAL, 1)) || !(f = fopen(path, "wb"))) return 0;
    if (fwrite(r->before, 1, bytes, f) != bytes) return fclose(f), 0;
    return fclose(f) == 0;
}

static int rate(run *r, const char *result)
{
    verdict v;
    size_t  n = strlen(result);
    int     adapter = n > 12 && !strcmp(result + n - 12, ".safetensors");
    if (!draw_before(r)) return 0;
    if (adapter ? !dpo_adapter_load(dpo_model_unet(r->m), result) : !(r->m = dpo_model_load(r->c, result, DPO_F32))) return 0;
    if (!(r->after = draw(r, 0, EVAL, !adapter))) return 0;
    score_all(r, r->before, EVAL*EACH, r->score_before);
    score_all(r, r->after, EVAL*EACH, r->score_after);
    v = compare(r);
    printf("win rate %.2f (95%% CI %.2f-%.2f), %+.2f standard deviations, %s\n", v.rate, v.low, v.high, v.effect, result);
    return 1;
}

int main(int argc, char **argv)
{
    static run r;
    int        ok = 0;
    if (argc < 3) { fprintf(stderr, "usage: winrate pairs OUT | rate OUT RESULT\n"); return 2; }
    r.s = defaults();
    r.j = &judges[0];
    r.s.out = argv[2];
    r.start = dpo_seconds();
    if (prepare(&r)) ok = !strcmp(argv[1], "pairs") ? make_pairs(&r) : argc > 3 && rate(&r, argv[3]);
    if (r.c && dpo_error(r.c)) fprintf(stderr, "winrate: %s\n", dpo_error(r.c));
    dpo_close(r.c);
    return !ok;
}
