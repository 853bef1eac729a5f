/* fullsize.c - models of the published sizes, with random weights: made, opened, loaded, one sampling step, a picture.

   build   cc -O2 tests/fullsize.c -o build/fullsize -lm -lpthread
   run     build/fullsize make sd15|sd21|sdxl|refiner FILE      writes 2 GB (sd15) to 7 GB (sdxl), F16
           build/fullsize run FILE [bf16|f16|f32]               times and memory, against the limits of the project

   Not a part of the test suite's default: sh tests/run.sh fullsize makes the files, runs this, and removes them. */
#include <stdio.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"
#include "dpo_test.h"

/* ---- making ------------------------------------------------------------------------------------------------------ */

/* Uniform numbers as F16 bits, 4096 of them in turn: quick to write, and small enough for any depth. */
static int fill_random(void *user, dpo_writer *w, void *tag)
{
    const dpoi_item *item = (const dpoi_item *)tag;
    const dpoi_param *p = item->part[0];
    static uint16_t  values[4096];
    static uint64_t  seed = 1;
    float            spread = 0, fill = 0;
    (void)user;
    if (p && p->form == DPOI_VECTOR) fill = strstr(p->name, "norm") && strstr(p->name, ".weight") ? 1.0f : 0.0f;
    else if (p) spread = p->form == DPOI_TABLE ? 0.02f : 1.0f/sqrtf((float)(p->shape[1]*p->shape[2]*p->shape[3]));
    for (int i = 0; i < 4096; i++) values[i] = dpoi_f32_to_f16(fill + spread*(float)(2*test_uniform(&seed) - 1));
    while (w->left > 0) {
        size_t n = w->left < sizeof values ? (size_t)w->left : sizeof values;
        if (!dpo_writer_bytes(w, values, n)) return 0;
    }
    return 1;
}

/* The family's own configuration, planned: names and shapes without memory. */
static int make(dpo_ctx *c, const char *name, const char *path)
{
    static const char *const names[] = { "sdxl", "refiner", "sd21", "sd15" };
    dpo_model  *m = dpoi_model_new(c, path);
    dpo_writer *w;
    dpoi_item  *items;
    int         ok;
    for (int i = 0; i < DPOI_FAMILIES && m; i++) if (strcmp(name, names[i]) == 0) m->family = &dpoi_families[i];
    if (!m || !m->family || !dpoi_model_build(m, DPO_F16, DPOI_PLANNED)) return 0;
    items = (dpoi_item *)calloc(8192, sizeof *items);
    w = dpo_writer_new(c, path);
    ok = dpoi_model_add(m, w, m->family, "F16", items) && dpo_writer_save(w, fill_random, NULL);
    free(items);
    return ok;
}

/* ---- measuring --------------------------------------------------------------------------------------------------- */

/* Resident memory of the process in GB, mapped pages included: its most so far (VmHWM) or now (VmRSS); 0 where the system
   does not say. */
static double resident(const char *field)
{
    char   line[256];
    double kb = 0;
    FILE  *f = fopen("/proc/self/status", "rb");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, field, strlen(field)) == 0) sscanf(line + strlen(field) + 1, "%lf", &kb);
    if (f) fclose(f);
    return kb / 1048576;
}

static void report(const char *what, double seconds)
{
    printf("%-44s %7.2f s   resident %5.2f GB, most %5.2f GB\n", what, seconds, resident("VmRSS"), resident("VmHWM"));
    fflush(stdout);
}

/* The states of one prompt of random ids and of the empty one: emb [2,77,D], *pooled [2,P] or NULL. */
static dpo_tensor *encode(dpo_ctx *c, dpo_model *m, dpo_tensor **pooled)
{
    static const int64_t shape[2] = { 2, 77 };
    int32_t     ids[154];
    uint64_t    seed = 3;
    dpo_tensor *x = NULL, *t;
    for (int i = 0; i < 154; i++) ids[i] = i % 77 == 0 ? 49406 : i > 77 || i % 77 > 20 ? 49407 : (int32_t)(test_random(&seed) % 49000);
    t = dpo_tensor_from(c, DPO_I32, 2, shape, ids);
    for (int i = 0; i < 2; i++) {
        dpo_tensor *h;
        if (!dpo_model_text(m, i)) continue;
        h = dpo_text_forward(dpo_model_text(m, i), t, dpo_model_text(m, 1) != NULL, i ? pooled : NULL);
        x = x ? dpo_concat(c, x, h, 2) : h;
    }
    return x;
}

/* One step of guided sampling at a size, and the picture: states in F32, as dpo_sample has them. */
static void step(dpo_ctx *c, dpo_model *m, int size)
{
    dpo_model_info   d = dpo_model_describe(m);
    dpo_sampler_desc s;
    dpo_sampler     *sampler;
    dpo_unet_in      in;
    dpo_tensor      *x, *y, *pooled = NULL;
    int64_t          scope = dpo_scope(c), shape[4], ids[2];
    int32_t          keys[2] = { 0, 0 };
    float            t[2], sizes[12];
    char             what[80];
    double           start = dpo_seconds();
    memset(&s, 0, sizeof s);
    memset(&in, 0, sizeof in);
    s.steps = 20;
    sampler = dpo_sampler_new(c, dpo_model_schedule(m), &s);
    if (!sampler) return;
    in.emb = encode(c, m, &pooled);
    shape[0] = 1;
    x = dpo_tensor_from(c, DPO_I32, 1, shape, keys);
    shape[0] = shape[1] = size / d.factor; shape[2] = d.channels;
    x = dpo_affine(c, dpo_randn(c, 1, 1, 0, x, 3, shape), sampler->init_sigma, 0);
    y = dpo_sampler_input(sampler, 0, x);
    in.x = dpo_concat(c, y, y, 0);
    t[0] = t[1] = sampler->t[0];
    ids[0] = 2; ids[1] = d.time_ids;
    in.t = dpo_tensor_from(c, DPO_F32, 1, ids, t);
    for (int i = 0; i < 12; i++) sizes[i] = (float)size;
    if (d.time_ids) in.time_ids = dpo_tensor_from(c, DPO_F32, 2, ids, sizes);
    in.pooled = pooled;
    y = dpo_unet(dpo_model_unet(m), &in);
    y = dpo_binary(c, DPO_ADD, dpo_slice(c, y, 0, 0, 1), dpo_slice(c, y, 0, 1, 1));     /* the sum will do */
    x = dpo_sampler_step(sampler, 0, x, dpo_affine(c, y, 0.5f, 0), NULL);
    if (x) {
        float first;
        shape[0] = dpo_count(x);
        y = dpo_slice(c, dpo_reshape(c, x, 1, shape), 0, 0, 1);
        CHECK(y && dpo_read(y, &first) && first == first, "the step gives no number: %s", dpo_error(c));
    }
    snprintf(what, sizeof what, "text and one step (batch 2) at %dx%d", size, size);
    report(what, dpo_seconds() - start);
    start = dpo_seconds();
    x = dpo_scope_end(c, scope, x);
    dpo_model_vae_options(m, 512, 0);
    y = dpo_decode_latents(m, x);
    CHECK(y && y->shape[1] == size, "decoding: %s", dpo_error(c));
    snprintf(what, sizeof what, "picture of %dx%d, in tiles of 512", size, size);
    report(what, dpo_seconds() - start);
    dpo_sampler_free(sampler);
    dpo_scope_end(c, scope, NULL);
}

/* Limits in BF16: GB resident, mapped pages included. */
static void run(dpo_ctx *c, const char *path, int dtype)
{
    double        start = dpo_seconds(), opened;
    dpo_file     *f = dpo_safetensors_open(c, path);
    dpo_file_info d = dpo_file_describe(f);
    dpo_model    *m;
    int           xl = strstr(d.what, "XL") != NULL;
    double        limit = xl ? 9 : 3;
    opened = dpo_seconds() - start;
    printf("%s\n%lld parameters in %lld tensors\n", d.what, (long long)d.params, (long long)dpo_file_count(f));
    report("opened and recognised", opened);
    CHECK(opened < 1, "opening took %g s", opened);
    dpo_file_close(f);
    start = dpo_seconds();
    m = dpo_model_load(c, path, dtype);
    CHECK(m != NULL, "%s", dpo_error(c));
    if (!m) return;
    report("loaded", dpo_seconds() - start);
    step(c, m, xl ? 512 : 256);
    step(c, m, xl ? 1024 : 512);
    CHECK(!dpo_error(c), "%s", dpo_error(c));
    printf("the context held %.2f GB at most\n", (double)dpo_memory_peak(c, 0) / 1073741824);
    if (dtype == DPO_BF16 && resident("VmHWM") > 0)
        CHECK(resident("VmHWM") <= limit, "%.2f GB resident, %.0f are allowed", resident("VmHWM"), limit);
}

int main(int argc, char **argv)
{
    dpo_desc desc = { 0 };
    dpo_ctx *c;
    int      dtype = argc > 3 && !strcmp(argv[3], "f32") ? DPO_F32 : argc > 3 && !strcmp(argv[3], "f16") ? DPO_F16 : DPO_BF16;
    desc.log = dpo_log_stderr;
    c = dpo_open(&desc);
    if (argc > 3 && strcmp(argv[1], "make") == 0) {
        double start = dpo_seconds();
        CHECK(make(c, argv[2], argv[3]), "%s", dpo_error(c) ? dpo_error(c) : "sd15, sd21, sdxl or refiner");
        printf("made %s in %.1f s\n", argv[3], dpo_seconds() - start);
    }
    else if (argc > 2 && strcmp(argv[1], "run") == 0) run(c, argv[2], dtype);
    else CHECK(0, "usage: see the top of tests/fullsize.c");
    dpo_close(c);
    return test_report();
}
