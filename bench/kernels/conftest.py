# SPDX-License-Identifier: Apache-2.0
"""Kernel benchmarks: ``pytest bench/kernels -o python_files='*.py'`` (a GPU is needed; else all are skipped)."""

import sys
from pathlib import Path

import pytest
import torch

import specedit_kernels  # noqa: F401  registers torch.ops.specedit

sys.path.insert(0, str(Path(__file__).parent))

_rows = []


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="kernel benchmarks need a CUDA device"))


@pytest.fixture
def timed(benchmark):
    """``_timing.measure`` bound to this test; what it returns is also kept for the table at the end of the run."""
    from _timing import measure

    def run(fn, **kwargs):
        info = measure(benchmark, fn, **kwargs)
        _rows.append(info)
        return info

    return run


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    first = _rows[0]
    terminalreporter.section("device medians")
    names = ("gpu", "torch", "triton", "cuda", "cudnn", "commit")
    terminalreporter.write_line(", ".join(f"{name} {first[name]}" for name in names))
    own = {(row["op"], row["shape"], row["dtype"]): row for row in _rows if row["impl"] == "specedit"}
    for row in _rows:
        line = (
            f"{row['op']:<22}{row['shape']:<34}{row['dtype']:<10}{row['impl']:<24}"
            f"{row['warm_us']:>10.1f} us warm {row['cold_us']:>10.1f} us cold"
        )
        if "tflops" in row:
            line += f" {row['tflops']:>7.1f} TFLOP/s = {row['fraction_of_matmul']:.2f} of matmul"
        if "gbps" in row:
            line += f" {row['cold_gbps']:>7.0f} GB/s = {row['fraction_of_copy']:.2f} of copy"
        if row["error"] is not None:
            line += f"  error {row['error']:.2e}"
        mine = own.get((row["op"], row["shape"], row["dtype"]))
        if mine is not None and mine is not row:
            # No ratio is quoted for a result that is not right.
            if mine["error_ok"] and row["error_ok"]:
                line += f"  specedit is {row['warm_us'] / mine['warm_us']:.2f}x as fast"
            else:
                line += "  no ratio: an error check failed"
        terminalreporter.write_line(line)
