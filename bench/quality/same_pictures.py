# SPDX-License-Identifier: Apache-2.0
"""Whether two checkouts give the same pictures, bit for bit: the shipped tiny editors on the example, many settings.

python bench/quality/same_pictures.py BEFORE AFTER [--side 128] [--only TEXT]

Each checkout runs in a process of its own, in fp32 on a CPU with one thread, and gives a digest of every picture and
mask. Prints a line a setting, and ends with 1 where one differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path


def settings():
    """{name: (pipeline class, model folder, config class, options of the config, options of the call)}."""
    kinds = {"flux": ("FluxKontext", "tiny_kontext"), "qwen": ("QwenImageEdit", "tiny_qwen_image_edit")}
    found = {}
    for family, (name, folder) in kinds.items():
        for runner in ("eager", "fused"):
            for finish in ("full", "locked"):
                for refresh in (1, 3):
                    options = dict(stages=(1, 3, 1), finish=finish, kv_refresh=refresh, runner=runner)
                    found[f"{family} {runner} {finish} kv_refresh={refresh}"] = (
                        f"SpecEdit{name}Pipeline", folder, "SpecEditConfig", options, {}
                    )  # fmt: skip
            more = {
                "lock_text fp8": (
                    dict(stages=(1, 3, 0), finish="locked", kv_refresh=2, lock_text=True, kv_cache_dtype="fp8"),
                    {},
                ),
                "guided": (
                    dict(stages=(1, 2, 0), finish="locked", kv_refresh=2),
                    dict(negative_prompt="gray", true_cfg_scale=3.0),
                ),
                "quarter": (dict(stages=(1, 1, 1), draft="quarter", draft_steps=1), {}),
                "full_step": (dict(stages=(1, 1, 1), draft="full_step", preserve="pixels"), {}),
                "all tokens": (dict(stages=(1, 1, 1), threshold=-1.0), {}),
            }
            for title, (options, call) in more.items():
                options = options | dict(runner=runner)
                kind = f"SpecEdit{name}Pipeline"
                found[f"{family} {runner} {title}"] = (kind, folder, "SpecEditConfig", options, call)
        for runner in ("eager", "fused") if family == "flux" else ("eager",):
            for title, options in {"": {}, " without shield": dict(bg_shield=False), " inversion": dict(
                method="inversion", steps=1)}.items():  # fmt: skip
                found[f"{family} {runner} FlashEdit{title}"] = (
                    f"FlashEdit{name}Pipeline", folder, "FlashEditConfig", options | dict(runner=runner), {}
                )  # fmt: skip
    return found


def digests(side, only):
    """Print a line, [setting, digest], for each setting of the checkout that is the working directory."""
    import diffusers
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    import specedit_kernels

    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    assets, pipes = Path(specedit_kernels.__file__).parent / "assets", {}
    picture = Image.open(assets / "example.png").convert("RGB").resize((side, side))
    for name, (kind, folder, config, options, call) in settings().items():
        if only not in name:
            continue
        if kind not in pipes:
            pipes[kind] = getattr(specedit_kernels, kind).from_pretrained(assets / folder, torch_dtype=torch.float32)
            pipes[kind].set_progress_bar_config(disable=True)
        size = dict(max_area=side * side, _auto_resize=False) if "Flux" in kind else dict(height=side, width=side)
        out = pipes[kind](
            image=picture, prompt="color the turtle purple", max_sequence_length=64, output_type="np",
            generator=torch.Generator().manual_seed(0), specedit=getattr(specedit_kernels, config)(**options),
            **size, **call,
        )  # fmt: skip
        wanted = options["runner"]
        if out.stats.runner != wanted:
            raise RuntimeError(f"{name}: expected the runner {wanted}, got {out.stats.runner}")
        data = np.ascontiguousarray(out.images).tobytes() + out.mask.numpy().tobytes()
        print(json.dumps([name, hashlib.sha256(data).hexdigest()]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", help="two folders")
    parser.add_argument("--side", type=int, default=96, help="pixels a side")
    parser.add_argument("--only", default="", help="settings whose name has this text")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        digests(args.side, args.only)
        return 0
    if len(args.checkouts) != 2:
        parser.error(f"expected two checkouts, got {len(args.checkouts)}")
    results = []
    for checkout in args.checkouts:
        command = [sys.executable, str(Path(__file__).resolve()), "--one"]
        command += ["--side", str(args.side), "--only", args.only]
        environment = os.environ | {"PYTHONPATH": str(Path(checkout).resolve()), "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results.append(dict(json.loads(line) for line in run.stdout.splitlines()))
    before, after = results
    differ = [name for name in before if before[name] != after.get(name)]
    for name in before:
        print(f"{name}: {'different' if name in differ else 'equal'}")
    print(f"{len(before) - len(differ)} of {len(before)} equal")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
