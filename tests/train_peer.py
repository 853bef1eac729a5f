"""train_peer.py - the run of tests/winrate.sh in PyTorch: the same pairs, steps and settings, draws of its own.

By name alone; needs torch, diffusers, transformers, peft, safetensors, pillow.
    OMP_NUM_THREADS=1 python tests/train_peer.py examples/emoji build/winrate-out [sigmoid|hinge|ipo] [lora|full] [STEPS]
writes build/winrate-out/peer-lora-sigmoid/{adapter.safetensors or model/} and curve.txt (loss and implicit accuracy a
step), for `build/winrate rate`, and prints how far the curve's means are from that of examples/train, where there is one."""
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
LAYERS = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 time_emb_proj".split()


def picture(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float32) / 127.5 - 1).permute(2, 0, 1)


def main():
    model, out = sys.argv[1], sys.argv[2]
    loss_type = sys.argv[3] if len(sys.argv) > 3 else "sigmoid"
    how = sys.argv[4] if len(sys.argv) > 4 else "lora"
    beta = 1000.0 if loss_type == "ipo" else 2000.0
    torch.manual_seed(1)
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
    name = os.path.join(out, f"peer-{how}-{loss_type}")
    os.makedirs(name, exist_ok=True)
    for step in range(STEPS):
        while len(order) < BATCH:
            order += torch.randperm(len(rows)).tolist()
        pick, order = order[:BATCH], order[BATCH:]
        x = torch.stack([pictures[i][0] for i in pick] + [pictures[i][1] for i in pick])
        t = torch.randint(0, schedule.config.num_train_timesteps, (BATCH,)).repeat(2)
        noise = torch.randn(x[:BATCH].shape).repeat(2, 1, 1, 1)
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
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), (inside > 0).float().mean().item()))
    with open(os.path.join(name, "curve.txt"), "w") as f:
        f.writelines("%.6f %.4f\n" % c for c in curve)
    if how == "lora":
        state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(unet).items()}
        save_file(state, os.path.join(name, "adapter.safetensors"))
    else:
        import shutil
        shutil.copytree(model, os.path.join(name, "model"), dirs_exist_ok=True)
        unet.save_pretrained(os.path.join(name, "model", "unet"), safe_serialization=True)
    mine = os.path.join(out, f"{how}-{loss_type}", "metrics.jsonl")
    if os.path.exists(mine):
        lines = [json.loads(line) for line in open(mine)]
        lines = [(r["loss"], r["implicit_acc"]) for r in lines if "loss" in r]
        for first in range(0, min(STEPS, len(lines)), 30):
            a = np.mean(curve[first:first + 30], axis=0)
            b = np.mean(lines[first:first + 30], axis=0)
            print("steps %d-%d: loss %.3f here, %.3f there; implicit accuracy %.3f, %.3f" %
                  (first + 1, first + 30, a[0], b[0], a[1], b[1]))


main()
