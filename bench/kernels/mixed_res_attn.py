# SPDX-License-Identifier: Apache-2.0
"""mixed_res_attn against the libraries, at B=1, 24 heads of 128, bf16, key bias on."""

import functools

import _attention
import _timing
import pytest
import torch

IMPLS = ("specedit", "specedit cuda", "specedit cuda, sorted bias", "flex + bias", "cudnn + bias", "cudnn", "fa3")


@functools.lru_cache(maxsize=1)
def _compared(shape):
    """One shape, timed side by side.

    Returns {impl: (callable, key bias or not, error, within budget, budget, warm µs)} and {impl: exception}.
    """
    q, k, v, bias = _attention.inputs(*shape)
    # Coarse keys after fine ones: the bias of almost every K tile is one number.
    order = bias[0].sort(stable=True).indices
    sorted_bias = bias[:, order].contiguous()
    sorted_k, sorted_v = k[:, order], v[:, order]

    def ours():
        return torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)

    def ours_sorted():
        return torch.ops.specedit.mixed_res_attn(q, sorted_k, sorted_v, key_bias=sorted_bias)

    fns = {
        "specedit": (ours, True),
        "specedit cuda": (_attention.forced("cuda", ours), True),
        "specedit cuda, sorted bias": (_attention.forced("cuda", ours_sorted), True),
    }
    fns.update(_attention.baselines(q, k, v, bias))
    checks = {True: _attention.Check(q, k, v, bias), False: _attention.Check(q, k, v)}
    rows, failed = {}, {}
    for impl, (fn, biased) in fns.items():
        try:
            result = fn()
        except Exception as problem:  # noqa: BLE001  a library that fails costs its own row only
            failed[impl] = problem
            continue
        error, ok = checks[biased](*result) if isinstance(result, tuple) else checks[biased](result)
        rows[impl] = fn, biased, error, ok, checks[biased].budget
    warm = _timing.interleaved_us({impl: row[0] for impl, row in rows.items()})
    return {impl: (*row, warm[impl]) for impl, row in rows.items()}, failed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", _attention.SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_dense(timed, shape, impl):
    rows, failed = _compared(shape)
    if impl in failed:
        if "cannot serve" in str(failed[impl]):
            pytest.skip(str(failed[impl]))
        raise failed[impl]
    if impl not in rows:
        pytest.skip(f"{impl} is not installed")
    fn, biased, error, ok, budget, warm = rows[impl]
    timed(
        fn, op="mixed_res_attn", impl=impl, shape=f"{shape[0]}x{shape[1]} H24 D128", dtype=torch.bfloat16,
        flops=_attention.flops(*shape), error=error, error_ok=ok, warm_us=warm, error_budget=budget, key_bias=biased,
    )  # fmt: skip
    if impl.startswith("specedit"):
        assert ok, f"error {error:.3e} exceeds the budget {budget:.3e}"


@pytest.mark.parametrize("impl", ("specedit", "specedit kv_index", "specedit cuda kv_index", "index_select + specedit"))
def test_gathered_keys(timed, impl):
    """922 queries against 5120 rows of a buffer of 8704, given by index, copied first, or already dense."""
    q, k, v, bias = _attention.inputs(922, 8704)
    index = torch.randperm(8704, device="cuda")[:5120].sort().values.int()
    attn = torch.ops.specedit.mixed_res_attn
    wide = index.long()
    dense = k[:, wide], v[:, wide], bias[:, wide]

    def by_index():
        return attn(q, k, v, key_bias=bias, kv_index=index[None])

    def by_copy():
        return attn(q, k[:, wide], v[:, wide], key_bias=bias[:, wide])

    def already_dense():
        return attn(q, dense[0], dense[1], key_bias=dense[2])

    fn = {
        "specedit": already_dense,
        "specedit kv_index": by_index,
        "specedit cuda kv_index": _attention.forced("cuda", by_index),
        "index_select + specedit": by_copy,
    }[impl]
    check = _attention.Check(q, *dense)
    error, ok = check(*fn())
    timed(
        fn, op="mixed_res_attn gather", impl=impl, shape="922x5120 of 8704 H24 D128", dtype=q.dtype,
        flops=_attention.flops(922, 5120), error=error, error_ok=ok, error_budget=check.budget, key_bias=True,
    )  # fmt: skip
    assert ok, f"error {error:.3e} exceeds the budget {check.budget:.3e}"


@pytest.mark.parametrize("head_dim", (64,))
def test_head_dim(timed, head_dim):
    q, k, v, bias = _attention.inputs(4608, 4608, head_dim=head_dim)

    def fn():
        return torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)

    check = _attention.Check(q, k, v, bias)
    error, ok = check(*fn())
    timed(
        fn, op="mixed_res_attn", impl="specedit", shape=f"4608x4608 H24 D{head_dim}", dtype=q.dtype,
        flops=_attention.flops(4608, 4608, head_dim=head_dim), error=error, error_ok=ok, error_budget=check.budget,
    )  # fmt: skip
    assert ok, f"error {error:.3e} exceeds the budget {check.budget:.3e}"
