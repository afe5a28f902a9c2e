# SPDX-License-Identifier: Apache-2.0
"""Right edits over seconds, of the qualities, plain steps and peers: docs/img/qualities.png, from bench/results alone.

    python bench/quality/plot_qualities.py [--out docs/img/qualities.png]

Seconds and quality of a point are of one setting, the seconds at full size with random weights, the quality on the tiny
FLUX editor. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LATEST = ROOT / "bench" / "results" / "latest"
KINDS = ("local", "small", "ambiguous")
SEED = 20241281  # of solver_tiers.json; not looked at before the qualities were chosen
# label: (row of qualities.json, row of solver_tiers.json)
QUALITIES = {
    "9 plain, compiled": ("compiled plain-9", "plain-9"),
    "fast": ("quality fast graph, 10%", "3+3 half ck lt"),
    "balanced": ("quality balanced graph, 10%", "4+5 ck2 lt kv 2"),
    "best": ("quality best graph, 10%", "7+5 ck4 lt kv 2"),
}
# label: (row of flux_kontext.json, row of quality_table.json), other edits of the same editor, the same card
TABLE = {
    "50 plain, eager": ("plain-50", "plain-50"),
    "9 plain, compiled": ("compiled plain-9", "plain-9"),
    "preset=9, bracket": ("specedit-9-locked-bracket graph, 10%", "9-coarse-locked-bracket"),
    "kv_refresh=1": ("specedit-9-locked graph, 10%", "9-coarse-locked"),
    "kv_refresh=9": ("specedit-9-locked-cached graph, 10%", "9-coarse-locked-kv9"),
}
# Their quality was not measured.
PEERS = {
    "TaylorSeer, 28": "taylorseer-28",
    "FirstBlockCache, 28": "first block cache-28",
    "28, compiled": "compiled plain-28",
}


def read(device, name):
    return json.loads((LATEST / device / name).read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "qualities.png")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    seconds, timed = read("h200", "qualities.json")["rows"], read("h200", "flux_kontext.json")["rows"]
    table, peers = read("h200", "quality_table.json")["rows"], read("h100-80gb-hbm3", "flux_kontext.json")["rows"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    [judged] = (run["rows"] for run in read("h200", "solver_tiers.json")["runs"] if run["seed"] == SEED)
    for kind, axis in zip(KINDS, axes):
        axis.axhline(
            judged["plain-50"][kind]["right"], color="0.7", linewidth=1, label="50 plain steps, the same edits"
        )
        for label, (row, name) in QUALITIES.items():
            x, y = seconds[row]["seconds"], judged[name][kind]["right"]
            axis.plot(x, y, "o", color="C0", label=f"340 edits of seed {SEED}" if label == "best" else None)
            at = dict(xytext=(-4, -9), ha="right") if label == "balanced" else dict(xytext=(4, 4))
            axis.annotate(label, (x, y), textcoords="offset points", fontsize=7, **at)
        for label, (row, of) in TABLE.items():
            x, y = timed[row]["seconds"], table[of]["summary"][kind]["right"]
            axis.plot(
                x, y, "s", color="C1", markersize=4, label="former run, other edits" if row == "plain-50" else None
            )
            axis.annotate(label, (x, y), xytext=(4, -9), textcoords="offset points", fontsize=6, color="0.4")
        low = 0.4
        for j, (label, row) in enumerate(PEERS.items()):
            x = peers[row]["seconds"]
            axis.plot(x, low, "|", color="C2", markersize=9, label="seconds alone (H100)" if j == 0 else None)
            axis.annotate(label, (x, low), xytext=(-2, 6 + 8 * j), textcoords="offset points", fontsize=6, ha="right")
        axis.set(xscale="log", xlim=(0.2, 45), title=f"{kind} edits", xlabel="seconds of an edit of 10 %")
        axis.set_xticks([0.25, 0.5, 1, 2, 5, 10, 20], ["0.25", "0.5", "1", "2", "5", "10", "20"])
        axis.minorticks_off()
    axes[0].set_ylabel("right")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(args.out)


if __name__ == "__main__":
    main()
