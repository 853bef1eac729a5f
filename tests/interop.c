/* interop.c - the C side of interop.sh: what a model computes from stored inputs, and files for Python to read.

   build   cc -O1 tests/interop.c -o build/interop -lm -lpthread
   run     build/interop run MODEL IN.safetensors OUT.safetensors [CONFIG [ADAPTER]]
           build/interop adapt MODEL OUT.safetensors kohya|peft narrow|wide [CONFIG]

   `run` reads x, t, emb, pooled, time_ids, ids_1, ids_2, image, z as far as they are there, pictures with channels last,
   and writes y, text_1, text_2, before_1, before_2, pooled_1, pooled_2, mean, decoded.  CONFIG: "" or the folder that
   describes a single file.  `adapt` writes random adapters of the UNet and the text encoders. */
#include <stdio.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"
#include "dpo_test.h"

/* ---- inputs and outputs ------------------------------------------------------------------------------------------ */

static dpo_tensor *input(dpo_ctx *c, dpo_file *f, const char *name)
{
    dpo_entry  *e = dpo_file_find(f, name);
    dpo_tensor *x;
    float      *v;
    int64_t    *k;
    int32_t    *ids;
    int         whole = e && e->dtype[0] == 'I';
    if (!e) return NULL;
    v = (float *)calloc((size_t)e->count, sizeof *v);
    k = (int64_t *)calloc((size_t)e->count, sizeof *k);
    ids = (int32_t *)v;
    if (whole) dpo_entry_ints(e, 0, e->count, k);
    else dpo_entry_floats(e, 0, e->count, v);
    for (int64_t i = 0; i < e->count && whole; i++) ids[i] = (int32_t)k[i];
    x = dpo_tensor_from(c, whole ? DPO_I32 : DPO_F32, e->rank, e->shape, v);
    free(v);
    free(k);
    return x;
}

static void output(dpo_writer *w, const char *name, dpo_tensor *x)
{
    if (x) dpo_writer_add(w, name, "F32", x->rank, x->shape, x);
}

static int fill(void *user, dpo_writer *w, void *tag)
{
    dpo_tensor *x = (dpo_tensor *)tag;
    float      *v = (float *)calloc((size_t)dpo_count(x), sizeof *v);
    int         ok = v && dpo_read(x, v) && dpo_writer_floats(w, v, dpo_count(x));
    (void)user;
    free(v);
    return ok;
}

/* ---- the two commands -------------------------------------------------------------------------------------------- */

static dpo_model *load(dpo_ctx *c, const char *path, const char *config)
{
    dpo_load_desc d;
    memset(&d, 0, sizeof d);
    d.config = config && *config ? config : NULL;
    return dpo_model_load_with(c, path, &d);
}

static void run_text(dpo_model *m, dpo_file *f, dpo_writer *w, int which)
{
    char        name[32];
    dpo_tensor *ids, *pooled = NULL;
    dpo_net    *text = dpo_model_text(m, which);
    if (!text) return;
    snprintf(name, sizeof name, "ids_%d", which + 1);
    ids = input(dpoi_model_ctx(m), f, name);
    snprintf(name, sizeof name, "text_%d", which + 1);
    output(w, name, dpo_text_forward(text, ids, 0, &pooled));
    snprintf(name, sizeof name, "pooled_%d", which + 1);
    output(w, name, pooled);
    snprintf(name, sizeof name, "before_%d", which + 1);
    output(w, name, dpo_text_forward(text, ids, 1, NULL));
}

static int run(dpo_ctx *c, int argc, char **argv)
{
    dpo_model  *m = load(c, argv[2], argc > 5 ? argv[5] : NULL);
    dpo_file   *f = dpo_safetensors_open(c, argv[3]);
    dpo_writer *w = dpo_writer_new(c, argv[4]);
    dpo_unet_in in;
    memset(&in, 0, sizeof in);
    if (!m || !f || !w || (argc > 6 && !dpo_model_adapter_load(m, argv[6]))) return 0;
    in.x = input(c, f, "x");
    in.t = input(c, f, "t");
    in.emb = input(c, f, "emb");
    in.pooled = input(c, f, "pooled");
    in.time_ids = input(c, f, "time_ids");
    output(w, "y", dpo_unet(dpo_model_unet(m), &in));
    for (int i = 0; i < 2; i++) run_text(m, f, w, i);
    output(w, "mean", dpo_encode_images(m, input(c, f, "image"), NULL));
    output(w, "decoded", dpo_decode_latents(m, input(c, f, "z")));
    return dpo_writer_save(w, fill, NULL);
}

static int fill_adapters(dpo_net *n, const char *targets, uint64_t seed)
{
    dpo_adapter_desc d;
    dpo_tensor     **params;
    int              count;
    memset(&d, 0, sizeof d);
    d.rank = 3;
    d.alpha = 6;
    d.targets = targets;
    if (!dpo_adapter_new(n, &d)) return 0;
    params = dpo_adapter_params(n, &count);
    for (int i = 0; i < count; i++) {
        float *v = (float *)calloc((size_t)dpo_count(params[i]), sizeof *v);
        for (int64_t k = 0; k < dpo_count(params[i]); k++) v[k] = (float)(0.2 * test_normal(&seed));
        dpo_write(params[i], v);
        free(v);
    }
    return 1;
}

static int adapt(dpo_ctx *c, int argc, char **argv)
{
    static const char narrow[] = "to_q,to_k,to_v,to_out.0";
    static const char wide[] = "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,"
                               "time_emb_proj,downsamplers.0.conv,upsamplers.0.conv";
    dpo_model         *m = load(c, argv[2], argc > 6 ? argv[6] : NULL);
    dpo_adapter_format d;
    memset(&d, 0, sizeof d);
    d.dtype = DPO_F32;
    d.naming = strcmp(argv[4], "peft") == 0 ? DPO_PEFT : DPO_KOHYA;
    if (!m || !fill_adapters(dpo_model_unet(m), strcmp(argv[5], "wide") == 0 ? wide : narrow, 1)) return 0;
    for (int i = 0; i < 2; i++)
        if (dpo_model_text(m, i) && !fill_adapters(dpo_model_text(m, i), "q_proj,k_proj,v_proj,out_proj,fc1,fc2",
                                                   (uint64_t)i + 2)) return 0;
    return dpo_model_adapter_save(m, argv[3], &d);
}

int main(int argc, char **argv)
{
    dpo_desc desc = { 0 };
    dpo_ctx *c;
    int      ok = 0;
    desc.log = dpo_log_stderr;
    c = dpo_open(&desc);
    if (argc >= 5 && strcmp(argv[1], "run") == 0) ok = run(c, argc, argv);
    else if (argc >= 6 && strcmp(argv[1], "adapt") == 0) ok = adapt(c, argc, argv);
    else fprintf(stderr, "usage: see the top of tests/interop.c\n");
    if (dpo_error(c)) ok = 0;
    dpo_close(c);
    return !ok;
}
