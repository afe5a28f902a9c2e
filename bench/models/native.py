# SPDX-License-Identifier: Apache-2.0
"""Seconds of an edit of a large picture with detail="native", FLUX.1-Kontext at full size, with random weights.

    python bench/models/native.py --out runs/models            # one GPU with 40 GB or more, under two minutes
    python bench/models/native.py --tiny --out /tmp/models     # a tiny model on any machine, to try the script
    python bench/models/native.py --out runs/models --draw     # .png again from a .json

A box of the picture is given as the region. All is timed but the text: from an array on the host to the edited array on
the host, at the source's size. "edit": a picture of the working size. The others: several areas of one picture, and one
area of pictures of several sizes; each in millions of the picture's own pixels. Writes OUT/native.json, .md and, with
matplotlib, .png.
"""

import argparse
import contextlib
import itertools
import json
import math
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
# The same pixels edited in a larger picture: what the second passes may take of those in the smaller one.
OF_EQUAL_PIXELS = 1.3
SHARE = 0.05  # of the large picture, that the bar is about


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
        return self.pipe(image=picture, region=box, detail=detail, output_size="source", output_type="np",
                         specedit=config, generator=torch.Generator().manual_seed(0), **options)  # fmt: skip

    def check(self, picture, box, edited):
        """AssertionError where pixels outside the region have changed. Not timed: it takes as long as a small edit."""
        outside = np.ones(picture.shape[:2], bool)
        # the region in whole tokens and its seam are within this
        (left, top, right, bottom), near = box, 4 * max(picture.shape[:2]) // self.args.side * 16
        outside[max(top - near, 0) : bottom + near, max(left - near, 0) : right + near] = False
        if not np.array_equal(edited[outside], picture[outside]):
            raise AssertionError("pixels outside the region have changed")

    def row(self, size, share, detail):
        """(a Row of a box with that share of a picture of (width, height), in its aspect, off its middle; a list that
        has the last call's result; what checks that)."""
        picture, edge = self.picture(*size), share**0.5
        box = [round(side * (0.45 + way * edge / 2)) for way in (-1, 1) for side in size]
        seen = []

        def run():
            seen[:] = [self.call(picture, box, detail)]
            return seen[0].stats

        def warm():
            run()
            run()  # the first one lets kept buffers grow, for which steps are captured anew

        facts = {"picture": size, "area": share, "pixels": share * size[0] * size[1] / 1e6, "detail": detail}
        return base.Row(run, warm, facts=facts), seen, lambda: self.check(picture, box, seen[0].images[0])

    def figures(self, size, share, detail):
        row, seen, check = self.row(size, share, detail)
        found = self.measure(row)
        check()
        stats = seen[0].stats
        found["edited"] = stats.edited[0]
        if stats.native and stats.native[0] is not None:
            found["native"] = str(stats.native[0])
            found["passes"] = len(stats.native[0].windows)
        return found


def named(size, share, detail):
    return f"{size[0]} x {size[1]}, {100 * share:.3g} %, {detail}"


def bars(rows, large):
    """{what: {"value", "bar", "met"}} of the bars that the rows so far decide."""
    found = {}

    def add(what, value, bar):
        found[what] = {"value": value, "bar": bar, "met": value <= bar}

    edit, wanted = rows.get("edit", {}).get("seconds"), named(large, SHARE, "native")
    if edit and rows.get(wanted, {}).get("seconds"):
        add(f"{wanted}: times the edit", rows[wanted]["seconds"] / edit, TIMES_THE_EDIT)
        if "peak_bytes" in rows[wanted]:
            peak = rows[wanted]["peak_bytes"] + rows[wanted].get("graph_bytes", 0)
            add(f"{wanted}: peak, GiB", peak / 2**30, PEAK_GIB)
    passes = sorted((tuple(r["picture"]), r["pixels"], r["stages"]["native"]) for r in rows.values() if r.get("passes"))
    for (first, few, before), (second, many, after) in itertools.combinations(passes, 2):
        if first != second and math.isclose(few, many, rel_tol=0.02):
            what = (
                f"second passes over {many:.2f} million pixels of {second[0]} x {second[1]}, times those of {first[0]}"
            )
            add(f"{what} x {first[1]}", after / before, OF_EQUAL_PIXELS)
    return found


def report(head, rows, large):
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
                    for what, x in bars(rows, large).items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Seconds over the edited pixels of one picture, and over the picture's pixels with as many edited; needs
    matplotlib."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        native = [r for r in rows.values() if r.get("passes")]
        if not native:
            return
        counts = [round(r["pixels"], 2) for r in native]
        size, area = (max(set(x), key=x.count) for x in ([tuple(r["picture"]) for r in native], counts))
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharey=True)
        panels = (
            (f"of {size[0]} x {size[1]} pixels", "edited pixels, million", lambda r: r["pixels"],
             [r for r in native if tuple(r["picture"]) == size]),
            (f"{area:g} million pixels edited", "pixels of the picture, million", lambda r: np.prod(r["picture"]) / 1e6,
             [r for r, n in zip(native, counts) if n == area]),
        )  # fmt: skip
        for at, (title, label, x, part) in zip(axes, panels):
            part = sorted(part, key=x)
            for name, y in (
                ("the whole call", lambda r: r["seconds"]), ("the second passes", lambda r: r["stages"]["native"])
            ):  # fmt: skip
                at.plot([x(r) for r in part], [y(r) for r in part], marker="o", label=name)
            at.set(title=title, xlabel=label, xlim=(0, None), ylim=(0, None))
            at.legend()
        axes[0].set(ylabel="seconds")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--areas", type=float, nargs="*", default=[0.0125, 0.025, 0.1], help="further edited shares of "
                        "a picture of four times the side")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 8], help="of further pictures, in sides; as many "
                        "pixels are edited")  # fmt: skip
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--runner", default=None, help="default: graph on a GPU, else eager")
    parser.add_argument("--side", type=int, help="of the working size in pixels (default 1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=4.0, help="seconds after which a row is not repeated")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args(argv)
    if args.draw:
        return plot(json.loads((args.out / "native.json").read_text())["rows"], args.out / "native.png")
    args.side = args.side or (128 if args.tiny else 1024)
    args.runner = args.runner or ("graph" if torch.device(args.device).type == "cuda" else "eager")
    bench = Bench(args)

    def picture(times):
        return times * args.side, times * args.side * 3 // 4

    large, pixels = picture(4), math.prod(picture(4)) * SHARE
    # the bar's rows first
    cases = [(large, SHARE, "native"), (large, SHARE, "working")]
    cases += [(picture(n), pixels / math.prod(picture(n)), "native") for n in args.sizes]
    cases += [(large, share, "native") for share in args.areas]
    measures = {"edit": partial(bench.figures, (args.side, args.side), SHARE, "working")}
    measures |= {named(*case): partial(bench.figures, *case) for case in cases}
    rows = base.run_rows(
        measures, base.setting(args), args.out, "native", partial(report, large=large),
        lambda rows: {"bars": bars(rows, large)},
    )  # fmt: skip
    plot(rows, args.out / "native.png")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
