"""train_peer.py - the run of tests/winrate.sh in PyTorch: the same pairs, steps and settings.

By name alone; needs torch, diffusers, transformers, peft, safetensors, pillow.
    OMP_NUM_THREADS=1 python tests/train_peer.py examples/emoji build/winrate-out [sigmoid|hinge|ipo] [lora|full] [STEPS]
                             [SEED] [own|same]
own: draws of PyTorch's own.  same: the order of pairs, timesteps and noise that examples/train draws with that --seed and
no held-out pairs, so that each step can be compared; adapters still begin at other numbers.
writes build/winrate-out/peer-lora-sigmoid/{adapter.safetensors or model/} and curve.txt (loss, implicit accuracy and
gradient norm a step), for `build/winrate rate`, with -SEED-same behind the name where they are given, and prints how far
the curve's means are from that of examples/train, build/winrate-out/lora-sigmoid, where there is one."""
import copy
import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

STEPS, BATCH = int(sys.argv[5]) if len(sys.argv) > 5 else 90, 16
SEED = int(sys.argv[6]) if len(sys.argv) > 6 else 1
SAME = len(sys.argv) > 7 and sys.argv[7] == "same"
ORDER, CHOICES, NOISE = 0x102, 0x103, 0x104         # DPOI_RANDOM_ of diffdpo.h
LAYERS = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 time_emb_proj".split()


def philox(quads, key, step, purpose):
    """The four words of each counter (quad, key, step, purpose) under SEED, [len(quads), 4]: dpoi_random_quad."""
    c = [np.asarray(quads, np.uint64)] + [np.full(len(quads), v, np.uint64) for v in (key, step, purpose)]
    k0, k1, low, half = SEED & 0xffffffff, SEED >> 32, np.uint64(0xffffffff), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> half) ^ c[1] ^ np.uint64(k0), b & low, (a >> half) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xffffffff, (k1 + 0xBB67AE85) & 0xffffffff
    return np.stack(c, 1)


def shuffled(n, epoch):
    """The order of pairs in an epoch: dpoi_train_shuffle."""
    u, x = philox(np.arange((n + 3) // 4), 0, epoch, ORDER).reshape(-1), list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(u[i]) * (i + 1) >> 32
        x[i], x[j] = x[j], x[i]
    return x


def normals(count, key, step):
    """dpoi_random_normals: Box and Muller, by pairs of words."""
    u = (philox(np.arange((count + 3) // 4), key, step, NOISE).astype(np.float32) + np.float32(0.5)) * np.float32(2.3283064e-10)
    r, angle = np.sqrt(-2 * np.log(u[:, 0::2])), np.float32(6.2831853) * u[:, 1::2]
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 2).reshape(-1)[:count]


def draw(step, shape, T):
    """Timesteps [B] and noise [B,C,H,W] of a step."""
    if not SAME:
        return torch.randint(0, T, (BATCH,)), torch.randn(BATCH, *shape)
    C, H, W = shape
    t = [int(philox([0], b, step, CHOICES)[0, 0]) * T >> 32 for b in range(BATCH)]
    noise = np.stack([normals(C * H * W, b, step).reshape(H, W, C) for b in range(BATCH)])
    return torch.tensor(t), torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()


def picture(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float32) / 127.5 - 1).permute(2, 0, 1)


def main():
    model, out = sys.argv[1], sys.argv[2]
    loss_type = sys.argv[3] if len(sys.argv) > 3 else "sigmoid"
    how = sys.argv[4] if len(sys.argv) > 4 else "lora"
    beta = 1000.0 if loss_type == "ipo" else 2000.0
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    schedule = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    reference = None
    if how == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=LAYERS))
    else:
        reference = copy.deepcopy(unet).requires_grad_(False)
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=5e-4 if how == "lora" else 1e-4, weight_decay=0)
    folder = os.path.join(out, "quickstart-out")
    rows = [json.loads(line) for line in open(os.path.join(folder, "pairs.jsonl"))]
    pictures = [(picture(os.path.join(folder, r["chosen"])), picture(os.path.join(folder, r["rejected"]))) for r in rows]
    with torch.no_grad():
        ids = tokenizer([r["prompt"] for r in rows], padding="max_length", truncation=True,
                        max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        emb = torch.cat([text(ids[i:i + 64])[0] for i in range(0, len(ids), 64)])
    order, curve = [], []
    tail = (f"-{SEED}" if len(sys.argv) > 6 else "") + ("-same" if SAME else "")
    name = os.path.join(out, f"peer-{how}-{loss_type}{tail}")
    os.makedirs(name, exist_ok=True)
    for step in range(STEPS):
        while len(order) < BATCH:
            epoch = (step * BATCH + len(order)) // len(rows)
            order += shuffled(len(rows), epoch) if SAME else torch.randperm(len(rows)).tolist()
        pick, order = order[:BATCH], order[BATCH:]
        x = torch.stack([pictures[i][0] for i in pick] + [pictures[i][1] for i in pick])
        t, noise = draw(step, x.shape[1:], schedule.config.num_train_timesteps)
        t, noise = t.repeat(2), noise.repeat(2, 1, 1, 1)
        xt = schedule.add_noise(x, noise, t)
        target = noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(x, noise, t)
        e = emb[pick].repeat(2, 1, 1)

        def errors(net):
            return F.mse_loss(net(xt, t, e).sample, target, reduction="none").mean((1, 2, 3))
        with torch.no_grad():
            if reference is None:
                unet.disable_adapters()
            ref = errors(reference or unet)
            if reference is None:
                unet.enable_adapters()
        gain = ref - errors(unet)
        inside = 0.5 * beta * (gain[:BATCH] - gain[BATCH:])
        each = {"sigmoid": -F.logsigmoid(inside), "hinge": torch.relu(1 - inside), "ipo": (inside - 0.5) ** 2}[loss_type]
        loss = each.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), (inside > 0).float().mean().item(), norm.item()))
    with open(os.path.join(name, "curve.txt"), "w") as f:
        f.writelines("%.6f %.4f %.5g\n" % c for c in curve)
    if how == "lora":
        state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(unet).items()}
        save_file(state, os.path.join(name, "adapter.safetensors"))
    else:
        import shutil
        shutil.copytree(model, os.path.join(name, "model"), dirs_exist_ok=True)
        unet.save_pretrained(os.path.join(name, "model", "unet"), safe_serialization=True)
    mine = os.path.join(out, f"{how}-{loss_type}{tail}", "metrics.jsonl")
    if os.path.exists(mine):
        lines = [json.loads(line) for line in open(mine)]
        lines = [(r["loss"], r["implicit_acc"], r["grad_norm"]) for r in lines if "loss" in r]
        for k in range(10 if SAME else 0):
            print("step %d: loss %.6f here, %.6f there; |g| %.5g, %.5g" %
                  (k + 1, curve[k][0], lines[k][0], curve[k][2], lines[k][2]))
        worst = max(abs(a[0] - b[0]) / b[0] for a, b in zip(curve[:10], lines[:10])) if SAME and how == "full" else 0
        for first in range(0, min(STEPS, len(lines)), 30):
            a = np.mean(curve[first:first + 30], axis=0)
            b = np.mean(lines[first:first + 30], axis=0)
            print("steps %d-%d: loss %.3f here, %.3f there; implicit accuracy %.3f, %.3f" %
                  (first + 1, first + 30, a[0], b[0], a[1], b[1]))
        if worst > 1e-3:
            sys.exit("the first ten losses are %.2g off" % worst)


main()
