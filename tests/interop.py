#!/usr/bin/env python3
"""The Python side of interop.sh: do diffusers, transformers and peft read what the project writes, and the other way round?

    python3 tests/interop.py WORK        with build/interop and build/convert built

For each family a tiny pipeline with random weights is made by diffusers, converted by build/convert, read back by
diffusers' own single-file loader, and run on both sides; adapters travel both ways, in both namings.
"""
import json, os, shutil, subprocess, sys, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
import torch
import diffusers, transformers, peft
from diffusers import (AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

diffusers.utils.logging.set_verbosity_error()
work = sys.argv[1]
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("FAIL", what)


def close(what, a, b, tolerance=1e-3):
    e = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if a.shape == b.shape else float("nan")
    print(f"{what:64s} {e:.1e}")
    check(e <= tolerance, f"{what}: {e:.2e}")


def c(*args):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    check(r.returncode == 0, f"{' '.join(map(str, args))}: {r.stderr.strip()}")
    return r


def spread(module, seed):
    """Random weights whose every parameter matters; values that F16 holds exactly."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** .5)
            else:
                p.copy_((1 if name.endswith("weight") else 0) + 0.1 * torch.randn(p.shape, generator=g))
            p.copy_(p.half().float())
    return module.eval()


# ---- tiny pipelines -------------------------------------------------------------------------------------------------

def tokenizer(folder, pad):
    """256 bytes inside a word, 256 that end one, no merges."""
    byte = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    units = [chr(b) for b in byte] + [chr(256 + k) for k in range(256 - len(byte))]
    words = units + [u + "</w>" for u in units] + ["<|startoftext|>", "<|endoftext|>"]
    os.makedirs(folder, exist_ok=True)
    json.dump({w: i for i, w in enumerate(words)}, open(folder + "/vocab.json", "w", encoding="utf-8"), ensure_ascii=False)
    open(folder + "/merges.txt", "w").write("#version: 0.2\n")
    return CLIPTokenizer(vocab_file=folder + "/vocab.json", merges_file=folder + "/merges.txt", pad_token=pad, model_max_length=77) \
        if not hasattr(CLIPTokenizer, "from_pretrained") else CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def text(width, act, seed, projection=None):
    k = CLIPTextConfig(vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
                       max_position_embeddings=77, hidden_act=act, projection_dim=projection or width, bos_token_id=512,
                       eos_token_id=513, pad_token_id=513)
    return spread((CLIPTextModelWithProjection if projection else CLIPTextModel)(k), seed)


def unet(down, context, seed, heads, depth=1, linear=False, added=None, layers=2, channels=(16, 32, 32)):
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": added} if added else {}
    kind = {"C": "CrossAttn", "D": ""}
    return spread(UNet2DConditionModel(
        sample_size=8, block_out_channels=channels, layers_per_block=layers, norm_num_groups=8, cross_attention_dim=context,
        down_block_types=[kind[d] + "DownBlock2D" for d in down], up_block_types=[kind[d] + "UpBlock2D" for d in reversed(down)],
        attention_head_dim=heads, transformer_layers_per_block=depth, use_linear_projection=linear, **more), seed)


def vae(scale):
    return spread(AutoencoderKL(block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4, latent_channels=4, scaling_factor=scale,
                                down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3), 9)


def make(name, folder):
    sd = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    tok = lambda k, pad="<|endoftext|>": tokenizer(f"{work}/{name}-{k}", pad)
    ddim = lambda kind: DDIMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, prediction_type=kind, clip_sample=False,
                                      set_alpha_to_one=False, steps_offset=1)
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, steps_offset=1, timestep_spacing="leading")
    if name == "sd1":
        p = StableDiffusionPipeline(vae(.18215), text(24, "quick_gelu", 1), tok("t"), unet("CCD", 24, 2, 2), ddim("epsilon"), **sd)
    elif name == "sd2":
        p = StableDiffusionPipeline(vae(.18215), text(20, "gelu", 1), tok("t", "!"), unet("CCD", 20, 2, (2, 4, 4), linear=True), ddim("v_prediction"), **sd)
    elif name == "sdxl":   # a projection that is not square, so that its orientation shows
        p = StableDiffusionXLPipeline(vae(.13025), text(24, "quick_gelu", 1), text(20, "gelu", 3, 12), tok("t"), tok("u", "!"),
                                      unet("DCC", 44, 2, (2, 4, 4), (1, 2, 2), True, 12 + 6 * 8), euler)
    else:
        p = StableDiffusionXLImg2ImgPipeline(vae(.13025), None, text(20, "gelu", 3, 12), None, tok("u", "!"),
                                             unet("DCCD", 20, 2, (2, 4, 4, 4), 2, True, 12 + 5 * 8, channels=(16, 32, 32, 32)), euler,
                                             requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    p.save_pretrained(folder)
    return p


KINDS = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "refiner": StableDiffusionXLImg2ImgPipeline}

# ---- both sides' results --------------------------------------------------------------------------------------------


def inputs(p, path):
    g = torch.Generator().manual_seed(7)
    rand = lambda *s: torch.randn(*s, generator=g)
    n = 2
    v = {"x": rand(n, 10, 6, 4), "t": torch.tensor([10., 700.]), "emb": rand(n, 5, p.unet.config.cross_attention_dim), "image": rand(1, 16, 24, 3),
         "z": rand(1, 5, 4, 4)}
    ids = torch.randint(0, 512, (n, 77), generator=g)
    ids[0, 0] = ids[1, 0] = 512
    ids[0, 9:] = 513
    ids[1, 40:] = 513
    if p.text_encoder is not None:
        v["ids_1"] = ids
    if getattr(p, "text_encoder_2", None) is not None:
        v["ids_2"] = ids.clone()
        width = p.text_encoder_2.config.projection_dim
        v["pooled"] = rand(n, width)
        v["time_ids"] = torch.randint(0, 50, (n, (p.unet.config.projection_class_embeddings_input_dim - width) // 8), generator=g).float()
    save_file({k: t.contiguous() for k, t in v.items()}, path)
    return v


@torch.no_grad()
def python(p, v):
    out = {}
    kw = {"added_cond_kwargs": {"text_embeds": v["pooled"], "time_ids": v["time_ids"]}} if "pooled" in v else {}
    out["y"] = p.unet(v["x"].permute(0, 3, 1, 2), v["t"], v["emb"], **kw).sample.permute(0, 2, 3, 1)
    for k, name in (("1", "text_encoder"), ("2", "text_encoder_2")):
        m = getattr(p, name, None)
        if m is None:
            continue
        r = m(v["ids_" + k], output_hidden_states=True)
        out["text_" + k], out["before_" + k] = r.last_hidden_state, r.hidden_states[-2]
        out["pooled_" + k] = r.text_embeds if hasattr(r, "text_embeds") else r.pooler_output
    s = p.vae.config.scaling_factor
    out["mean"] = p.vae.encode(v["image"].permute(0, 3, 1, 2)).latent_dist.mean.permute(0, 2, 3, 1) * s
    out["decoded"] = p.vae.decode(v["z"].permute(0, 3, 1, 2) / s).sample.permute(0, 2, 3, 1)
    return out


def ours(model, name, config="", adapter=None):
    path = f"{work}/out.safetensors"
    r = c("build/interop", "run", model, f"{work}/{name}-in.safetensors", path, config, *([adapter] if adapter else []))
    return load_file(path) if r.returncode == 0 else {}


def compare(what, a, b, tolerance=1e-3):
    check(set(a) == set(b), f"{what}: {sorted(a)} against {sorted(b)}")
    for k in sorted(set(a) & set(b)):
        close(f"{what}.{k}", a[k], b[k], tolerance)


def same_weights(what, p, q):
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        a, b = getattr(p, name, None), getattr(q, name, None)
        check((a is None) == (b is None), f"{what}: {name}")
        if a is None or b is None:
            continue
        a, b = a.state_dict(), b.state_dict()
        bad = [k for k in set(a) | set(b) if k not in a or k not in b or not torch.equal(a[k].float(), b[k].float())]
        check(not bad, f"{what}: {name} differs in {len(bad)} tensors, {bad[:3]}")


# ---- older and other forms of single files --------------------------------------------------------------------------

def variants(name, single, folder, want):
    """What other programs have written: no text_model., other types, markers, averages, unknown tensors."""
    sd = load_file(single)
    if name == "sd1":
        bare = {k.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): t for k, t in sd.items()}
        bare.update({"model_ema.decay": torch.tensor(0.), "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2), "betas": torch.zeros(3),
                     "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None]})
        save_file(bare, f"{work}/variant.safetensors")
        compare("sd1 without text_model.", ours(f"{work}/variant.safetensors", name, folder), want)
        squeezed = {k: t.reshape(t.shape[:2]).contiguous() if "mid.attn_1" in k and t.ndim == 4 else t for k, t in sd.items()}
        save_file(squeezed, f"{work}/variant.safetensors")
        compare("sd1 with [C,C] in the VAE", ours(f"{work}/variant.safetensors", name, folder), want)
    for dtype, tolerance in ((torch.float16, 1e-4), (torch.bfloat16, 0.1), (torch.float8_e4m3fn, 1.5), (torch.float8_e5m2, 2.5)):
        save_file({k: t.to(dtype) for k, t in sd.items()}, f"{work}/variant.safetensors")
        got = ours(f"{work}/variant.safetensors", name, folder)
        close(f"{name} as {dtype}.y", got["y"], want["y"], tolerance)
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):       # the numbers themselves, against PyTorch's
            save_file({k: t.to(dtype).float() for k, t in sd.items()}, f"{work}/wide.safetensors")
            close(f"{name} as {dtype}, widened.y", got["y"], ours(f"{work}/wide.safetensors", name, folder)["y"], 1e-6)


def old_folder(folder, want):
    """A folder of old names: the VAE's query, key, value, proj_attn; the text encoder without text_model."""
    old = f"{work}/old"
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(folder, old)
    path = old + "/vae/diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    sd = {}
    for k, t in load_file(path).items():
        for a, b in names.items():
            k = k.replace(a, b)
        sd[k] = t
    save_file(sd, path, {"format": "pt"})
    path = old + "/text_encoder/model.safetensors"
    sd = {k.removeprefix("text_model."): t for k, t in load_file(path).items()}
    save_file(sd, path, {"format": "pt"})
    compare("old folder", ours(old, "sd1"), want)
    os.rename(path, path.replace("model.saf", "model.fp16.saf"))
    compare("old folder, fp16 variant", ours(old, "sd1"), want)


# ---- adapters -------------------------------------------------------------------------------------------------------

def load_adapter(name, folder, path):
    p = KINDS[name].from_pretrained(folder, local_files_only=True)
    p.load_lora_weights(os.path.dirname(path), weight_name=os.path.basename(path))
    return p


def our_adapters(name, folder, v, base):
    for naming in ("kohya", "peft"):
        for width in ("narrow", "wide"):
            path = f"{work}/{name}-{naming}-{width}.safetensors"
            c("build/interop", "adapt", folder, path, naming, width)
            want = ours(folder, name, "", path)
            check(float((want["y"] - base["y"]).abs().max()) > 1e-2, f"{name} {naming}: the adapter changes nothing")
            try:
                compare(f"{name} {naming} {width} adapter in diffusers", python(load_adapter(name, folder, path), v), want)
            except Exception as e:
                check(False, f"{name} {naming} {width}: diffusers: {type(e).__name__} {e}")
            other = "peft" if naming == "kohya" else "kohya"
            c("build/convert", path, f"{work}/there.safetensors", "--naming", other, "--dtype", "f32", "--config", folder)
            c("build/convert", f"{work}/there.safetensors", f"{work}/back.safetensors", "--naming", naming, "--dtype", "f32", "--config", folder)
            compare(f"{name} {naming} {width} to {other}", ours(folder, name, "", f"{work}/there.safetensors"), want, 1e-6)
            a, b = load_file(path), load_file(f"{work}/back.safetensors")
            check(set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a), f"{name} {naming} {width}: {other} and back")
    merged = f"{work}/{name}-merged"
    c("build/convert", folder, merged, "--dtype", "f32", "--lora", path + ":0.5")
    p = load_adapter(name, folder, path)
    p.fuse_lora(lora_scale=0.5)
    compare(f"{name} merged at 0.5", python(KINDS[name].from_pretrained(merged, local_files_only=True), v), python(p, v))


def their_adapters(name, folder, v):
    """As diffusers saves them after training with peft, alpha in the metadata; and converted to kohya's naming by diffusers."""
    p = KINDS[name].from_pretrained(folder, local_files_only=True)
    g = torch.Generator().manual_seed(5)
    layers = {}
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj"])
    p.unet.add_adapter(config)
    layers["unet_lora_layers"], layers["unet_lora_adapter_metadata"] = diffusers.training_utils._collate_lora_metadata({"unet": p.unet}), None
    for q in p.unet.parameters():
        if q.requires_grad:
            q.data = torch.randn(q.shape, generator=g) * .1
    meta = diffusers.training_utils._collate_lora_metadata({"unet": p.unet})
    sd = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(p.unet))
    KINDS[name].save_lora_weights(f"{work}/lora-{name}", unet_lora_layers=sd, **{k: x for k, x in meta.items() if k.startswith("unet")})
    want = python(p, v)
    close(f"{name} adapter saved by diffusers.y", ours(folder, name, "", f"{work}/lora-{name}/pytorch_lora_weights.safetensors")["y"], want["y"])
    kohya = diffusers.utils.convert_state_dict_to_kohya({"unet." + k: t for k, t in peft.get_peft_model_state_dict(p.unet).items()})
    kohya = {k: (torch.tensor(6.) if k.endswith(".alpha") else t.contiguous()) for k, t in kohya.items()}
    save_file(kohya, f"{work}/lora-{name}/kohya.safetensors")
    close(f"{name} adapter in kohya's naming by diffusers.y", ours(folder, name, "", f"{work}/lora-{name}/kohya.safetensors")["y"], want["y"])


# ---- all of it ------------------------------------------------------------------------------------------------------

for name in KINDS:
    folder, single, again = f"{work}/{name}", f"{work}/{name}.safetensors", f"{work}/{name}-again"
    p = make(name, folder)
    v = inputs(p, f"{work}/{name}-in.safetensors")
    want = python(p, v)
    compare(f"{name} folder of diffusers", ours(folder, name), want)
    c("build/convert", folder, single, "--dtype", "f32")
    compare(f"{name} single file of ours", ours(single, name, folder), want)
    c("build/convert", single, again, "--dtype", "f32", "--config", folder)
    same_weights(f"{name} folder of ours in diffusers", KINDS[name].from_pretrained(again, local_files_only=True), p)
    try:
        q = KINDS[name].from_single_file(single, config=folder, local_files_only=True)
        same_weights(f"{name} single file of ours in diffusers", q, p)
        compare(f"{name} single file of ours in diffusers", python(q, v), want)
    except Exception as e:
        check(False, f"{name} from_single_file: {type(e).__name__} {e}")
    path = again + "/unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path), f"{work}/reference.safetensors", {"format": "pt"})
    check(open(path, "rb").read() == open(f"{work}/reference.safetensors", "rb").read(), f"{name}: the reference writer makes other bytes")
    variants(name, single, folder, want)
    if name == "sd1":
        old_folder(folder, want)
    if name != "refiner":
        our_adapters(name, folder, v, want)
        their_adapters(name, folder, v)
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
