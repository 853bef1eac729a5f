/* train_options.h - the part of train.c that reads the command line: settings; one table of options, which drives
   parsing, --help, the settings that checkpoints carry and those that report.html shows; presets. */

enum { PROMPTS = 64 };                  /* --validation_prompts */

/* Everything that the command line can say, in the order of the table below. */
typedef struct {
    const char *preset, *model, *vae, *tokenizer, *prediction, *lora;
    const char *data, *held_data, *out, *cache;
    double      held_share;
    int         check_data, random_crop, no_hflip, apart, buckets, bucket_step, real_sizes;
    const char *resolution;
    int         batch, accumulation, steps, epochs;
    double      lr, lr_cycles, lr_power;
    int         scale_lr, schedule, warmup;
    int         objective, sft, kind, convention;
    double      beta, smoothing, snr_gamma, safeguard, desirable, undesirable, positive;
    int         rank;
    double      alpha;
    const char *targets;
    int         optimizer, adafactor, adam8;
    double      beta1, beta2, eps, decay, max_norm, ema_decay;
    int         ema, precision, checkpointing;
    int64_t     seed;
    double      empty, noise_offset, perturbation, bias;
    int         levels, t_limit, zero_snr;
    int         save_every, keep;
    const char *resume;
    int         held_every, images_every, stop_degrading;
    const char *prompts[PROMPTS];
    int         prompt_count, images, sample_steps, naming;
    double      guidance, limit;
    int         drop, keep_encoders, no_ahead, no_estimate, estimate, threads, isa, device;
    const char *ignored[16];
    int         ignored_count;
} settings;

/* ---- Options ---------------------------------------------------------------------------------------------------- */

/* type: s text, i whole number, l 64 bits of it, f number, b flag, c one of the names in `help` up to the first blank,
   p prompts, x a flag and X a value that have no meaning here.  keep: 1 if a checkpoint of another value may be
   resumed. */
typedef struct { const char *name; char type; size_t at; double low, high; int keep; const char *help; } option;
#define O(field) offsetof(settings, field)
static const option options[] = {
    { "preset", 's', O(preset), 0, 0, 1,
      "settings of a published run: official-sd15 official-sdxl official-turbo lora-sd15 lora-sdxl diffusers small" },
    { "pretrained_model_name_or_path", 's', O(model), 0, 0, 1,
      "model: a folder as diffusers writes it, or a .safetensors file" },
    { "pretrained_vae_model_name_or_path", 's', O(vae), 0, 0, 0, "folder of another VAE, in place of the model's own" },
    { "tokenizer", 's', O(tokenizer), 0, 0, 1, "folder with CLIP's vocab.json and merges.txt, for single files" },
    { "prediction_type", 's', O(prediction), 0, 0, 0, "epsilon or v_prediction, against what the file says" },
    { "lora", 's', O(lora), 0, 0, 1, "an adapter to start from" },
    { "train_data_dir", 's', O(data), 0, 0, 1, "pairs: a manifest or a folder with w/ and l/" },
    { "validation_data_dir", 's', O(held_data), 0, 0, 1, "pairs to measure on" },
    { "validation_pairs", 'f', O(held_share), 0, 0.9, 0, "share of prompts whose pairs are held out to measure on" },
    { "check_data", 'b', O(check_data), 0, 0, 1, "read all rows and pictures, report what is wrong, and stop" },
    { "output_dir", 's', O(out), 0, 0, 1, "folder for what is written" },
    { "cache_dir", 's', O(cache), 0, 0, 1,
      "folder for latents, texts and reference errors; none: memory alone; default OUT/cache" },
    { "resolution", 's', O(resolution), 0, 0, 0, "pixels: 512 or 640x384; default: the model's" },
    { "random_crop", 'b', O(random_crop), 0, 0, 0, "crop anywhere, not the centre; both pictures of a pair alike" },
    { "no_hflip", 'b', O(no_hflip), 0, 0, 0, "mirror no pairs" },
    { "separate_views", 'b', O(apart), 0, 0, 0, "crop and mirror the two pictures each by itself, as the authors do" },
    { "enable_bucket", 'b', O(buckets), 0, 0, 0, "aspect-ratio buckets" },
    { "bucket_reso_steps", 'i', O(bucket_step), 8, 512, 0, "their step" },
    { "original_sizes", 'b', O(real_sizes), 0, 0, 0,
      "SDXL is told the pictures' own sizes and crops, as diffusers does" },
    { "train_batch_size", 'i', O(batch), 1, 4096, 0, "pairs that go through the network at once" },
    { "gradient_accumulation_steps", 'i', O(accumulation), 1, 262144, 0, "batches a step" },
    { "max_train_steps", 'i', O(steps), 0, 2147483647, 1, "steps" },
    { "num_train_epochs", 'i', O(epochs), 0, 1000000, 1, "passes over the pairs, in place of max_train_steps" },
    { "learning_rate", 'f', O(lr), 0, 1000, 0, "learning rate" },
    { "scale_lr", 'b', O(scale_lr), 0, 0, 0, "multiply it by the pairs of a step" },
    { "lr_scheduler", 'c', O(schedule), 0, 0, 0,
      "constant|linear|cosine|cosine_with_restarts|polynomial|constant_with_warmup  how it goes on" },
    { "lr_warmup_steps", 'i', O(warmup), 0, 1000000, 0, "steps over which it rises" },
    { "lr_num_cycles", 'f', O(lr_cycles), 0, 1000, 0, "of cosine_with_restarts" },
    { "lr_power", 'f', O(lr_power), 0, 100, 0, "of polynomial" },
    { "objective", 'c', O(objective), 0, 0, 0, "dpo|sft|kto|mapo  what is made small" },
    { "sft", 'b', O(sft), 0, 0, 0, "--objective sft" },
    { "loss_type", 'c', O(kind), 0, 0, 0, "sigmoid|hinge|ipo  the form of dpo" },
    { "beta_dpo", 'f', O(beta), 0, 1e9, 0, "price of leaving the reference: dpo 5000, kto 1000; mapo's lambda 0.1" },
    { "beta_convention", 'c', O(convention), 0, 0, 0,
      "authors|diffusers  diffusers' script for SD leaves out the half: its 2500 is the authors' 5000" },
    { "label_smoothing", 'f', O(smoothing), 0, 0.4999, 0, "probability that a label is wrong" },
    { "snr_gamma", 'f', O(snr_gamma), 0, 1000, 0, "min-SNR weights for sft; 5 is usual" },
    { "sdpo_mu", 'f', O(safeguard), 0, 1, 0,
      "the winner's safeguard of Diffusion-SDPO; 0.9 for SD1.5, 0.6 for SDXL; 0: off" },
    { "desirable_weight", 'f', O(desirable), 0, 1e5, 0, "kto: of pictures that were liked; default 1" },
    { "undesirable_weight", 'f', O(undesirable), 0, 1e5, 0, "kto: of pictures that were not; default 1" },
    { "positive_ratio", 'f', O(positive), 0, 0.999, 0,
      "kto: share of liked pictures in what is drawn; default: as many as there are" },
    { "rank", 'i', O(rank), 0, 4096, 0, "of the adapters; 0: train all weights" },
    { "lora_alpha", 'f', O(alpha), 0, 1e6, 0, "default: rank" },
    { "lora_target_modules", 's', O(targets), 0, 0, 0, "endings of layer names, separated by commas" },
    { "optimizer", 'c', O(optimizer), 0, 0, 0, "adamw|adafactor|adamw8bit  what moves the weights" },
    { "use_adafactor", 'b', O(adafactor), 0, 0, 0, "--optimizer adafactor" },
    { "use_8bit_adam", 'b', O(adam8), 0, 0, 0, "--optimizer adamw8bit" },
    { "adam_beta1", 'f', O(beta1), 0, 1, 0, "" }, { "adam_beta2", 'f', O(beta2), 0, 1, 0, "" },
    { "adam_epsilon", 'f', O(eps), 0, 1, 0, "" },
    { "adam_weight_decay", 'f', O(decay), 0, 10, 0, "of all optimizers" },
    { "max_grad_norm", 'f', O(max_norm), 0, 1e9, 0, "longer gradients are cut to it; 0: never" },
    { "use_ema", 'b', O(ema), 0, 0, 0, "save a moving average of the weights" },
    { "ema_decay", 'f', O(ema_decay), 0, 0.99999999, 0, "" },
    { "mixed_precision", 'c', O(precision), 0, 0, 0,
      "no|bf16|fp16  bf16: frozen weights and the factors of products are rounded to it; fp16: the same" },
    { "gradient_checkpointing", 'b', O(checkpointing), 0, 0, 0, "less memory, a third more time" },
    { "seed", 'l', O(seed), 0, 9e15, 0, "of everything" },
    { "proportion_empty_prompts", 'f', O(empty), 0, 1, 0, "share of captions that are left out" },
    { "noise_offset", 'f', O(noise_offset), 0, 99, 0,
      "" }, { "input_perturbation", 'f', O(perturbation), 0, 99, 0, "" },
    { "timestep_bias", 'f', O(bias), -0.99, 100, 0, "timesteps are drawn in proportion to t^b" },
    { "timestep_levels", 'i', O(levels), 0, 1000, 0, "only that many timesteps, evenly; SDXL Turbo: 4" },
    { "timestep_limit", 'i', O(t_limit), 0, 1000, 0, "only timesteps below it; SDXL's refiner: 200" },
    { "zero_terminal_snr", 'b', O(zero_snr), 0, 0, 0, "rescale the schedule to end in pure noise" },
    { "checkpointing_steps", 'i', O(save_every), 0, 2147483647, 1,
      "steps from checkpoint to checkpoint; 0: only at the end" },
    { "checkpoints_total_limit", 'i', O(keep), 0, 100000, 1, "checkpoints to keep; 0: all" },
    { "resume_from_checkpoint", 's', O(resume), 0, 0, 1, "latest, or a checkpoint's folder" },
    { "validation_steps", 'i', O(held_every), 0, 2147483647, 1, "steps between two measurements on held-out pairs" },
    { "image_steps", 'i', O(images_every), 0, 2147483647, 1,
      "steps between two rounds of sample pictures; default: validation_steps" },
    { "stop_when_degrading", 'b', O(stop_degrading), 0, 0, 1,
      "end the run when both errors have risen past the limit" },
    { "degrading_limit", 'f', O(limit), 0, 100, 1, "0.1: both errors a tenth above the reference's; 0: never warn" },
    { "validation_prompts", 'p', 0, 0, 0, 1, "prompts to draw, one argument each" },
    { "validation_prompt", 'p', 0, 0, 0, 1, "the same" },
    { "num_validation_images", 'i', O(images), 1, 64, 1, "pictures a prompt" },
    { "validation_sampler_steps", 'i', O(sample_steps), 1, 1000, 1, "steps of the sampler" },
    { "guidance_scale", 'f', O(guidance), 0, 100, 1, "of these pictures" },
    { "adapter_format", 'c', O(naming), 0, 0, 1, "kohya|peft  names in the adapter's file" },
    { "drop_encoders", 'b', O(drop), 0, 0, 1,
      "stop if the caches have no room for all texts and pictures, so that text encoders and VAE can leave memory" },
    { "keep_encoders", 'b', O(keep_encoders), 0, 0, 1,
      "encode what is new at each step, not all before the first one: text encoders and VAE stay in memory" },
    { "no_reference_ahead", 'b', O(no_ahead), 0, 0, 1,
      "all weights: keep a second model, not its errors computed ahead" },
    { "no_estimate", 'b', O(no_estimate), 0, 0, 1, "do not work out the memory of a step before it" },
    { "estimate", 'b', O(estimate), 0, 0, 1, "say what the run would do and take, and stop" },
    { "threads", 'i', O(threads), 0, 1024, 1, "0: all cores" },
    { "isa", 'c', O(isa), 0, 0, 1, "best|plain|avx2|avx512|amx  instructions that may be used" },
    { "device", 'c', O(device), 0, 0, 1, "cpu|cuda  cuda: in builds with diffdpo_cuda.cu" },
    { "enable_xformers_memory_efficient_attention", 'x', 0, 0, 0, 1, "" }, { "allow_tf32", 'x', 0, 0, 0, 1, "" },
    { "set_grads_to_none", 'x', 0, 0, 0, 1, "" }, { "push_to_hub", 'x', 0, 0, 0, 1, "" },
    { "dataloader_num_workers", 'X', 0, 0, 0, 1, "" }, { "report_to", 'X', 0, 0, 0, 1, "" },
    { "logging_dir", 'X', 0, 0, 0, 1, "" }, { "tracker_project_name", 'X', 0, 0, 0, 1, "" },
    { "tracker_name", 'X', 0, 0, 0, 1, "" }, { "sdxl", 'x', 0, 0, 0, 1, "" }, { "hard_skip_resume", 'x', 0, 0, 0, 1, "" },
    { "local_rank", 'X', 0, 0, 0, 1, "" }, { "variant", 'X', 0, 0, 0, 1, "" }, { "revision", 'X', 0, 0, 0, 1, "" },
    { "vae_encode_batch_size", 'X', 0, 0, 0, 1, "" }, { "hub_model_id", 'X', 0, 0, 0, 1, "" },
    { "hub_token", 'X', 0, 0, 0, 1, "" }, { "center_crop", 'x', 0, 0, 0, 1, "" },
};
enum { OPTIONS = sizeof options / sizeof *options };

static int     *int_of (settings *s, const option *o) { return (int *)(void *)((char *)s + o->at); }
static double  *real_of(settings *s, const option *o) { return (double *)(void *)((char *)s + o->at); }
static const char **text_of(settings *s, const option *o) { return (const char **)(void *)((char *)s + o->at); }
static int64_t *long_of(settings *s, const option *o) { return (int64_t *)(void *)((char *)s + o->at); }

/* Letters that must change to make a of b: Levenshtein's distance, on names of up to 63 letters. */
static int distance(const char *a, const char *b)
{
    int row[64], n = (int)strlen(b);
    if (n > 63) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; a[i]; i++) {
        int corner = row[0]++;
        for (int j = 1; j <= n; j++) {
            int change = corner + (a[i] != b[j - 1]), least = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            corner = row[j];
            row[j] = change < least ? change : least;
        }
    }
    return row[n];
}

/* `name` with _ for -; NULL and a message with the nearest name for an unknown one. */
static const option *find_option(const char *name)
{
    const option *best = NULL;
    for (int i = 0; i < OPTIONS; i++) {
        if (!strcmp(name, options[i].name)) return &options[i];
        if (!best || distance(name, options[i].name) < distance(name, best->name)) best = &options[i];
    }
    fail("unknown option --%.60s; did you mean --%s?", name, best->name);
    return NULL;
}

/* Which of the names in a choice's help `text` is, or -1. */
static int choice_of(const option *o, const char *text)
{
    const char *p = o->help;
    size_t      n = strlen(text);
    for (int k = 0; ; k++) {
        size_t length = strcspn(p, "| ");
        if (length == n && !memcmp(p, text, n)) return k;
        if (p[length] != '|') return -1;
        p += length + 1;
    }
}

static void ignore_option(settings *s, const option *o)
{
    if (s->ignored_count < (int)(sizeof s->ignored / sizeof *s->ignored)) s->ignored[s->ignored_count++] = o->name;
}

/* One value into its place. */
static int set_option(settings *s, const option *o, const char *value)
{
    char  *end = NULL;
    double x;
    int    k;
    switch (o->type) {
    case 's': *text_of(s, o) = value; return 1;
    case 'p':
        if (s->prompt_count == PROMPTS) return fail("more than %d validation prompts", (int)PROMPTS);
        s->prompts[s->prompt_count++] = value;
        return 1;
    case 'c':
        if ((k = choice_of(o, value)) < 0)
            return fail("--%s wants one of %.*s, not %.60s", o->name, (int)strcspn(o->help, " "), o->help, value);
        *int_of(s, o) = k;
        return 1;
    case 'X': ignore_option(s, o); return 1;
    default:
        x = strtod(value, &end);
        if (end == value || *end || !(x >= o->low && x <= o->high) || (o->type != 'f' && x != floor(x)))
            return fail("--%s wants a %s from %g to %g, not %.60s", o->name, o->type == 'f' ? "number" : "whole number",
                        o->low, o->high, value);
        if (o->type == 'f') *real_of(s, o) = x;
        else if (o->type == 'l') *long_of(s, o) = (int64_t)x;
        else *int_of(s, o) = (int)x;
        return 1;
    }
}

/* --name value, --name=value, --flag.  only: this name alone is looked at. */
static int read_options(settings *s, int argc, char **argv, const char *only)
{
    for (int i = 1; i < argc; i++) {
        char          name[64];
        const char   *arg = argv[i], *equals = strchr(arg, '=');
        size_t        n = equals ? (size_t)(equals - arg) : strlen(arg);
        const option *o;
        if (strncmp(arg, "--", 2) || n > sizeof name + 1) return fail("not an option: %.60s; see --help", arg);
        for (size_t k = 2; k <= n; k++) name[k - 2] = k == n ? 0 : arg[k] == '-' ? '_' : arg[k];
        if (!(o = find_option(name))) return 0;
        if (o->type == 'b' || o->type == 'x') {
            if (equals) return fail("--%s is a flag: it takes no value", o->name);
            if (o->type == 'x' && !only) ignore_option(s, o);
            else if (!only) *int_of(s, o) = 1;
            continue;
        }
        if (!equals && (i + 1 >= argc || !strncmp(argv[i + 1], "--", 2))) return fail("--%s wants a value", o->name);
        if ((!only || !strcmp(only, o->name)) && !set_option(s, o, equals ? equals + 1 : argv[i + 1])) return 0;
        i += !equals;
        for (; o->type == 'p' && !equals && i + 1 < argc && strncmp(argv[i + 1], "--", 2); i++)
            if (!only && !set_option(s, o, argv[i + 1])) return 0;
    }
    return 1;
}

/* A setting as text. */
static void option_text(const settings *s, const option *o, char *out, size_t size)
{
    settings   *w = (settings *)(uintptr_t)s;
    const char *p = o->help;
    out[0] = 0;
    if (o->type == 's') snprintf(out, size, "%s", *text_of(w, o) ? *text_of(w, o) : "");
    if (o->type == 'i' || o->type == 'b') snprintf(out, size, "%d", *int_of(w, o));
    if (o->type == 'l') snprintf(out, size, "%lld", (long long)*long_of(w, o));
    if (o->type == 'f') snprintf(out, size, "%.9g", *real_of(w, o));
    if (o->type != 'c') return;
    for (int k = *int_of(w, o); k > 0 && p[strcspn(p, "| ")] == '|'; k--) p += strcspn(p, "|") + 1;
    snprintf(out, size, "%.*s", (int)strcspn(p, "| "), p);
}

static void help(const settings *s)
{
    char text[128];
    printf("usage: train --pretrained_model_name_or_path MODEL --train_data_dir PAIRS --output_dir OUT [options]\n\n");
    for (int i = 0; i < OPTIONS; i++) {
        const option *o = &options[i];
        const char   *words = o->type == 'c' ? o->help + strcspn(o->help, " ") : o->help;
        if (o->type == 'x' || o->type == 'X') continue;
        option_text(s, o, text, sizeof text);
        printf("  --%s%s", o->name, o->type == 'b' ? "" : " ");
        if (o->type == 'c') printf("%.*s", (int)strcspn(o->help, " "), o->help);
        else if (o->type != 'b') fputs(o->type == 's' ? "TEXT" : o->type == 'p' ? "TEXT ..." : "N", stdout);
        while (*words == ' ') words++;
        if (*words) printf("\n        %s", words);
        if (text[0] && o->type != 'b') printf("%s[%s]", *words ? "  " : "\n        ", text);
        fputc('\n', stdout);
    }
}

/* ---- Presets ---------------------------------------------------------------------------------------------------- */

static settings defaults(void)
{
    settings s;
    memset(&s, 0, sizeof s);
    s.bucket_step = 64;
    s.batch = s.accumulation = 1;
    s.steps = 1000;
    s.lr = 1e-5;
    s.lr_cycles = s.lr_power = 1;
    s.rank = 16;
    s.beta1 = 0.9;
    s.beta2 = 0.999;
    s.eps = 1e-8;
    s.decay = 1e-2;
    s.max_norm = 1;
    s.ema_decay = 0.9999;
    s.empty = 0.1;
    s.limit = 0.1;
    s.images = 1;
    s.sample_steps = 20;
    s.guidance = 7.5;
    s.save_every = 500;
    s.held_every = 100;
    return s;
}

/* A recipe of the library in the words of the command line. */
static void from_recipe(settings *s, const dpo_train_desc *d, const char *resolution)
{
    s->steps = (int)d->steps;
    s->batch = d->batch;
    s->accumulation = d->accumulation;
    s->lr = (double)(int64_t)(d->lr * 1e12 + 0.5) / 1e12;    /* as it was written, not as a float has it */
    s->schedule = d->lr_schedule;
    s->warmup = (int)d->warmup;
    s->beta = d->beta;
    s->rank = d->rank;
    s->optimizer = d->optimizer;
    s->decay = d->optimizer == DPO_ADAFACTOR ? d->adafactor.weight_decay : d->adamw.weight_decay;
    s->decay = (double)(int64_t)(s->decay * 1e9 + 0.5) / 1e9;
    s->empty = (double)(int64_t)(d->empty_prompts * 1e6 + 0.5) / 1e6;
    s->levels = d->levels;
    s->zero_snr = d->zero_snr;
    s->real_sizes = d->real_sizes;
    s->no_hflip = !d->flip;
    s->resolution = resolution;
}

static int apply_preset(settings *s)
{
    dpo_train_desc d;
    const char    *name = s->preset;
    if (!strcmp(name, "official-sd15"))       { d = dpo_recipe_official_sd15();  from_recipe(s, &d, "512"); }
    else if (!strcmp(name, "official-sdxl"))  { d = dpo_recipe_official_sdxl();  from_recipe(s, &d, "1024"); }
    else if (!strcmp(name, "official-turbo")) { d = dpo_recipe_official_turbo(); from_recipe(s, &d, "512"); }
    else if (!strcmp(name, "lora-sd15"))      { d = dpo_recipe_lora_sd15();      from_recipe(s, &d, "512"); }
    else if (!strcmp(name, "lora-sdxl"))      { d = dpo_recipe_lora_sdxl();      from_recipe(s, &d, "1024"); }
    else if (!strcmp(name, "small"))          { d = dpo_recipe_small();          from_recipe(s, &d, NULL);
                                                s->guidance = 2; }
    else if (!strcmp(name, "diffusers")) {      /* the defaults of train_diffusion_dpo.py, not of its README */
        d = dpo_recipe_lora_sd15();
        from_recipe(s, &d, "512");
        s->batch = 4;
        s->accumulation = 1;
        s->lr = 5e-4;
        s->beta = 2500;
        s->convention = 1;
    } else return fail("there is no preset %.40s: %s", name, strchr(options[0].help, ':') + 2);
    if (!strncmp(name, "official", 8)) {      /* 2048 pairs a step: 16 GPUs of 128, and a learning rate for one pair */
        s->lr = 1e-8;
        s->scale_lr = 1;
    }
    return 1;
}
