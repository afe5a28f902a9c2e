# SPDX-License-Identifier: Apache-2.0
"""Seconds of an edit of a large picture with detail="native", FLUX.1-Kontext at full size, with random weights.

    python bench/models/native.py --out runs/models            # one GPU with 40 GB or more, under two minutes
    python bench/models/native.py --tiny --out /tmp/models     # a tiny model on any machine, to try the script

A box of the picture is given as the region. All is timed but the text: from an array on the host to the edited array on
the host, at the source's size. "edit": a picture of the working size. Of the others each row has the share of the
picture that is edited; pixels tells how many of its own those are, in millions. Writes OUT/native.json, .md and, with
matplotlib, .png.
"""

import argparse
import contextlib
import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import flux_kontext as base

from specedit_kernels import SpecEditConfig

# What the large edit may take of the edit at the working size, and of memory.
TIMES_THE_EDIT, PEAK_GIB = 3.0, 40.0
# Two pictures with the same pixels edited: how far the passes' seconds may be apart.
OF_EQUAL_PIXELS = 1.3


class Bench(base.Bench):
    """Rows of whole calls, picture sizes and shares of them."""

    def picture(self, width, height):
        # smooth: a file of a camera is no noise
        y, x = np.mgrid[:height, :width]
        planes = (128 + 100 * np.sin(x / (37 + 11 * c)) * np.cos(y / (53 - 7 * c)) for c in range(3))
        return np.stack([p.astype(np.uint8) for p in planes], axis=-1)

    def call(self, picture, box, detail):
        options = {k: v for k, v in self.options.items() if k not in ("image", "height", "width", "output_type")}
        config = SpecEditConfig(quality=self.args.quality, runner=self.args.runner)
        out = self.pipe(image=picture, region=box, detail=detail, output_size="source", output_type="np",
                        specedit=config, generator=torch.Generator().manual_seed(0), **options)  # fmt: skip
        outside = np.ones(picture.shape[:2], bool)
        # the region in whole tokens and its seam are within this
        (left, top, right, bottom), near = box, 4 * max(picture.shape[:2]) // self.args.side * 16
        outside[max(top - near, 0) : bottom + near, max(left - near, 0) : right + near] = False
        if not np.array_equal(out.images[0][outside], picture[outside]):
            raise AssertionError("pixels outside the region have changed")
        return out.stats

    def row(self, size, share, detail):
        """A Row of a box with that share of a picture of (width, height), in its aspect, off its middle."""
        picture, edge = self.picture(*size), share**0.5
        box = [round(side * (0.45 + way * edge / 2)) for way in (-1, 1) for side in size]
        seen = []

        def run():
            stats = self.call(picture, box, detail)
            seen[:] = [stats]
            return stats

        def warm():
            run()
            run()  # the first one lets kept buffers grow, for which steps are captured anew

        facts = {"picture": size, "area": share, "pixels": share * size[0] * size[1] / 1e6, "detail": detail}
        return base.Row(run, warm, facts=facts), seen

    def figures(self, size, share, detail):
        row, seen = self.row(size, share, detail)
        found = self.measure(row)
        [stats] = seen
        found["edited"] = stats.edited[0]
        if stats.native and stats.native[0] is not None:
            found["native"] = str(stats.native[0])
            found["passes"] = len(stats.native[0].windows)
        return found


def named(size, share, detail):
    return f"{size[0]} x {size[1]}, {100 * share:g} %, {detail}"


def bars(rows, large, small):
    """{what: {"value", "bar", "met"}} of the bars that the rows so far decide."""
    found = {}

    def add(what, value, bar):
        found[what] = {"value": value, "bar": bar, "met": value <= bar}

    edit, wanted = rows.get("edit", {}).get("seconds"), named(large, 0.05, "native")
    if edit and rows.get(wanted, {}).get("seconds"):
        add(f"{wanted}: times the edit", rows[wanted]["seconds"] / edit, TIMES_THE_EDIT)
        if "peak_bytes" in rows[wanted]:
            peak = rows[wanted]["peak_bytes"] + rows[wanted].get("graph_bytes", 0)
            add(f"{wanted}: peak, GiB", peak / 2**30, PEAK_GIB)
    passes = {(tuple(r["picture"]), round(r["pixels"], 2)): r["stages"]["native"] for r in rows.values()
              if r.get("detail") == "native" and "seconds" in r}  # fmt: skip
    for (first, pixels), (second, others) in itertools.product(passes, passes):
        if first == large and second == small and abs(pixels - others) < 0.02:
            what = f"second passes over {pixels:g} million pixels of {large[0]} x {large[1]}, times those of {small[0]}"
            add(f"{what} x {small[1]}", passes[first, pixels] / passes[second, others], OF_EQUAL_PIXELS)
    return found


def report(head, rows, large, small):
    lines = [f"{head['model']}, working size {head['side']} x {head['side']}, {head['text_length']} text tokens; "
             f"{head['device']}, " + ", ".join(f"{k} {v}" for k, v in head["versions"].items())
             + f", commit {head['commit']}, {head['date']}. Array in, array out; text given.", "",
             "| row | edited, million pixels | passes | seconds | times the edit | peak GiB | stages, s |",
             "|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    edit = rows.get("edit", {}).get("seconds")
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error'][:200]} | | | | | |")
            continue
        peak = f"{(row['peak_bytes'] + row.get('graph_bytes', 0)) / 2**30:.1f}" if "peak_bytes" in row else "–"
        stages = ", ".join(f"{k} {v:.3f}" for k, v in row["stages"].items())
        times = f"{row['seconds'] / edit:.2f}" if edit else "–"
        lines.append(f"| {name} | {row['pixels']:.2f} | {row.get('passes', 0)} | {row['seconds']:.3f} | {times} "
                     f"| {peak} | {stages} |")  # fmt: skip
    lines += ["", *(f"{what}: {x['value']:.2f}, wanted {x['bar']:g} at most{'' if x['met'] else ' (missed)'}"
                    for what, x in bars(rows, large, small).items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Seconds over the edited pixels, a line a picture size; needs matplotlib."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
        done = [r for r in rows.values() if "seconds" in r]
        for size, detail in dict.fromkeys((tuple(r["picture"]), r["detail"]) for r in done):
            points = sorted(
                (r["pixels"], r["seconds"]) for r in done if (*r["picture"],) == size and r["detail"] == detail
            )
            axes.plot(*zip(*points), marker="o", label=f"{size[0]} x {size[1]}, {detail}")
        axes.set(xlabel="edited pixels of the picture, million", ylabel="seconds", ylim=(0, None))
        axes.legend()
        figure.savefig(path, dpi=110)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--areas", type=float, nargs="+", default=[0.025, 0.05, 0.1], help="edited shares")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--runner", default=None, help="default: graph on a GPU, else eager")
    parser.add_argument("--side", type=int, help="of the working size in pixels (default 1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=4.0, help="seconds after which a row is not repeated")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    args.runner = args.runner or ("graph" if torch.device(args.device).type == "cuda" else "eager")
    bench = Bench(args)
    large, small = ((times * args.side, times * args.side * 3 // 4) for times in (4, 2))
    cases = {"edit": ((args.side, args.side), 0.05, "working")}
    # the bar's rows first
    cases |= {named(*case): case for case in ((large, 0.05, "native"), (large, 0.05, "working"))}
    every = itertools.product((large, small), args.areas, ("native",))
    cases |= {named(*case): case for case in every}
    measures = {name: partial(bench.figures, *case) for name, case in cases.items()}
    rows = base.run_rows(
        measures, base.setting(args), args.out, "native", partial(report, large=large, small=small),
        lambda rows: {"bars": bars(rows, large, small)},
    )  # fmt: skip
    plot(rows, args.out / "native.png")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
