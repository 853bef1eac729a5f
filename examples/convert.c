/* convert.c - change the form of a model or an adapter, or say what a file is.

   build   cc -O2 examples/convert.c -o build/convert -lm -lpthread
   run     build/convert MODEL OUT.safetensors         one file in the original naming, which ComfyUI and A1111 load
           build/convert MODEL FOLDER                  a folder, which diffusers loads
           build/convert ADAPTER OUT.safetensors       kohya's naming, which all load; peft's with --naming peft
           build/convert --list FILE ...               family, parameters, types; --list --all: every tensor too

   MODEL is a folder or a .safetensors file of Stable Diffusion 1.x, 2.x, XL or its refiner.  Options:
     --dtype f16|bf16|f32      of the result's numbers; f16
     --lora FILE[:STRENGTH]    fold an adapter into the weights; may stand several times
     --tokenizer FOLDER        CLIP's vocab.json and merges.txt, which a single file has not and a folder needs
     --config FOLDER           a pipeline folder whose configurations describe a file that is no published model
     --prediction NAME         epsilon or v_prediction, against what a single file says */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"

typedef struct options {
    const char *in, *out, *naming, *config, *lora[16];
    dpo_load_desc load;
    int loras, list, all;
} options;

static int ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

/* ---- --list ------------------------------------------------------------------------------------------------------ */

/* How many tensors and numbers there are of each type: "F16 1,680 tensors, 2,567,463,684 numbers". */
static void print_types(dpo_file *f)
{
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        const char *type = dpo_file_entry(f, i)->dtype;
        int64_t     tensors = 0, numbers = 0, before = 0;
        for (int64_t k = 0; k < dpo_file_count(f); k++) {
            if (strcmp(dpo_file_entry(f, k)->dtype, type) != 0) continue;
            before += k < i;
            tensors++;
            numbers += dpo_file_entry(f, k)->count;
        }
        if (!before) printf("  %-8s %6lld tensors %14lld numbers\n", type, (long long)tensors, (long long)numbers);
    }
}

static void print_tensors(dpo_file *f)
{
    for (int64_t i = 0; i < dpo_file_count(f); i++) {
        const dpo_entry *e = dpo_file_entry(f, i);
        printf("  %-8s %s [", e->dtype, e->name);
        for (int k = 0; k < e->rank; k++) printf(k ? ",%lld" : "%lld", (long long)e->shape[k]);
        printf("]\n");
    }
}

static int list_file(dpo_ctx *c, dpo_file *f, int all)
{
    dpo_file_info d = dpo_file_describe(f);
    const char   *key, *value = "";
    if (!f) return 0;
    printf("%s: %s\n  %lld parameters in %lld tensors%s\n", dpo_file_path(f), d.what, (long long)d.params,
           (long long)dpo_file_count(f), d.supported || d.kind == DPO_FILE_PART ? "" : "; not supported");
    print_types(f);
    for (int64_t i = 0; (key = dpo_file_metadata_at(f, i, &value)) != NULL; i++)
        printf("  %s: %.200s%s\n", key, value, strlen(value) > 200 ? "..." : "");
    if (all) print_tensors(f);
    dpo_file_close(f);
    return !dpo_error(c);
}

/* A pipeline's folder, by its parts. */
static int list_folder(dpo_ctx *c, const char *folder, int all)
{
    static const char *const parts[][2] = { { "unet", "diffusion_pytorch_model" }, { "vae", "diffusion_pytorch_model" },
                                            { "text_encoder", "model" }, { "text_encoder_2", "model" } };
    char      path[1024];
    dpo_json *index;
    snprintf(path, sizeof path, "%s/model_index.json", folder);
    if (!(index = dpo_json_load(c, path))) return 0;
    printf("%s: %s, a folder that diffusers wrote\n", folder, dpo_json_want_text(index, "_class_name", "no pipeline"));
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (!dpo_json_text(dpo_json_at(dpo_json_get(index, parts[i][0]), 1), NULL)) continue;
        snprintf(path, sizeof path, "%s/%s", folder, parts[i][0]);
        if (!list_file(c, dpo_safetensors_open_folder(c, path, parts[i][1]), all)) return 0;
    }
    return 1;
}

/* A path that is no file that can be opened is tried as a folder; the second error then says less than the first. */
static int list(dpo_ctx *c, const char *path, int all)
{
    char  name[1024];
    FILE *f;
    snprintf(name, sizeof name, "%s/model_index.json", path);
    if ((f = fopen(name, "rb")) == NULL) return list_file(c, dpo_safetensors_open(c, path), all);
    fclose(f);
    return list_folder(c, path, all);
}

/* ---- converting -------------------------------------------------------------------------------------------------- */

/* "FILE:0.8", where a drive's colon is not meant: what follows must be a number. */
static int fold(dpo_model *m, const char *lora)
{
    char        file[1024], *end;
    const char *colon = strrchr(lora, ':');
    double      strength = colon ? strtod(colon + 1, &end) : 1;
    dpo_net    *nets[3];
    if (colon && (end == colon + 1 || *end)) { colon = NULL; strength = 1; }
    snprintf(file, sizeof file, "%.*s", colon ? (int)(colon - lora) : 1000, lora);
    if (!dpo_model_adapter_load(m, file)) return 0;
    nets[0] = dpo_model_unet(m);
    nets[1] = dpo_model_text(m, 0);
    nets[2] = dpo_model_text(m, 1);
    for (int i = 0; i < 3; i++) {
        dpo_adapter_strength(nets[i], (float)strength);
        if (nets[i] && !dpo_adapter_merge(nets[i])) return 0;
    }
    return 1;
}

static int convert_model(dpo_ctx *c, const options *o)
{
    dpo_model *m = dpo_model_load_with(c, o->in, &o->load);
    for (int i = 0; i < o->loras && m; i++) if (!fold(m, o->lora[i])) return 0;
    return ends_with(o->out, ".safetensors") ? dpo_model_save_file(m, o->out, o->load.dtype)
                                             : dpo_model_save(m, o->out, o->load.dtype);
}

/* An adapter if the file says so, else a model. */
static int convert(dpo_ctx *c, const options *o)
{
    dpo_adapter_format format;
    dpo_file *f = ends_with(o->in, ".safetensors") ? dpo_safetensors_open(c, o->in) : NULL;
    int       adapter = f && dpo_file_describe(f).kind == DPO_FILE_ADAPTER;
    dpo_file_close(f);
    if (!adapter) return convert_model(c, o);
    memset(&format, 0, sizeof format);
    format.dtype = o->load.dtype;
    format.naming = strcmp(o->naming, "peft") == 0 ? DPO_PEFT : DPO_KOHYA;
    return dpo_adapter_convert(c, o->in, o->out, &format, o->config);
}

/* ---- the command line -------------------------------------------------------------------------------------------- */

static int dtype_of(const char *s)
{
    return strcmp(s, "f16") == 0 ? DPO_F16 : strcmp(s, "bf16") == 0 ? DPO_BF16 : strcmp(s, "f32") == 0 ? DPO_F32 : -1;
}

/* 0 if an option is unknown or has no value. */
static int parse(options *o, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *s = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strncmp(s, "--", 2) != 0) {
            if (!o->in) o->in = s;
            else if (!o->out) o->out = s;
            else return 0;
        }
        else if (strcmp(s, "--all") == 0) o->all = 1;
        else if (!value) return 0;
        else if (strcmp(s, "--dtype") == 0 && dtype_of(value) >= 0) o->load.dtype = dtype_of(argv[++i]);
        else if (strcmp(s, "--lora") == 0 && o->loras < 16) o->lora[o->loras++] = argv[++i];
        else if (strcmp(s, "--tokenizer") == 0) o->load.tokenizer = argv[++i];
        else if (strcmp(s, "--config") == 0) o->load.config = o->config = argv[++i];
        else if (strcmp(s, "--prediction") == 0) o->load.prediction = argv[++i];
        else if (strcmp(s, "--naming") == 0 && (!strcmp(value, "kohya") || !strcmp(value, "peft")))
            o->naming = argv[++i];
        else return 0;
    }
    return o->in && o->out;
}

int main(int argc, char **argv)
{
    dpo_desc desc = { 0 };
    options  o;
    dpo_ctx *c;
    int      ok = 1;
    memset(&o, 0, sizeof o);
    o.naming = "kohya";
    o.load.dtype = DPO_F16;
    desc.log = dpo_log_stderr;
    c = dpo_open(&desc);
    if (argc > 2 && strcmp(argv[1], "--list") == 0) {
        int all = strcmp(argv[2], "--all") == 0;
        for (int i = 2 + all; i < argc; i++, dpo_clear_error(c)) ok &= list(c, argv[i], all);
    } else if (parse(&o, argc, argv)) {
        ok = convert(c, &o);
    } else {
        fprintf(stderr, "usage: convert MODEL|ADAPTER OUT [options], or convert --list FILE ...; "
                "see the top of convert.c\n");
        ok = 0;
    }
    dpo_close(c);
    return !ok;
}
