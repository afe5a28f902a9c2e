# SPDX-License-Identifier: Apache-2.0
"""What precision="fp8" costs a tiny editor: pictures beside those of the model's own dtype, on a few held-out edits.

    python bench/quality/fp8.py --limit 8                # a CPU does: the same rounding, multiplied in fp32

Each edit is run with its true mask and the same noise in fp32, bf16 and fp8 (over fp32). Printed as JSON: dB against
the target inside the edit, of edits with one right answer, and against the fp32 picture.
"""

import argparse
import json

import torch
from table_measures import masked_psnr
from table_runs import SHIPPED, Row, Runner, load_pipeline, make_set

from specedit_kernels import SpecEditConfig

CONFIGS = {
    "balanced": dict(quality="balanced"),
    "locked, cached": dict(quality="paper", finish="locked", kv_refresh=9),
}


def decibels(values):
    return round(float(values[values.isfinite()].mean()), 3)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--limit", type=int, default=8, help="edits")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--without-bf16", action="store_true", help="which some CPUs are slow in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    edits = make_set(args.device, args.size, args.limit, {"local": 64, "small": 64})
    edits.reference = edits.tokens
    runners = {name: Runner(load_pipeline(args.model, args.device, dtype))
               for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}  # fmt: skip
    base = "fp32" if args.device == "cpu" else "bf16"
    settings = {"fp32": ("fp32", "auto"), "bf16": ("bf16", "auto"), "fp8": (base, "fp8")}
    if args.without_bf16:
        del settings["bf16"]
    for kind, options in CONFIGS.items():
        images = {name: [] for name in settings}
        for i in range(len(edits)):
            part = edits[torch.tensor([i])]
            for name, (of, precision) in settings.items():
                config = SpecEditConfig(runner="fused", precision=precision, **options)
                images[name].append(runners[of].run(Row(kind, config=config, oracle=True), part).images)
        images = {name: torch.cat(parts) for name, parts in images.items()}
        known = edits.edits.unique().to(images["fp32"].device)
        found = {"setting": kind, "edits": len(edits), "with one answer": int(known.sum())}
        for name, of in images.items():
            psnr = masked_psnr(of, edits.pictures()[1], edits.mask)
            found[f"{name}: dB inside, against the target"] = decibels(psnr[known])
            if name != "fp32":
                found[f"{name}: dB inside, against fp32"] = decibels(masked_psnr(of, images["fp32"], edits.mask))
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
