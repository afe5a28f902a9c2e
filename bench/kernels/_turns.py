# SPDX-License-Identifier: Apache-2.0
"""Memory-bound ops on inputs that take turns, so that the graph median too reads from device memory, not the L2."""

import itertools

import torch
from _timing import FLUSH_BYTES

IMPLS = ("specedit", "eager", "torch.compile", "copy")


def in_turn(make, moved_bytes):
    """Endless `make()` results, each again after more than twice the L2 was moved. `make` returns a call's tensors."""
    count = min(64, max(2, -(-FLUSH_BYTES // moved_bytes)))
    return itertools.cycle([make() for _ in range(count)])


def relative_error(results, exact):
    """Largest ||result - exact|| / ||exact|| of pairs of tensors."""
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(results, exact, strict=True))


def copies_in_turn(moved_bytes):
    """A call that copies, reading and writing `moved_bytes` together."""

    def make():
        source = torch.randint(-99, 99, (moved_bytes // 2,), dtype=torch.int8, device="cuda")
        return torch.empty_like(source), source

    turn = in_turn(make, moved_bytes)

    def run():
        target, source = next(turn)
        return target.copy_(source)

    return run


def measure(timed, benchmark, impl, make, fns, moved_bytes, check, **info):
    """Time `impl` of {name: callable on a set of tensors} or a copy of as many bytes; of both, the share of a copy.

    check: (set, callable) -> error against float64. The budget is the eager formula's own error, or one rounding.
    """
    if impl == "copy":
        call, error, ok = copies_in_turn(moved_bytes), None, None
    else:
        turn, run = in_turn(make, moved_bytes), fns[impl]
        error, eager_error = (check(make(), fn) for fn in (run, fns["eager"]))
        ok = error <= max(eager_error, torch.finfo(info["dtype"]).eps / 2)

        def call():
            return run(*next(turn))

    measured = timed(call, impl=impl, moved_bytes=moved_bytes, error=error, error_ok=ok, **info)
    benchmark.extra_info["rotating_fraction_of_copy"] = round(measured["gbps"] / measured["copy_ceiling_gbps"], 3)
    if impl == "specedit":
        assert ok, f"error {error:.3e}"
