# SPDX-License-Identifier: Apache-2.0
"""Trains the judge on crops of scenes, degraded as an autoencoder and a sampler degrade.

Writes RUN_DIR/judge.safetensors.

    python bench/quality/train_judge.py --seconds 60
"""

import argparse
import time

import torch
import torch.nn.functional as F
from families import FAMILIES, load_vae
from judge import CROP, DIFFERENCE, FRAME, MARGIN, NONE, Judge, cut, judge_edits, known_boxes
from runtime import RUN_DIR, Clock, autocast, device, log
from scenes import LOCAL_TASKS, TASKS, Renderer, evaluation_set
from stream import EditStream

from specedit_kernels import codec_of

REUSE = 3  # steps on the same pictures, degraded and cut anew
SHARES = (0.4, 0.15, 0.05, 0.25, 0.15)  # of LOCAL_TASKS


def examples(renderer, stream, count):
    """Crops with labels from `count` edits: (images [2n], boxes [2n, 3], objects [2n]); sources, then targets."""
    edits = stream.take(count)[0]
    tasks = edits.task
    rendered = renderer(edits, FRAME)
    boxes = known_boxes(edits)
    pose = edits.after_pose
    boxes = torch.where(
        (tasks == TASKS.index("add_open"))[:, None],
        torch.stack([pose[:, 0], pose[:, 1], pose[:, 2] * MARGIN], 1),
        boxes,
    )
    adding = tasks >= TASKS.index("add")
    before = torch.where(adding, NONE, edits.subject)
    after = torch.where(edits.after < 0, NONE, edits.after)
    return torch.cat([rendered.source, rendered.target]), torch.cat([boxes, boxes]), torch.cat([before, after])


def shake(boxes, generator):
    """Boxes a little off, as those of a found object are."""
    jitter = torch.randn((len(boxes), 3), generator=generator) * torch.tensor([0.05, 0.05, 0.10])
    return torch.stack(
        [
            boxes[:, 0] + jitter[:, 0] * boxes[:, 2],
            boxes[:, 1] + jitter[:, 1] * boxes[:, 2],
            boxes[:, 2] * jitter[:, 2].exp(),
        ],
        1,
    )


def degrade(images, vae, dev, share):
    """A share through the autoencoder, a third blurred, the rest as they are; faint noise on all."""
    coded, third = round(len(images) * share), len(images) // 3
    order = torch.randperm(len(images), device=images.device)
    images = images.clone()
    if coded:
        chosen = order[:coded]
        with torch.no_grad(), autocast(dev):
            # Latent noise stands for a sampler's own errors.
            z = codec_of(vae).encode(images[chosen] * 2 - 1)
            z = z + torch.randn_like(z) * 0.15 * torch.rand(len(z), 1, 1, 1, device=z.device)
            images[chosen] = (codec_of(vae).decode(z).float() / 2 + 0.5).clamp(0, 1)
    blurred = order[coded : coded + third]
    small = FRAME // int(torch.randint(1, 4, ()))
    images[blurred] = F.interpolate(
        F.interpolate(images[blurred], size=(small, small), mode="area"), size=(FRAME, FRAME), mode="bilinear"
    )
    strength = 0.02 * torch.rand(len(images), 1, 1, 1, device=images.device)
    return (images + torch.randn_like(images) * strength).clamp(0, 1)


@torch.no_grad()
def validity(judge, vae, dev, counts=None, size=512):
    """Per task: the share judged right of unedited sources, of targets, and of targets through the autoencoder."""
    edits = evaluation_set(counts)
    renderer = Renderer(dev)
    rows = []
    for part in torch.arange(len(edits)).split(32):
        chunk = edits[part]
        rendered = renderer(chunk, size, held_out=True)
        with autocast(dev):
            coded = codec_of(vae).decode(codec_of(vae).encode(rendered.target * 2 - 1)).float() / 2 + 0.5
        rows.append(
            torch.stack(
                [
                    judge_edits(judge, chunk, rendered.source, out)
                    for out in (rendered.source, rendered.target, coded.clamp(0, 1))
                ],
                1,
            )
        )
    right = torch.cat(rows).float()
    table = {}
    for index, task in enumerate(TASKS):
        chosen = edits.task == index
        if chosen.any():
            table[task] = right[chosen].mean(0).tolist()
    chosen = edits.task < len(LOCAL_TASKS)
    table["objects"] = right[chosen].mean(0).tolist()
    table["all"] = right.mean(0).tolist()
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="flux", help="whose autoencoder degrades")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--edits", type=int, default=128, help="edits a step; two crops of each")
    parser.add_argument("--coded", type=float, default=0.125, help="share of the crops that the autoencoder has coded")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--check", type=int, default=None, help="edits of each kind for the final check (default: all)")
    args = parser.parse_args()
    if (RUN_DIR / "judge.safetensors").exists():
        log("judge: already there")
        return
    dev = device()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    renderer, stream = Renderer(dev), EditStream(args.seed, 64, args.workers, SHARES, every_pairing=True)
    vae = load_vae(FAMILIES[args.family], RUN_DIR / "vae").to(dev).eval()
    judge = Judge().to(dev)
    log(
        f"judge: {sum(p.numel() for p in judge.parameters()) / 1e6:.2f} M parameters; crops of {CROP} px; "
        f"a difference of {DIFFERENCE} is a change"
    )
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.lr, weight_decay=0.02)
    clock = Clock(args.seconds)
    step, logged, since, total, hits = 0, time.perf_counter(), 0, 0.0, 0.0
    while not clock.done() or step == 0:
        rate = min(1.0, (step + 1) / 50) * max(0.01, 1 - clock.fraction)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        if step % REUSE == 0:
            images, boxes, objects = examples(renderer, stream, args.edits)
            objects = objects.to(dev)
        crops = cut(degrade(images, vae, dev, args.coded), shake(boxes, generator).to(dev))
        with autocast(dev):
            logits = judge(crops)
        loss = F.cross_entropy(logits.float(), objects, label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        step, since = step + 1, since + 1
        total = total + loss.detach()
        hits = hits + (logits.argmax(1) == objects).float().mean().detach()
        now = time.perf_counter()
        if now - logged > 10:
            log(
                f"judge step {step} {clock.elapsed:.0f}/{args.seconds:.0f} s loss {total.item() / since:.3f} "
                f"objects right {hits.item() / since:.4f} {(now - logged) / since * 1e3:.0f} ms/step"
            )
            logged, since, total, hits = now, 0, 0.0, 0.0
    judge.eval()
    judge.save(RUN_DIR / "judge.safetensors")
    judge = Judge.load(RUN_DIR / "judge.safetensors").to(dev)
    counts = None if args.check is None else dict.fromkeys(("local", "small", "ambiguous", "global"), args.check)
    for task, values in validity(judge, vae, dev, counts).items():
        log(f"judge {task:9s} right: source {values[0]:.3f}  target {values[1]:.3f}  target coded {values[2]:.3f}")


if __name__ == "__main__":
    main()
