# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate: each token read once and written once; bound by memory. bf16, 3072 channels."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

CHANNELS, DTYPE = 3072, torch.bfloat16
# (tokens, active ones or None for all, modulation rows)
CASES = ((1024, None, 1), (8704, None, 1), (8704, 922, 1), (8192, None, 2))


def _name(case):
    tokens, active, rows = case
    return f"{tokens}" + (f", {active} gathered" if active else "") + (f", {rows} sets" if rows > 1 else "")


def _eager(x, scale, shift, of_token, index):
    """What diffusers' blocks compute: on gathered tokens, and with the sets of zero_cond_t chosen by `where`."""
    if index is not None:
        x = x.index_select(1, index)
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    if of_token is None:
        return y * (1 + scale[:, None]) + shift[:, None]
    first = of_token[..., None] == 0
    scale, shift = (torch.where(first, v[:, :1], v[:, 1:]) for v in (scale, shift))
    return y * (1 + scale) + shift


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_adaln_modulate(timed, benchmark, case, impl):
    tokens, active, rows = case
    places = torch.randperm(tokens, device="cuda")[:active].sort().values if active else None
    index = places.int()[None] if active else None
    of_token = (torch.arange(tokens, device="cuda") * rows // tokens)[None] if rows > 1 else None
    of_token_i32 = None if of_token is None else of_token.int()
    shape = (1, rows, CHANNELS) if rows > 1 else (1, CHANNELS)
    scale, shift = (torch.randn(shape, device="cuda", dtype=DTYPE) * 0.5 for _ in range(2))

    def make():
        return (torch.randn(1, tokens, CHANNELS, device="cuda", dtype=DTYPE),)

    def check(tensors, fn):
        exact = _eager(tensors[0].double(), scale.double(), shift.double(), of_token, places)
        return relative_error([fn(*tensors)], [exact])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda x: torch.ops.specedit.adaln_modulate(
            x, scale, shift, modulation_index=of_token_i32, index=index
        ),
        "eager": lambda x: _eager(x, scale, shift, of_token, places),
        "torch.compile": lambda x: compiled(x, scale, shift, of_token, places),
    }
    count = active or tokens
    moved = 2 * count * CHANNELS * DTYPE.itemsize + 4 * count * ((active is not None) + (rows > 1))
    measure(timed, benchmark, impl, make, fns, moved, check, op="adaln_modulate", shape=_name(case), dtype=DTYPE)
