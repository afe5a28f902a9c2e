# SPDX-License-Identifier: Apache-2.0
"""Sweep of the tile sizes of mixed_res_attn on this GPU: ``python bench/kernels/sweep_mixed_res_attn.py --json F``.

Each config is checked against float64 before it is timed, and one that fails (out of shared memory, a wrong result)
is a row of the table and no more. The winners belong into the tables of triton_kernels/mixed_res_attn.py.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import _attention
import _timing

from specedit_kernels.reference.mixed_res_attn import mixed_res_attn as reference
from specedit_kernels.triton_kernels import mixed_res_attn as kernel
from specedit_kernels.triton_kernels.mixed_res_attn import Config

SHAPES = ((8704, 8704), (922, 8704), (1536, 8704))
DENSE = [
    Config(128, 128, 8, 3, tma=True),
    Config(128, 64, 8, 3, tma=True),
    Config(128, 128, 8, 2, tma=True),
    Config(128, 64, 8, 2, tma=True),
    Config(128, 64, 8, 4, tma=True),
    Config(128, 64, 4, 3, tma=True),
    Config(64, 64, 4, 2, tma=True),
    Config(64, 64, 4, 3, tma=True),
    Config(64, 128, 4, 2, tma=True),
    Config(64, 128, 4, 1, tma=True),
    Config(128, 128, 8, 2),
    Config(128, 64, 8, 3),
    Config(64, 64, 4, 2),
]
GATHER = [
    Config(128, 128, 8, 2),
    Config(128, 64, 8, 2),
    Config(128, 64, 8, 3),
    Config(128, 64, 8, 4),
    Config(64, 64, 4, 2),
    Config(64, 64, 4, 3),
]


def call(out, q, k, v, bias, index, config, splits):
    scale = q.shape[-1] ** -0.5
    return kernel._launch(
        out, None, q, k, v, bias, None, index, None, None, None, None, None, None, scale,
        config=config, splits=splits,
    )  # fmt: skip


def label(config):
    copy = "tma" if config.tma else "ptr"
    return f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages} {copy}"


def compile_all(jobs, threads):
    """Compile by a first launch on few rows. A config that cannot be launched is reported later, when it is timed."""

    def first(job):
        config, biased, gathered, splits = job
        q, k, v, bias = _attention.inputs(256, 512)
        index = torch.arange(512, device="cuda", dtype=torch.int32)[None] if gathered else None
        try:
            call(torch.empty_like(q), q, k, v, bias if biased else None, index, config, splits)
        except Exception as error:
            return f"{label(config)}: {type(error).__name__}"

    with ThreadPoolExecutor(threads) as pool:
        return [note for note in pool.map(first, jobs) if note]


def check_features(configs):
    """Each feature under each config, on small shapes, against the reference in float64: (failures, comparisons)."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

    def ints(rows):
        return torch.tensor(rows, device="cuda", dtype=torch.int32)

    def permutations(rows, length):
        return torch.stack([torch.randperm(rows, device="cuda", generator=generator)[:length] for _ in range(2)]).int()

    failures, done = [], 0

    def compare(config, splits, name, out, lse, arguments):
        nonlocal done
        done += 1
        doubles = [x.double() if x is not None and x.is_floating_point() else x for x in arguments[:-3]]
        exact, exact_lse = reference(*doubles, *arguments[-3:])
        error = (out.double() - exact).abs().max().item() if out.numel() else 0.0
        lse_error = (lse.double() - exact_lse).nan_to_num(nan=0.0).abs().max().item() if lse.numel() else 0.0
        if not (error < 0.03 and lse_error < 1e-3 and torch.equal(lse.isinf(), exact_lse.isinf())):
            failures.append(f"{label(config)} splits {splits} {name}: error {error:.2e}, lse {lse_error:.2e}")

    variants = ((1, True, 128), (1, False, 128), (3, True, 128), (1, True, 64), (2, False, 96))
    for config, (splits, biased, head_dim) in itertools.product(configs, variants):
        for num_q, num_k in ((1, 1), (127, 999), (300, 257), (128, 512)):
            q, k, v = (random(2, n, 4, head_dim) for n in (num_q, num_k, num_k))
            k, v = k[:, :, :2], v[:, :, :2]
            bias = random(2, num_k, dtype=torch.float32) if biased else None
            if biased:
                bias[:, ::3] = float("-inf")
                bias[1] = float("-inf") if num_q == 300 else bias[1]
            q_lens, kv_lens = ints([num_q // 2, num_q]), ints([num_k, num_k // 3])
            for lens in (False, True):
                q_index = permutations(num_q, num_q) if lens else None
                if lens:
                    q_index[:, 0] = -1
                options = (bias, q_index, None, q_lens if lens else None, kv_lens if lens else None)
                options += (None,) * 4 + (head_dim**-0.5,)
                kn, vn = k.clone(), v.clone()
                if lens:  # rows past the end are never to be seen
                    for b in range(2):
                        kn[b, kv_lens[b] :] = float("nan")
                        vn[b, kv_lens[b] :] = float("nan")
                out = torch.full_like(q, float("nan"))
                lse = kernel._launch(out, None, q, kn, vn, *options, config=config, splits=splits)
                compare(config, splits, f"{num_q}x{num_k} D{head_dim} {biased} {lens}", out, lse, (q, k, v, *options))
        cu_q, cu_k = ints([0, 5, 5, 140, 147]), ints([0, 130, 133, 133, 300])
        q, k, v = random(150, 4, head_dim), random(310, 2, head_dim), random(310, 2, head_dim)
        bias = random(310, dtype=torch.float32) if biased else None
        options = (bias, None, None, None, None, cu_q, cu_k, 135, 167, -0.1)
        out = torch.full_like(q, float("nan"))
        lse = kernel._launch(out, None, q, k, v, *options, config=config, splits=splits)
        compare(config, splits, f"packed D{head_dim} {biased}", out, lse, (q, k, v, *options))
        # Scatter: rows that are not addressed keep their bits.
        q, k, v = (random(2, n, 4, head_dim) for n in (150, 300, 300))
        options = (None,) * 9 + (head_dim**-0.5,)
        rows = random(2, 200, 4, head_dim)
        index = permutations(200, 150)
        index[:, 7] = -1
        before = rows.clone()
        lse = kernel._launch(rows, index, q, k, v, *options, config=config, splits=splits)
        out = torch.stack([rows[b, index[b].long()] for b in range(2)])
        out[:, 7] = reference(q.double(), k.double(), v.double(), *options)[0][:, 7].to(out.dtype)
        compare(config, splits, f"scatter D{head_dim}", out, lse, (q, k, v, *options))
        untouched = torch.ones(2, 200, dtype=torch.bool, device="cuda")
        for b in range(2):
            untouched[b, index[b][index[b] >= 0].long()] = False
        if not torch.equal(rows[untouched], before[untouched]):
            failures.append(f"{label(config)} splits {splits} scatter D{head_dim}: an untouched row changed")
    return failures, done


def run(name, shape, fn, check, rows, useful):
    row = {"shape": f"{shape[0]}x{shape[1]}", "name": name}
    try:
        result = fn()
        torch.cuda.synchronize()
        error, ok = check(*result) if isinstance(result, tuple) else check(result)
        row.update(error=error, ok=ok, us=_timing.graph_us(fn, budget_ms=60.0))
        row["tflops"] = useful / row["us"] / 1e6
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {str(problem)[:150]}".replace("\n", " ")
    rows.append(row)
    tail = row.get("failed") or (
        f"{row['us']:9.1f} us {row['tflops']:6.1f} TFLOP/s  error {row['error']:.2e} {'ok' if row['ok'] else 'WRONG'}"
    )
    print(f"{row['shape']:<11} {name:<36} {tail}", flush=True)
    return row


def host_us(fn, calls=300):
    """Host time of one launch, from more calls than the device has to wait for."""
    for _ in range(20):
        fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--no-libraries", action="store_true", help="skip FlexAttention, cuDNN and FA3")
    parser.add_argument("--seconds", type=float, default=330.0, help="start no further row after this long")
    parser.add_argument("--check", action="store_true", help="only check the features of the first configs")
    args = parser.parse_args()
    begin = time.time()
    torch.set_grad_enabled(False)
    if args.check:
        failures, done = check_features(DENSE[:2])
        summary = f"features: {done} comparisons, {len(failures)} failed, {time.time() - begin:.0f} s"
        print(summary, *failures, sep="\n  ")
        sys.exit(bool(failures))
    # In a process of its own: a kernel that hangs costs this check, not the sweep.
    try:
        ok = subprocess.run([sys.executable, __file__, "--check"], timeout=150).returncode == 0
    except subprocess.TimeoutExpired:
        ok = False
    print("feature check", "passed" if ok else "FAILED or ran out of time")
    print(_timing.environment())
    jobs = [(c, True, False, 1) for c in DENSE] + [(c, False, False, 1) for c in DENSE]
    jobs += [(c, True, False, 2) for c in DENSE] + [(c, True, True, 1) for c in GATHER]
    print("did not launch:", compile_all(jobs, args.threads), f"({time.time() - begin:.0f} s)")
    print(f"matmul {_timing.matmul_ceiling_tflops():.0f} TFLOP/s, copy {_timing.copy_ceiling_gbps():.0f} GB/s")

    rows = []

    def late():
        return time.time() - begin > args.seconds

    for shape in SHAPES:
        q, k, v, bias = _attention.inputs(*shape)
        useful = _attention.flops(*shape)
        biased, plain = _attention.Check(q, k, v, bias), _attention.Check(q, k, v)
        out = torch.empty_like(q)

        def ours(config, splits, bias=bias, index=None, q=q, k=k, v=v, out=out):
            return lambda: (out, call(out, q, k, v, bias, index, config, splits))

        timed = []
        for config in DENSE:
            if not late():
                row = run(label(config), shape, ours(config, 1), biased, rows, useful)
                timed.append((row.get("us", float("inf")) if row.get("ok") else float("inf"), config))
        timed.sort(key=lambda pair: pair[0])
        best = timed[0][1] if timed else DENSE[0]
        if shape[0] < 2048:
            for config in dict.fromkeys([best, *DENSE[:2]]):
                for splits in (2, 3, 4):
                    if not late():
                        run(f"{label(config)} split {splits}", shape, ours(config, splits), biased, rows, useful)
        for config in dict.fromkeys([best, DENSE[0]]):
            run(f"{label(config)}, no bias", shape, ours(config, 1, bias=None), plain, rows, useful)
        if shape != (1536, 8704):
            index = torch.arange(shape[1], device="cuda", dtype=torch.int32)[None]
            for config in GATHER:
                if not late():
                    run(f"{label(config)} kv_index", shape, ours(config, 1, index=index), biased, rows, useful)
        if not args.no_libraries and not late():
            for name, (fn, has_bias) in _attention.baselines(q, k, v, bias).items():
                run(name, shape, fn, biased if has_bias else plain, rows, useful)
        run(f"{label(best)} again", shape, ours(best, 1), biased, rows, useful)

    q, k, v, bias = _attention.inputs(128, 128)
    out = torch.empty_like(q)
    host = host_us(lambda: call(out, q, k, v, bias, None, DENSE[0], 1))
    host_pointers = host_us(lambda: call(out, q, k, v, bias, None, DENSE[-1], 1))
    print(f"host time of a launch: {host:.1f} us with descriptors, {host_pointers:.1f} us with pointers")
    print(f"{time.time() - begin:.0f} s in all")
    if args.json:
        report = {"environment": _timing.environment(), "host_us": [host, host_pointers], "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
