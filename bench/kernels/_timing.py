# SPDX-License-Identifier: Apache-2.0
"""Device timing shared by the kernel benchmarks.

Wall time of a microsecond kernel is launch noise, so each benchmark puts device medians into pytest-benchmark's
``extra_info``: from CUDA graphs (warm L2) and from events after a flush of the L2 (cold).
"""

import functools
import os
import random
import statistics
import subprocess
from pathlib import Path

import torch

# Many times the 50 MB L2 of an H100: reading it takes longer than the host needs for a launch.
FLUSH_BYTES = 1 << 30


def _median_event_us(run, rounds, calls, before=None):
    pairs = []
    for _ in range(rounds):
        if before is not None:
            before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / calls


def interleaved_us(fns, budget_ms=100.0, rounds=10):
    """{name: median device time of one call in µs}, warm L2, of the callables in ``fns``, {name: callable}.

    Each is captured many times over in a CUDA graph; the graphs are replayed in turn, each round in another order, so
    that a drift of the clocks, and what the one before leaves of power and L2, is the same for all of them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs, times = {}, {name: [] for name in fns}
    with torch.cuda.stream(stream):
        for name, fn in fns.items():
            for _ in range(3):
                fn()
            stream.synchronize()
            estimate = max(_median_event_us(fn, 5, 1), 1.0)
            calls = int(min(max(1.0, budget_ms * 1e3 / rounds / estimate), 200))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(calls):
                    fn()
            graph.replay()
            graphs[name] = graph, calls
        shuffle = random.Random(0).shuffle
        for _ in range(rounds):
            turn = list(graphs.items())
            shuffle(turn)
            for name, (graph, calls) in turn:
                times[name].append(_median_event_us(graph.replay, 1, calls))
    torch.cuda.current_stream().wait_stream(stream)
    return {name: statistics.median(values) for name, values in times.items()}


def graph_us(fn, budget_ms=100.0):
    """Median device time of one call in µs, warm L2, from replays of a CUDA graph that holds many calls."""
    return interleaved_us({"": fn}, budget_ms)[""]


def cold_us(fn, rounds=20):
    """Median device time of one call in µs after a flush of the L2.

    The flush reads: lines that were written would go back to memory while `fn` is timed.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for _ in range(3):
        fn()
    return _median_event_us(fn, rounds, 1, before=flush.sum)


@functools.cache
def copy_ceiling_gbps():
    """Bytes read and written per second by a device copy of 1 GiB, in GB/s: the ceiling of a memory-bound kernel."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_us(lambda: target.copy_(source)) / 1e3


@functools.cache
def matmul_ceiling_tflops(dtype=torch.bfloat16):
    """TFLOP/s of an 8192³ matmul: the ceiling of a kernel that is bound by the tensor cores."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    b = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    return 2 * 8192**3 / graph_us(lambda: a @ b) / 1e6


def _commit():
    if os.environ.get("SPECEDIT_COMMIT"):
        return os.environ["SPECEDIT_COMMIT"]
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _sm_clock_mhz():
    try:
        return torch.cuda.clock_rate()
    except (ImportError, RuntimeError, AttributeError):  # needs nvidia-ml-py
        return None


@functools.cache
def environment():
    """What a figure depends on besides the code: device, versions, commit."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": _commit(),
    }


def measure(
    benchmark, fn, *, op, impl, shape, dtype, flops=0, moved_bytes=0, error=None, error_ok=None, warm_us=None, **extra
):
    """Time `fn` with pytest-benchmark and put the device medians beside it.

    warm_us: the warm median, where the caller took it side by side with others' (`interleaved_us`).

    flops and moved_bytes count useful work of one call; error is what the caller found against float64, and error_ok
    whether that is within its rule: only then may a speed ratio be quoted. Returns the extra_info dictionary.
    """

    def synced():
        fn()
        torch.cuda.synchronize()

    synced()
    benchmark.group = f"{op} {shape}"
    benchmark.pedantic(synced, rounds=10, iterations=1, warmup_rounds=2)
    warm, cold = graph_us(fn) if warm_us is None else warm_us, cold_us(fn)
    info = {
        "op": op, "impl": impl, "shape": shape, "dtype": str(dtype).removeprefix("torch."),
        "warm_us": round(warm, 2), "cold_us": round(cold, 2), "error": error, "error_ok": error_ok,
        "sm_clock_mhz": _sm_clock_mhz(), **environment(), **extra,
    }  # fmt: skip
    if flops:
        ceiling = matmul_ceiling_tflops()
        info["tflops"] = round(flops / warm / 1e6, 1)
        info["matmul_ceiling_tflops"] = round(ceiling, 1)
        info["fraction_of_matmul"] = round(flops / warm / 1e6 / ceiling, 3)
    if moved_bytes:
        ceiling = copy_ceiling_gbps()
        info["gbps"] = round(moved_bytes / warm / 1e3, 1)
        info["cold_gbps"] = round(moved_bytes / cold / 1e3, 1)
        info["copy_ceiling_gbps"] = round(ceiling, 1)
        info["fraction_of_copy"] = round(moved_bytes / cold / 1e3 / ceiling, 3)
    benchmark.extra_info.update(info)
    return info
