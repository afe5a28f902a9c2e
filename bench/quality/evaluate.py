# SPDX-License-Identifier: Apache-2.0
"""Plain Euler sampling of the held-out edits at several step counts: RUN_DIR/plain.json and RUN_DIR/contact.png.

python bench/quality/evaluate.py --steps 50 28 10 4 2 1
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from contact_sheet import pil_pictures
from families import editor_in
from judge import WEIGHTS, Judge, judge_edits
from models import as_pictures
from runtime import RUN_DIR, device, log
from sampler import decode_latents, encode_images, encode_text, euler, noise_like
from scenes import EVALUATION_COUNTS, KINDS, TASKS, TOKEN, Renderer, evaluation_set
from table_measures import grow, masked_psnr, sharpness, to_pixels

from specedit_kernels.images.sheet import draw_sheet


def changed_mask(source, output, floor=0.1):
    """[n, H, W] bool: where an output differs from its source, in whole tokens: where the new object really is."""
    difference = (source - output).abs().amax(1)
    tokens = torch.nn.functional.avg_pool2d((difference > floor)[:, None].float(), TOKEN)[:, 0] > 0.1
    return to_pixels(tokens)


def rows_for(judge, edits, rendered, output, second=None):
    """Per-edit figures of one sampler: a dict of lists. second: the same with another noise, for the diversity."""
    source, target = rendered.source, rendered.target
    inside, outside = to_pixels(rendered.tokens), ~to_pixels(grow(rendered.tokens, 1))
    own = changed_mask(source, output)
    rows = {
        "right": judge_edits(judge, edits, source, output).float(),
        "psnr_in": masked_psnr(output, target, inside),
        "psnr_out": masked_psnr(output, source, outside),
        # Against the real target's, each within its own changed area: places and poses differ.
        "sharpness": sharpness(output, own) / sharpness(target, changed_mask(source, target)).clamp(min=1e-8),
    }
    if second is not None:
        rows["two_seeds"] = masked_psnr(output, second, inside)
    return {name: value.float().cpu().tolist() for name, value in rows.items()}


def summary(rows, edits):
    """Means by kind, and over edits with one right answer and edits with a new object."""
    unique = edits.unique()
    groups = {kind: edits.kind == k for k, kind in enumerate(KINDS)}
    groups["unique"] = unique & (edits.kind < 3)
    groups["new object"] = ~unique & (edits.kind < 3)
    groups |= {f"task {task}": edits.task == k for k, task in enumerate(TASKS)}
    out = {}
    for name, chosen in groups.items():
        if not chosen.any():
            continue
        out[name] = {"n": int(chosen.sum())}
        for column, values in rows.items():
            value = torch.tensor(values)[chosen]
            value = value[value.isfinite()]
            if column == "sharpness":
                out[name][column] = value.median().item() if len(value) else math.nan
            else:
                out[name][column] = value.mean().item() if len(value) else math.nan
    return out


def load_judge(dev):
    trained = RUN_DIR / "judge.safetensors"
    return Judge.load(trained if trained.exists() else WEIGHTS).to(dev)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RUN_DIR / "editor")
    parser.add_argument("--out", type=Path, default=RUN_DIR)
    parser.add_argument("--steps", type=int, nargs="+", default=(50, 28, 10, 4, 2, 1))
    parser.add_argument("--two-seeds", type=int, nargs="*", default=(28, 4, 2), help="step counts to run twice")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--length", type=int, help="of the padded prompt; default: the pipeline's own")
    parser.add_argument("--divide", type=int, default=1, help="take one edit in so many")
    args = parser.parse_args()
    dev = device()
    dtype = torch.bfloat16 if dev.type == "cuda" else torch.float32
    family = editor_in(args.model)
    args.length = args.length or family.default_length
    pipe = family.pipeline.from_pretrained(args.model, torch_dtype=dtype).to(dev)
    as_pictures(pipe.vae)
    judge, renderer = load_judge(dev), Renderer(dev)
    edits = evaluation_set(
        {kind: max(5, n // args.divide) for kind, n in EVALUATION_COUNTS.items()} if args.divide > 1 else None
    )
    phrases = edits.phrases()
    methods = ["source", "target", "vae(target)", *(f"{n} steps" for n in args.steps)]
    rows = {name: {} for name in methods}
    picked = set(torch.linspace(0, len(edits) - 1, 24).long().tolist())
    shown = {name: [] for name in methods}
    shown_phrases, spent = [], {}
    for part in torch.arange(len(edits)).split(args.batch):
        chunk = edits[part]
        rendered = renderer(chunk, args.size, held_out=True)
        z = encode_images(pipe.vae, rendered.source)
        states, pooled = encode_text(pipe, [phrases[i] for i in part.tolist()], args.length, dev)
        outputs = {
            "source": rendered.source,
            "target": rendered.target,
            "vae(target)": decode_latents(pipe.vae, encode_images(pipe.vae, rendered.target)),
        }
        noise, other = (noise_like(part + base, 16, *z.shape[2:]) for base in (0, 1_000_000))
        seconds = {}
        for steps in args.steps:
            started = time.perf_counter()
            outputs[f"{steps} steps"] = decode_latents(pipe.vae, euler(pipe, z, states, pooled, steps, noise))
            if dev.type == "cuda":
                torch.cuda.synchronize()
            spent[steps] = spent.get(steps, 0.0) + time.perf_counter() - started
            if steps in args.two_seeds:
                seconds[f"{steps} steps"] = decode_latents(pipe.vae, euler(pipe, z, states, pooled, steps, other))
        for name, output in outputs.items():
            for column, values in rows_for(judge, chunk, rendered, output, seconds.get(name)).items():
                rows[name].setdefault(column, []).extend(values)
        for k, i in enumerate(part.tolist()):
            if i in picked:
                shown_phrases.append(f"{phrases[i]} ({KINDS[edits.kind[i]]})")
                for name, output in outputs.items():
                    shown[name].append(output[k].cpu())
        log(f"evaluate: {part[-1].item() + 1} of {len(edits)}")
    result = {
        "edits": len(edits),
        "size": args.size,
        "prompt_length": args.length,
        "dtype": str(dtype),
        "seconds": spent,
        "summary": {n: summary(r, edits) for n, r in rows.items()},
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "plain.json").write_text(json.dumps(result) + "\n")
    columns = {name: pil_pictures(torch.stack(images)) for name, images in shown.items()}
    draw_sheet(columns, shown_phrases, 160).save(args.out / "contact.png")
    for group in (*KINDS, "unique", "new object"):
        for name in methods:
            values = result["summary"][name].get(group)
            if values:
                log(f"{group:10s} {name:12s} " + " ".join(f"{k} {v:.3f}" for k, v in values.items() if k != "n"))
    for task in TASKS:
        line = [f"{name}: {result['summary'][name][f'task {task}']['right']:.3f}" for name in methods]
        log(f"right, {task}: " + ", ".join(line))


if __name__ == "__main__":
    main()
