# SPDX-License-Identifier: Apache-2.0
"""gated_residual_add_: residual and branch read once, residual written once; bound by memory. bf16, 3072 channels."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

CHANNELS, DTYPE = 3072, torch.bfloat16
# (tokens of the residual, active ones or None for all)
CASES = ((1024, None), (8704, None), (8704, 922))


def _name(case):
    return f"{case[0]}" + (f", {case[1]} scattered" if case[1] else "")


def _eager(residual, x, gate, places):
    """What diffusers' blocks compute, on all tokens or added to their rows."""
    update = gate[:, None] * x
    if places is None:
        residual += update
    else:
        residual.index_add_(1, places, update)


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_gated_residual_add(timed, benchmark, case, impl):
    tokens, active = case
    count = active or tokens
    places = torch.randperm(tokens, device="cuda")[:active].sort().values if active else None
    index = places.int()[None] if active else None
    gate = torch.randn(1, CHANNELS, device="cuda", dtype=DTYPE) * 0.5

    def make():
        return tuple(torch.randn(1, n, CHANNELS, device="cuda", dtype=DTYPE) for n in (tokens, count))

    def check(tensors, fn):
        exact = tensors[0].double()
        _eager(exact, tensors[1].double(), gate.double(), places)
        fn(*tensors)
        return relative_error(*([x if places is None else x[:, places]] for x in (tensors[0], exact)))

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda residual, x: torch.ops.specedit.gated_residual_add_(residual, x, gate, index=index),
        "eager": lambda residual, x: _eager(residual, x, gate, places),
        "torch.compile": lambda residual, x: compiled(residual, x, gate, places),
    }
    moved = 3 * count * CHANNELS * DTYPE.itemsize + (4 * count if active else 0)
    measure(timed, benchmark, impl, make, fns, moved, check, op="gated_residual_add_", shape=_name(case), dtype=DTYPE)
