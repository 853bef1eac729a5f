/* trainer_memory.c - what a training step of the published models takes, counted on the backend that computes nothing.

   build   cc -O2 tests/trainer_memory.c -o build/trainer_memory -lm -lpthread
   run     build/trainer_memory [TOKENIZERS]     a pipeline folder with CLIP's tokenizer and tokenizer_2;
                                                 ../shared/golden/sdxl/pipeline                       By name alone. */
#include <stdio.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"
#include "dpo_test.h"

static const char *tokenizers = "../shared/golden/sdxl/pipeline";

typedef struct { const char *what, *family; int dtype, rank, optimizer, checkpoint, size, keep; double limit; } setup;
static const setup setups[] = {
    { "SD1.5 512, adapters of rank 16, BF16, checkpointing", "sd15", DPO_BF16, 16, DPO_ADAMW, 1, 512, 0, 3 },
    { "SD1.5 512, adapters of rank 16, BF16",                "sd15", DPO_BF16, 16, DPO_ADAMW, 0, 512, 0, 0 },
    { "SD1.5 512, all weights, AdamW, checkpointing",        "sd15", DPO_F32, 0, DPO_ADAMW, 1, 512, 0, 16 },
    { "SD1.5 512, all weights, AdamW 8 bit, checkpointing",  "sd15", DPO_F32, 0, DPO_ADAMW8, 1, 512, 0, 10.5 },
    { "SD1.5 512, all weights, Adafactor, checkpointing",    "sd15", DPO_F32, 0, DPO_ADAFACTOR, 1, 512, 0, 10 },
    { "SD1.5 512, the same, text encoder and VAE kept",      "sd15", DPO_F32, 0, DPO_ADAFACTOR, 1, 512, 1, 0 },
    { "SDXL 1024, adapters of rank 16, BF16, checkpointing", "sdxl", DPO_BF16, 16, DPO_ADAMW, 1, 1024, 0, 9 },
    { "SDXL 1024, the same, text encoders and VAE kept",     "sdxl", DPO_BF16, 16, DPO_ADAMW, 1, 1024, 1, 0 },
};

/* The family's model with weights of zeros: planned, as its configurations say, then realised. */
static dpo_model *model_of(dpo_ctx *c, const setup *s)
{
    static const char *const names[] = { "sdxl", "refiner", "sd21", "sd15" };
    static const char *const folders[] = { "tokenizer", "tokenizer_2" };
    dpo_model *m = dpoi_model_new(c, s->family);
    for (int i = 0; i < DPOI_FAMILIES && m; i++) if (strcmp(s->family, names[i]) == 0) m->family = &dpoi_families[i];
    if (!m || !m->family || !dpoi_model_build(m, s->dtype, DPOI_PLANNED)) return NULL;
    if (!(m->unet = dpoi_net_realise(m->unet, NULL)) || (m->vae && !(m->vae = dpoi_net_realise(m->vae, NULL)))) return NULL;
    for (int i = 0; i < 2; i++) {
        char path[1024];
        if (!m->text[i]) continue;
        if (!(m->text[i] = dpoi_net_realise(m->text[i], NULL))) return NULL;
        snprintf(path, sizeof path, "%s/%s", tokenizers, folders[i]);
        m->tokens[i] = dpoi_strdup(c, path);
        if (!(m->tokenizer[i] = dpo_tokenizer_load(c, path))) return NULL;
    }
    m->files = 1;                         /* as if: nothing here asks for them again */
    return m;
}

static void measure(const setup *s)
{
    dpo_desc       d;
    dpo_backend   *cpu;
    dpo_ctx       *c;
    dpo_model     *m;
    dpo_pairs     *p;
    dpo_image      x;
    dpo_train_desc t = dpo_recipe_official_sd15();
    double         gb, start = dpo_seconds(), weights;
    memset(&d, 0, sizeof d);
    d.products = s->dtype;                /* all weights too: their products round, as autocast does */
    if (!s->rank) d.products = DPO_BF16;
    cpu = dpo_cpu_open(&d);
    d.backend = dpo_dry_open(cpu);
    c = dpo_open(&d);
    m = model_of(c, s);
    weights = (double)dpo_memory(c) / 1e9;
    p = dpo_pairs_new(c);
    if (dpo_image_new(c, s->size, s->size, &x)) {
        dpo_pairs_add(p, "a prompt", &x, &x, 1);
        dpo_image_free(c, &x);
    }
    t.steps = t.batch = t.accumulation = 1;
    t.rank = s->rank;
    t.optimizer = s->optimizer;
    t.adafactor.weight_decay = 1e-2f;
    t.checkpoint = s->checkpoint;
    t.width = t.height = s->size;
    t.ahead = !s->rank;
    t.rest_encoders = !s->keep;
    CHECK(dpo_train(m, p, &t), "%s: %s", s->what, dpo_error(c));
    gb = (double)dpo_memory_peak(c, 0) / 1e9;
    printf("%-56s %6.2f GB, of it %.2f weights", s->what, gb, weights);
    if (s->limit > 0) printf("; at most %.1f are wanted", s->limit);
    printf(" (%.1f s)\n", dpo_seconds() - start);
    fflush(stdout);
    if (s->limit > 0) CHECK(gb <= s->limit, "%s: %.2f GB", s->what, gb);
    dpo_close(c);
    if (cpu) cpu->close(cpu->self);
}

int main(int argc, char **argv)
{
    if (argc > 1) tokenizers = argv[1];
    for (size_t i = 0; i < sizeof setups / sizeof *setups; i++) measure(&setups[i]);
    return test_report();
}
