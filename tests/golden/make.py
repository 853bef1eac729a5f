#!/usr/bin/env python3
"""Write the small reference cases of this folder with diffusers, transformers, peft and PyTorch, in float32 on the CPU.

    pip install torch diffusers transformers peft safetensors
    python3 make.py OUT CLIP_MERGES.txt     CLIP's merges: of any tokenizer folder of Stable Diffusion; the first 700 are taken

OUT/pixels is a pipeline without a VAE, a model of pixels as diffdpo.h means it: three levels, two of them with attention,
two layers in one of them, three channels, v prediction on the cosine schedule, and a text encoder for a vocabulary of
1,214 entries.  Its files are named and laid out as build/parity reads them; inputs that are random are stored with them.
"""
import copy, json, math, os, sys
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
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


def make_tokenizer():
    merges = [l for l in open(MERGES, encoding="utf-8").read().split("\n") if l and not l.startswith("#version")][:700]
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


def make_pipeline():
    tok = make_tokenizer()
    n = len(tok)
    text = spread(CLIPTextModel(CLIPTextConfig(vocab_size=n, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                                               max_position_embeddings=24, hidden_act="quick_gelu", projection_dim=16, bos_token_id=n - 2,
                                               eos_token_id=n - 1, pad_token_id=n - 1)), torch.float16)
    unet = spread(UNet2DConditionModel(**UNET))
    unet.save_pretrained(PIPE + "/unet"); text.save_pretrained(PIPE + "/text_encoder")
    f = PIPE + "/text_encoder/model.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(f).items()}, f, metadata={"format": "pt"})
    sched = DDIMScheduler(**SCHEDULE)
    sched.save_pretrained(PIPE + "/scheduler")
    with open(PIPE + "/model_index.json", "w") as f:
        json.dump({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
                   "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"]}, f, indent=1)
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


def check_sample(tok, text, unet, sched):
    sched.set_timesteps(5)
    with torch.no_grad():
        cond, empty = (text(torch.tensor(ids_of(tok, [p]))).last_hidden_state for p in (PROMPTS[1], ""))
        x = start = torch.randn(1, 3, 12, 20, generator=g)
        after = {}
        for i, t in enumerate(sched.timesteps):
            u, c = unet(torch.cat([x, x]), t, torch.cat([empty, cond])).sample.chunk(2)
            after[f"latents_after{i}"] = x = sched.step(u + 3.0 * (c - u), t, x).prev_sample
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


torch.set_num_threads(1)
tok, text, unet, sched = make_pipeline()
check_networks(tok, text, unet)
check_sample(tok, text, unet, sched)
check_training(sched.alphas_cumprod, "train_adamw", 1e-4, 0)
check_training(sched.alphas_cumprod, "train_lora", 1e-3, 4)
