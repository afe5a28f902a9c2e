# SPDX-License-Identifier: Apache-2.0
"""A pytest-benchmark JSON of bench/kernels as a Markdown table, and as a small JSON to keep.

    python bench/report.py BENCH.json [--json SLIM.json]

Times are the medians on the GPU that the benchmarks put beside pytest-benchmark's own wall times. A ratio is printed
only between rows of one run whose error checks passed.
"""

import argparse
import json
from pathlib import Path

SHARED = ("gpu", "torch", "triton", "cuda", "cudnn", "driver", "multiprocessors", "commit")


def rows_of(benchmarks):
    """[{name, figures...}] and what all rows share (device, versions, commit)."""
    rows = [dict(benchmark["extra_info"]) for benchmark in benchmarks]
    shared = {key: rows[0][key] for key in SHARED if rows and key in rows[0]}
    return [{k: v for k, v in row.items() if k not in SHARED} for row in rows], shared


def table(rows):
    """Markdown, fastest first within a shape; `ratio` is against our own row of the same op and shape."""
    lines = [
        "| op | shape | implementation | warm µs | cold µs | TFLOP/s or GB/s | error | ours is |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys((row["op"], row["shape"]) for row in rows):
        group = [row for row in rows if (row["op"], row["shape"]) == key]
        own = next((row for row in group if row["impl"] == "specedit"), None)
        for row in sorted(group, key=lambda row: row["warm_us"]):
            rate = f"{row['tflops']:.0f}" if "tflops" in row else f"{row['gbps']:.0f}" if "gbps" in row else "–"
            error = "–" if row.get("error") is None else f"{row['error']:.1e}"
            sound = own is not None and row is not own and row.get("error_ok") and own.get("error_ok")
            ratio = f"{row['warm_us'] / own['warm_us']:.2f} x as fast" if sound else "–"
            lines.append(
                f"| {row['op']} | {row['shape']} | {row['impl']} | {row['warm_us']:.1f} | "
                f"{row['cold_us']:.1f} | {rate} | {error} | {ratio} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--json", type=Path, help="write the figures without pytest-benchmark's rounds")
    args = parser.parse_args()
    content = json.loads(args.file.read_text())
    rows, shared = rows_of(content["benchmarks"])
    shared["date"] = content["datetime"][:19]
    print(", ".join(f"{key} {value}" for key, value in shared.items()), end="\n\n")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**shared, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
