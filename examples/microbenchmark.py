# SPDX-License-Identifier: Apache-2.0
"""Time mixed_res_attn beside scaled_dot_product_attention with the same bias, and check that they agree first.

    python examples/microbenchmark.py                              # sizes for a CPU; for a GPU where there is one
    python examples/microbenchmark.py --queries 922 --keys 8704 --heads 24 --dim 128

A row is timed only after its result is held against float64. bench/kernels has the full benchmarks with all peers.
"""

import argparse
import math

import torch
from torch.utils.benchmark import Timer

from specedit_kernels import ops


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=922 if cuda else 64)
    parser.add_argument("--keys", type=int, default=8704 if cuda else 512)
    parser.add_argument("--heads", type=int, default=24 if cuda else 4)
    parser.add_argument("--dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each row")
    args = parser.parse_args()

    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    q = torch.randn(1, args.queries, args.heads, args.dim, device=device, dtype=dtype)
    k, v = (torch.randn(1, args.keys, args.heads, args.dim, device=device, dtype=dtype) for _ in range(2))
    # fine keys, then coarse ones, as a mixed sequence has them
    bias = torch.zeros(1, args.keys, device=device)
    bias[:, args.keys // 2 :] = math.log(4)

    def specedit():
        return ops.mixed_res_attn(q, k, v, key_bias=bias)[0]

    def sdpa(q=q, k=k, v=v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = bias.to(q.dtype)[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    exact = sdpa(*(t.double() for t in (q, k, v)))
    backend, reason = ops.backend_of("mixed_res_attn", device)
    print(f"{device}, {dtype}, {args.queries} x {args.keys}, {args.heads} heads of {args.dim}; "
          f"backend {backend}" + (f" ({reason})" if reason else ""))  # fmt: skip
    flops = 4 * args.queries * args.keys * args.heads * args.dim
    for name, call in (("mixed_res_attn", specedit), ("SDPA with the bias", sdpa)):
        error = ((call() - exact).norm() / exact.norm()).item()
        if error > (1e-5 if dtype == torch.float32 else 1e-2):
            raise SystemExit(f"{name}: relative error {error:.1e}, not timed")
        seconds = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=args.seconds).median
        print(f"{name:<20} {seconds * 1e6:10.1f} µs  {flops / seconds / 1e12:8.3f} TFLOP/s  error {error:.1e}")


if __name__ == "__main__":
    main()
