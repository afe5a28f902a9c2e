# SPDX-License-Identifier: Apache-2.0
"""Plots of mixed_res_attn and its peers: ``python bench/kernels/plot_mixed_res_attn.py OUT [--no-flex]``.

Left: TFLOP/s over the number of queries at 8704 keys. Right: time over the active share of 8704 rows, of gathering the
queries, attending to all keys and scattering the result. B=1, 24 heads of 128, bf16; weights 1 and 4 alternate, the
worst order, and for one line stand as in a mixed sequence; all callables of a point are timed in turn. Writes
OUT/mixed_res_attn.json, after the left half too, and with matplotlib OUT/mixed_res_attn.png.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import _attention
import _timing

import specedit_kernels  # noqa: F401  registers the ops

ROWS = 8704
QUERIES = (128, 256, 512, 922, 1536, 2304, 3072, 4608, 6144, 8704)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def _timed(fns):
    """{name: µs} of the callables that run here."""
    live = {}
    for name, fn in fns.items():
        try:
            fn()
            live[name] = fn
        except Exception as problem:  # a library that fails costs its own line only
            print(f"left out: {name}: {str(problem).splitlines()[0]}")
    return _timing.interleaved_us(live, budget_ms=50.0)


def _peers(q, k, v, bias, flex):
    return {
        name: fn for name, (fn, _) in _attention.baselines(q, k, v, bias).items() if flex or not name.startswith("flex")
    }


def over_queries(flex):
    """[{"queries": int, "us": {name: µs}, "tflops": {name: TFLOP/s}}]"""
    points = []
    for queries in QUERIES:
        q, k, v, bias = _attention.inputs(queries, ROWS)

        def ours(q=q, k=k, v=v, bias=bias):
            return torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)

        sorted_bias = bias.sort().values.contiguous()

        def in_order(q=q, k=k, v=v, bias=sorted_bias):
            return torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)

        fns = {"specedit cuda + bias, 1 then 4": _attention.forced("cuda", in_order)}
        fns |= {f"specedit {backend} + bias": _attention.forced(backend, ours) for backend in ("cuda", "triton")}
        us = _timed({**fns, **_peers(q, k, v, bias, flex)})
        rate = {name: _attention.flops(queries, ROWS) / time / 1e6 for name, time in us.items()}
        points.append({"queries": queries, "us": us, "tflops": rate})
        print(queries, {name: round(value) for name, value in rate.items()}, flush=True)
    return points


def over_share(flex):
    """[{"share": float, "us": {name: µs}}] of gather, attention and scatter together."""
    points = []
    for share in SHARES:
        all_q, k, v, bias = _attention.inputs(ROWS, ROWS)
        out = torch.zeros_like(all_q)
        index = torch.randperm(ROWS, device=all_q.device)[: round(share * ROWS)].sort().values
        q, index32 = all_q[:, index], index.int()[None]

        def ours(out=out, q=all_q, k=k, v=v, bias=bias, index=index32):
            return torch.ops.specedit.mixed_res_attn_scatter_(out, q, k, v, index, key_bias=bias, q_index=index)

        def whole(attend, out=out, all_q=all_q, q=q, index=index):
            q.copy_(all_q.index_select(1, index))  # the callable reads this q
            out.index_copy_(1, index, attend())

        fns = {f"specedit {backend} + bias": _attention.forced(backend, ours) for backend in ("cuda", "triton")}
        for name, attend in _peers(q, k, v, bias, flex).items():
            fns[name] = lambda attend=attend, whole=whole: whole(attend)
        points.append({"share": share, "us": _timed(fns)})
        print(share, {name: round(value, 1) for name, value in points[-1]["us"].items()}, flush=True)
    return points


def draw(report, path):
    """Both plots in one PNG; nothing without matplotlib."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = dict.fromkeys(name for points, key in ((report["queries"], "tflops"), (report["shares"], "us"))
                              for point in points for name in point[key])  # fmt: skip
        colour = {name: f"C{i}" for i, name in enumerate(names)}
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
        for axes, points, x, y in (
            (left, report["queries"], "queries", "tflops"), (right, report["shares"], "share", "us"),
        ):  # fmt: skip
            for name in names:
                shown = [(point[x], point[y][name]) for point in points if name in point[y]]
                if shown:
                    axes.plot(*zip(*shown), marker="o", label=name, color=colour[name])
            axes.set_xlabel(x if x == "queries" else f"share of {ROWS} rows that are active")
            axes.grid(alpha=0.3)
        left.set_ylabel("TFLOP/s")
        left.set_title(f"attention of all queries to {ROWS} keys")
        right.set_ylabel("µs")
        right.set_title("gather, attention, scatter")
        left.legend(fontsize="small")
        right.legend(fontsize="small")
        e = report["environment"]
        figure.suptitle(f"{e['gpu']}, torch {e['torch']}, triton {e['triton']}, commit {e['commit']}", fontsize="small")
        figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-flex", action="store_true", help="FlexAttention compiles anew at each point")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"environment": _timing.environment(), "queries": over_queries(not args.no_flex), "shares": []}
    (args.out / "mixed_res_attn.json").write_text(json.dumps(report, indent=1))
    report["shares"] = over_share(not args.no_flex)
    (args.out / "mixed_res_attn.json").write_text(json.dumps(report, indent=1))
    draw(report, args.out / "mixed_res_attn.png")


if __name__ == "__main__":
    main()
