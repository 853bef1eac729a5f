#!/usr/bin/env python3
"""Write the small reference cases of this folder with diffusers, transformers, peft and PyTorch, in float32 on the CPU.

    pip install torch diffusers transformers peft safetensors
    python3 make.py OUT CLIP_MERGES.txt     CLIP's merges: of any tokenizer folder of Stable Diffusion; the first 700 are taken

OUT/pixels is a pipeline without a VAE, a model of pixels as diffdpo.h means it: three levels, two of them with attention,
two layers in one of them, three channels, v prediction on the cosine schedule, and a text encoder for a vocabulary of
1,214 entries.  Its files are named and laid out as build/parity reads them; inputs that are random are stored with them.
OUT/latents is a pipeline with a VAE: three levels, 4 pixels a latent, odd shapes.  What its VAE computes is computed in float64 and
rounded, with diffusers' tiles of 32 pixels too; its gradients are those of its inputs.
There too: what diffusers' pipelines make of a picture (img2img, inpaint), and of a schedule of zero terminal SNR (rescaled).
OUT/samplers: steps of schedulers, see check_samplers.
"""
import copy, json, math, os, sys
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = ["", "a photo of a cat", "A pile of sand swirling in the wind", "Héllo wörld! naïve café — 3.14% of 42's, don't & won't",
           "日本語のテキスト and emoji 🦊🔥", "  weird   spacing\t\nnewline ", "robot," * 60, "<|endoftext|> inside",
           "UPPER lower 1234567890 !!!???...", "it's they're we'll I'm", "ﬁ ligature ½ ² ™ \u00a0nbsp", "cafe\u0301 ΟΔΟΣ ٣٤ naïve"]
UNET = dict(sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16, 16), norm_num_groups=4,
            cross_attention_dim=16, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", steps_offset=0, prediction_type="v_prediction",
                timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True)
SMALL = dict(UNET, sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",),
             up_block_types=("CrossAttnUpBlock2D",))
VAE = dict(block_out_channels=(8, 12, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32, scaling_factor=0.18215,
           down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
OUT, MERGES = sys.argv[1], sys.argv[2]
CASE, PIPE = OUT + "/pixels", OUT + "/pixels/pipeline"
g = torch.Generator().manual_seed(7)


def save(name, **tensors):
    save_file({k: torch.as_tensor(v).detach().float().contiguous().clone() if torch.as_tensor(v).is_floating_point() else torch.as_tensor(v)
               for k, v in tensors.items()}, f"{CASE}/{name}.safetensors")


def dump(name, value):
    with open(f"{CASE}/{name}.json", "w", encoding="utf-8") as f: json.dump(value, f, ensure_ascii=False, indent=0)


def spread(module, dtype=None):
    """Random weights whose every parameter matters: norms and biases are not left at one and zero."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            r = torch.randn(p.shape, generator=g)
            p.copy_(r / math.sqrt(p[0].numel()) if p.ndim >= 2 else 1 + 0.1 * r if name.endswith("weight") else 0.1 * r)
            if dtype: p.copy_(p.to(dtype).float())
    return module.eval()


def make_tokenizer(count):
    merges = [l for l in open(MERGES, encoding="utf-8").read().split("\n") if l and not l.startswith("#version")][:count]
    units, n = {}, 0
    for b in list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256)): units[b] = chr(b)
    for b in range(256):
        if b not in units: units[b] = chr(256 + n); n += 1
    words = list(units.values()) + [u + "</w>" for u in units.values()] + ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    d = PIPE + "/tokenizer"
    os.makedirs(d, exist_ok=True)
    with open(d + "/vocab.json", "w", encoding="utf-8") as f: json.dump({w: i for i, w in enumerate(words)}, f, ensure_ascii=False)
    with open(d + "/merges.txt", "w", encoding="utf-8") as f: f.write("#version: 0.2\n" + "\n".join(merges) + "\n")
    with open(d + "/tokenizer_config.json", "w") as f: json.dump({"model_max_length": 24, "pad_token": "<|endoftext|>"}, f)
    return CLIPTokenizer(d + "/vocab.json", d + "/merges.txt", pad_token="<|endoftext|>", model_max_length=24)


def narrow(file, dtype): save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def make_pipeline(config=UNET, merges=700, schedule=SCHEDULE, vae=None):
    tok = make_tokenizer(merges)
    n = len(tok)
    text = spread(CLIPTextModel(CLIPTextConfig(vocab_size=n, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                                               max_position_embeddings=24, hidden_act="quick_gelu", projection_dim=16, bos_token_id=n - 2,
                                               eos_token_id=n - 1, pad_token_id=n - 1)), torch.float16)
    unet = spread(UNet2DConditionModel(**config), torch.float16 if vae else None)
    unet.save_pretrained(PIPE + "/unet"); text.save_pretrained(PIPE + "/text_encoder")
    narrow(PIPE + "/text_encoder/model.safetensors", torch.float16)
    if vae:
        vae.save_pretrained(PIPE + "/vae")
        narrow(PIPE + "/vae/diffusion_pytorch_model.safetensors", torch.bfloat16)
        narrow(PIPE + "/unet/diffusion_pytorch_model.safetensors", torch.float16)
    sched = DDIMScheduler(**schedule)
    sched.save_pretrained(PIPE + "/scheduler")
    with open(PIPE + "/model_index.json", "w") as f:
        json.dump({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
                   "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
                   **({"vae": ["diffusers", "AutoencoderKL"]} if vae else {})}, f, indent=1)
    return tok, text, unet, sched


def ids_of(tok, prompts): return tok(prompts, padding="max_length", truncation=True, max_length=24).input_ids


def check_networks(tok, text, unet):
    dump("tokens_1", {"prompts": PROMPTS, "ids": ids_of(tok, PROMPTS), "pad": tok.pad_token_id})
    ids = torch.tensor([ids_of(tok, PROMPTS)[i] for i in (0, 1, 3, 6, 7)])
    with torch.no_grad(): o = text(ids, output_hidden_states=True)
    save("text", **{"text1.ids": ids, "text1.last": o.last_hidden_state, "text1.penultimate": o.hidden_states[-2], "text1.pooled": o.pooler_output})
    x = torch.randn(2, 3, 16, 16, generator=g).requires_grad_(); t = torch.tensor([7, 913]); e = torch.randn(2, 24, 16, generator=g).requires_grad_()
    y = unet(x, t, e).sample
    dy = torch.randn(y.shape, generator=g); y.backward(dy)
    save("unet", x=x, t=t, emb=e, y=y, dy=dy, dx=x.grad, demb=e.grad, **{f"grad.{n}": p.grad for n, p in unet.named_parameters()})
    with torch.no_grad():
        xr = torch.randn(1, 3, 13, 21, generator=g)
        save("unet_oblong", x=xr, t=t[:1], emb=e[:1], y=unet(xr, t[:1], e[:1]).sample)
        xs = x[:1] * 1e-3
        save("unet_faint", x=xs, t=t[:1], emb=e[:1] * 1e-2, y=unet(xs, t[:1], e[:1] * 1e-2).sample)


def check_vae(vae):
    v = copy.deepcopy(vae).double().requires_grad_(False)
    def both(name, x, z, **more):
        q = v.encode(x).latent_dist
        save(name, image=x, mean=q.mean, logvar=q.logvar, latents=z, decoded=v.decode(z).sample, **more)
    def randn(*shape): return torch.randn(shape, generator=g).double()
    with torch.no_grad():
        x, z = torch.rand(2, 3, 16, 24, generator=g).double() * 2 - 1, randn(2, 4, 5, 3)
        both("vae", x, z)
        both("vae_small", x * 1e-3, z * 1e-3)
        v.enable_tiling()
        both("vae_tiled", torch.rand(1, 3, 72, 52, generator=g).double() * 2 - 1, randn(1, 4, 18, 13), tile=torch.tensor([32.0]))
        v.disable_tiling()
    x, z, dm, dl, dy = randn(1, 3, 16, 12).requires_grad_(), randn(1, 4, 4, 3).requires_grad_(), randn(1, 4, 4, 3), randn(1, 4, 4, 3), randn(1, 3, 16, 12)
    q = v.encode(x).latent_dist
    (q.mean * dm + q.logvar * dl).sum().backward()
    v.decode(z).sample.backward(dy)
    save("vae_gradients", image=x, latents=z, dmean=dm, dlogvar=dl, ddecoded=dy, dimage=x.grad, dlatents=z.grad)


def check_sample(tok, text, unet, sched, vae=None):
    sched.set_timesteps(5)
    with torch.no_grad():
        cond, empty = (text(torch.tensor(ids_of(tok, [p]))).last_hidden_state for p in (PROMPTS[1], ""))
        x = start = torch.randn(1, *((4, 6, 10) if vae else (3, 12, 20)), generator=g)
        after = {}
        for i, t in enumerate(sched.timesteps):
            u, c = unet(torch.cat([x, x]), t, torch.cat([empty, cond])).sample.chunk(2)
            after[f"latents_after{i}"] = x = sched.step(u + 3.0 * (c - u), t, x).prev_sample
        if vae: x = vae.decode(x / vae.config.scaling_factor).sample
    save("sample", latents=start, timesteps=sched.timesteps.float(), image=(x / 2 + 0.5).clamp(0, 1), **after)
    dump("sample", {"prompt": PROMPTS[1], "negative_prompt": "", "steps": 5, "guidance_scale": 3.0, "scheduler": "DDIMScheduler", "time_ids": None})


def check_training(acp, name, lr, rank):
    unet, pairs, beta = UNet2DConditionModel.from_pretrained(PIPE + "/unet"), 2, 100.0
    ref = copy.deepcopy(unet).requires_grad_(False)
    if rank:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        with torch.no_grad():
            for n, p in unet.named_parameters():
                if p.requires_grad: p.copy_(torch.randn(p.shape, generator=g) * (0.2 if "lora_A" in n else 0.02))
    named = [(n, p) for n, p in unet.named_parameters() if p.requires_grad]
    params, start = [p for _, p in named], {n: p.detach().clone() for n, p in named}
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=1e-2)
    draws, log, first = {}, [], {}
    unet.train()
    for k in range(4):
        d = {"x0": torch.randn(2 * pairs, 3, 8, 8, generator=g), "noise": torch.randn(pairs, 3, 8, 8, generator=g).repeat(2, 1, 1, 1),
             "t": torch.randint(0, len(acp), (pairs,), generator=g).repeat(2), "emb": torch.randn(pairs, 24, 16, generator=g).repeat(2, 1, 1)}
        a, s = acp[d["t"]].sqrt().view(-1, 1, 1, 1), (1 - acp[d["t"]]).sqrt().view(-1, 1, 1, 1)
        xt, target = a * d["x0"] + s * d["noise"], a * d["noise"] - s * d["x0"]
        d["pred"] = unet(xt, d["t"], d["emb"]).sample
        with torch.no_grad(): d["ref_pred"] = ref(xt, d["t"], d["emb"]).sample
        ml, rl = ((d[n] - target).pow(2).mean([1, 2, 3]) for n in ("pred", "ref_pred"))
        (mw, m2), (rw, r2) = ml.chunk(2), rl.chunk(2)
        inside = -0.5 * beta * ((mw - m2) - (rw - r2))
        loss = -F.logsigmoid(inside).mean()
        loss.backward()
        if k == 0: first = {n: float(p.grad.norm()) for n, p in named}
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step(); opt.zero_grad()
        draws.update({f"step{k}.{n}": v for n, v in d.items()})
        log.append({"loss": float(loss), "implicit_acc": float((inside > 0).float().mean()), "model_mse": float(ml.mean()), "ref_mse": float(rl.mean()),
                    "grad_norm": float(norm), "inside": inside.tolist()})
    save(name, **draws)
    if rank: save(name + "_start", **start); save(name + "_final", **dict(named))
    dump(name, {"beta": beta, "lr": lr, "optimizer": "adamw", "max_grad_norm": 1.0, "weight_decay": 1e-2, "prediction_type": "v_prediction", "lora_rank": rank or None,
                "lora_alpha": 2 * rank or None, "steps": log, "first_grad_norm_by_parameter": first,
                "moved_by_parameter": {n: float((p.detach() - start[n]).norm()) for n, p in named}})


# What a pipeline of diffusers makes of a picture: as the pipelines draw their noise and from whatever they start, both are
# stored.  The posterior's mean stands for its sample.
def check_pictures(tok, text, unet, vae):
    from diffusers import (DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
                           StableDiffusionPipeline)
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as a, pipeline_stable_diffusion_inpaint as b
    a.retrieve_latents = b.retrieve_latents = lambda q, generator=None, sample_mode=None: q.latent_dist.mode()
    H, W = 24, 40
    picture = torch.randint(0, 256, (1, 3, H, W), generator=g).float()
    mask = torch.zeros(1, 1, H, W); mask[:, :, 5:17, 9:30] = 255
    with torch.no_grad(): cond, empty = (text(torch.tensor(ids_of(tok, [p]))).last_hidden_state for p in (PROMPTS[1], ""))
    def run(name, pipe, scheduler, steps, inputs=(), **settings):
        p = pipe(vae=vae, text_encoder=text, tokenizer=tok, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                 requires_safety_checker=False)
        p.set_progress_bar_config(disable=True)
        noise, after, more = torch.randn(1, 4, H // 4, W // 4, generator=torch.Generator().manual_seed(5)), {}, {}
        if "image" in inputs: more["image"] = picture / 255
        if "mask" in inputs: more["mask_image"] = mask / 255
        if pipe is StableDiffusionPipeline: more["latents"] = noise
        if pipe is not StableDiffusionImg2ImgPipeline: more.update(height=H, width=W)
        def keep(pipe, i, t, values): after[f"latents_after{i}"] = values["latents"].clone(); return values
        out = p(prompt_embeds=cond, negative_prompt_embeds=empty, num_inference_steps=steps, guidance_scale=3.0, output_type="pt",
                generator=torch.Generator().manual_seed(5), callback_on_step_end=keep, **more, **settings).images
        save(name, latents=noise, image=out, **after, **({"picture": picture} if "image" in inputs else {}), **({"mask": mask} if "mask" in inputs else {}))
        dump(name, {"prompt": PROMPTS[1], "negative_prompt": "", "steps": steps, "guidance_scale": 3.0, "time_ids": None, "taken": len(after),
                    "scheduler": type(scheduler).__name__, "config": {k: v for k, v in scheduler.config.items() if not k.startswith("_") and v != -math.inf},
                    **settings})
    base = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, prediction_type="v_prediction")
    run("img2img", StableDiffusionImg2ImgPipeline, DPMSolverMultistepScheduler(**base, use_karras_sigmas=True), 10, ["image"], strength=0.55)
    run("img2img_all", StableDiffusionImg2ImgPipeline, EulerDiscreteScheduler(**base, timestep_spacing="leading"), 4, ["image"], strength=1.0)
    run("inpaint", StableDiffusionInpaintPipeline, EulerDiscreteScheduler(**base, use_karras_sigmas=True), 5, ["image", "mask"], strength=1.0)
    run("inpaint_some", StableDiffusionInpaintPipeline, DDIMScheduler(**base, clip_sample=False), 6, ["image", "mask"], strength=0.7)
    run("rescaled", StableDiffusionPipeline, DDIMScheduler(**base, timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False), 4,
        guidance_rescale=0.7)



# Every sampler with settings that tests elsewhere leave at their defaults, on the stand-in model eps(x, t) = 0.3 x + 0.1 sin(t/100); with a
# strength, from a picture as img2img starts.  Only what differs from a class's defaults is written down.
def check_samplers():
    import inspect
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler as DPM, EulerAncestralDiscreteScheduler as EulerA, EulerDiscreteScheduler as Euler
    sd, v, cos = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), dict(prediction_type="v_prediction"), dict(beta_schedule="squaredcos_cap_v2")
    zero, karras, least = dict(v, rescale_betas_zero_snr=True), dict(use_karras_sigmas=True), dict(final_sigmas_type="sigma_min")
    lead, trail, lin = (dict(timestep_spacing=s) for s in ("leading", "trailing", "linspace"))
    cases, data = [], {}
    def run(kind, steps, strength, eta, *settings):
        c = {k: x for d in settings for k, x in d.items()}
        s, first, name = kind(**c), 0, f"{len(cases)}.{kind.__name__}"
        s.set_timesteps(steps)
        if strength: first = steps - int(steps * strength)
        if hasattr(s, "set_begin_index"): s.set_begin_index(first)
        times, x = s.timesteps[first:], torch.randn(1, 2, 2, 2, generator=g)
        if strength:
            data[name + ".known"], data[name + ".start_noise"] = torch.randn(1, 2, 2, 2, generator=g), x
            x = s.add_noise(data[name + ".known"], x, times[:1])
        else: x = x * s.init_noise_sigma
        data[name + ".x_init"], data[name + ".timesteps"] = x, times.float()
        noisy = eta or kind in (DDPMScheduler, EulerA) or "sde" in c.get("algorithm_type", "")
        for i, t in enumerate(times):
            more = {"generator": torch.Generator().manual_seed(1000 + i)} if noisy else {}
            if noisy: data[f"{name}.noise{i}"] = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(1000 + i))
            x = s.step(0.3 * s.scale_model_input(x, t) + 0.1 * math.sin(float(t) / 100), t, x, **more, **({"eta": eta} if eta else {})).prev_sample
            data[f"{name}.x{i}"] = x
        usual = {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items()}
        cases.append({"name": name, "class": kind.__name__, "steps": steps, "strength": strength, "config": {k: x for k, x in c.items() if x != usual[k]},
                      "step": {"eta": eta}})
    run(DDIMScheduler, 8, 0.75, 0.5, sd, trail, dict(clip_sample=False)); run(DDIMScheduler, 3, 0, 0, cos, v, lin); run(DDIMScheduler, 6, 0, 1.0, zero, trail, sd)
    run(DDPMScheduler, 5, 0, 0, sd, v, trail, dict(variance_type="fixed_large")); run(DDPMScheduler, 7, 0.5, 0, sd, lin, dict(clip_sample=False))
    run(Euler, 5, 0, 0, sd, v, lead, karras, least, dict(steps_offset=1)); run(Euler, 4, 0, 0, sd, zero, lead); run(Euler, 10, 0.6, 0, sd, karras)
    run(Euler, 4, 0, 0, sd, v, dict(timestep_type="continuous")); run(EulerA, 4, 0, 0, sd, zero, lead); run(EulerA, 10, 0.7, 0, sd, trail)
    run(DPM, 4, 0, 0, sd, lead, dict(steps_offset=3)); run(DPM, 5, 0, 0, sd, v, trail, least); run(DPM, 16, 0.4, 0, sd, lin, least, dict(solver_type="heun"))
    run(DPM, 4, 0, 0, sd, least, dict(lower_order_final=False)); run(DPM, 16, 0.4, 0, sd, least, dict(euler_at_final=True)); run(DPM, 4, 0, 0, sd, dict(solver_order=1))
    run(DPM, 5, 0, 0, cos, v, karras, dict(num_train_timesteps=200)); run(DPM, 5, 0, 0, cos, v, dict(lambda_min_clipped=-5.1)); run(DPM, 4, 0, 0, sd, zero, trail)
    sde = dict(algorithm_type="sde-dpmsolver++")
    run(DPM, 5, 0, 0, sd, sde); run(DPM, 9, 0.7, 0, sd, v, sde, karras, dict(solver_type="heun")); run(DPM, 3, 0, 0, sd, sde, least, dict(solver_order=1))
    os.makedirs(CASE, exist_ok=True)
    save("samplers", **data); dump("samplers", {"cases": cases})

torch.set_num_threads(1)
tok, text, unet, sched = make_pipeline()
check_networks(tok, text, unet)
check_sample(tok, text, unet, sched)
check_training(sched.alphas_cumprod, "train_adamw", 1e-4, 0)
check_training(sched.alphas_cumprod, "train_lora", 1e-3, 4)

CASE, PIPE = OUT + "/latents", OUT + "/latents/pipeline"
vae = spread(AutoencoderKL(**VAE), torch.bfloat16)
tok, text, unet, sched = make_pipeline(SMALL, 100, dict(SCHEDULE, clip_sample=False), vae)
check_vae(vae)
check_sample(tok, text, unet, sched, vae)
check_pictures(tok, text, unet, vae)

CASE = OUT + "/samplers"
check_samplers()
