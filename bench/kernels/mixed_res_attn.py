# SPDX-License-Identifier: Apache-2.0
"""mixed_res_attn against the libraries, at B=1, 24 heads of 128, bf16; the rows of a table are timed in turn."""

import functools

import _attention
import _timing
import pytest
import torch

ROWS = 8704  # of the buffers that rows are taken from
IMPLS = (
    "specedit", "specedit cuda", "specedit cuda, sorted bias", "specedit cuda, normal bias", "specedit cuda, no bias",
    "flex + bias", "cudnn + bias", "cudnn", "fa3", "fa3, 2 splits",
)  # fmt: skip


attn = torch.ops.specedit.mixed_res_attn


def _some_rows(count):
    """`count` of the ROWS rows, in random order."""
    return torch.randperm(ROWS, device="cuda", generator=torch.Generator("cuda").manual_seed(1))[:count]


def _in_turn(cases):
    """cases: {impl: (callable, its check or None, whether it adds a bias, and where not all of its result is to be
    checked, what takes the part)}.

    Returns {impl: (callable, its figures for `timed`)} and {impl: exception}.
    """
    rows, failed = {}, {}
    for impl, (fn, check, biased, *part) in cases.items():
        try:
            result = part[0](fn()) if part else fn()
        except Exception as problem:  # a library that fails costs its own row only
            failed[impl] = problem
            continue
        figures = dict(error=None, error_ok=None, error_budget=None, key_bias=biased)
        if check is not None:
            error, ok = check(*result) if isinstance(result, tuple) else check(result)
            figures |= dict(error=error, error_ok=ok, error_budget=check.budget)
        rows[impl] = fn, figures
    warm = _timing.interleaved_us({impl: fn for impl, (fn, _) in rows.items()})
    return {impl: (fn, figures | dict(warm_us=warm[impl])) for impl, (fn, figures) in rows.items()}, failed


def _row(timed, cases, impl, **what):
    rows, failed = cases
    if impl in failed:
        if "cannot serve" in str(failed[impl]):
            pytest.skip(str(failed[impl]))
        raise failed[impl]
    if impl not in rows:
        pytest.skip(f"{impl} is not installed")
    fn, figures = rows[impl]
    timed(fn, impl=impl, dtype=torch.bfloat16, **what, **figures)
    if figures["error_ok"] is not None and "specedit" in impl:
        assert figures["error_ok"], f"error {figures['error']:.3e} exceeds the budget {figures['error_budget']:.3e}"


@functools.lru_cache(maxsize=1)
def _dense(shape):
    q, k, v, bias = _attention.inputs(*shape)
    # Coarse keys after fine ones: the bias of almost every K tile is one number.
    in_order = bias.sort().values.contiguous()
    normal = torch.randn(bias.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    check, plain = _attention.Check(q, k, v, bias), _attention.Check(q, k, v)

    def by_cuda(bias):
        return _attention.forced("cuda", lambda: attn(q, k, v, key_bias=bias))

    cases = {
        "specedit": (lambda: attn(q, k, v, key_bias=bias), check, True),
        "specedit cuda": (by_cuda(bias), check, True),
        "specedit cuda, sorted bias": (by_cuda(in_order), _attention.Check(q, k, v, in_order), True),
        "specedit cuda, normal bias": (by_cuda(normal), _attention.Check(q, k, v, normal), True),
        "specedit cuda, no bias": (by_cuda(None), plain, False),
    }
    for impl, (fn, biased) in _attention.baselines(q, k, v, bias).items():
        cases[impl] = fn, check if biased else plain, biased
    return _in_turn(cases)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", _attention.SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_dense(timed, shape, impl):
    _row(timed, _dense(shape), impl, op="mixed_res_attn", shape=f"{shape[0]}x{shape[1]} H24 D128",
         flops=_attention.flops(*shape))  # fmt: skip


@functools.lru_cache(maxsize=1)
def _gathered_keys(queries):
    q, k, v, bias = _attention.inputs(queries, ROWS)
    index = _some_rows(ROWS // 2)
    index32 = index.int()[None]
    dense = [x[:, index].contiguous() for x in (k, v, bias)]
    check, plain = _attention.Check(q, *dense), _attention.Check(q, *dense[:2])

    def by_index(bias=bias):
        return attn(q, k, v, key_bias=bias, kv_index=index32)

    def copied(attend):
        return lambda: attend(q, k.index_select(1, index), v.index_select(1, index))

    cases = {
        "specedit": (lambda: attn(q, *dense[:2], key_bias=dense[2]), check, True),
        "specedit kv_index": (by_index, check, True),
        "specedit cuda kv_index": (_attention.forced("cuda", by_index), check, True),
        "specedit cuda kv_index, no bias": (_attention.forced("cuda", lambda: by_index(None)), plain, False),
        "index_select + specedit": (copied(lambda *x: attn(*x, key_bias=dense[2])), check, True),
    }
    flash = _attention.fa3()
    if flash is not None:
        cases["index_select + fa3"] = copied(flash), plain, False
    return _in_turn(cases)


@pytest.mark.parametrize(
    "impl", ("specedit", "specedit kv_index", "specedit cuda kv_index", "specedit cuda kv_index, no bias",
             "index_select + specedit", "index_select + fa3")
)  # fmt: skip
@pytest.mark.parametrize("queries", (512, 922, 4352))
def test_gathered_keys(timed, queries, impl):
    """A random half of a buffer's rows, in random order: given by index, copied first, or already dense."""
    _row(timed, _gathered_keys(queries), impl, op="mixed_res_attn keys by index",
         shape=f"{queries}x{ROWS // 2} of {ROWS} H24 D128", flops=_attention.flops(queries, ROWS // 2))  # fmt: skip


@functools.lru_cache(maxsize=1)
def _gathered_queries(queries=922):
    all_q, k, v, bias = _attention.inputs(ROWS, ROWS)
    bias = bias.sort().values.contiguous()
    index = _some_rows(queries).sort().values
    index32, q, target = index.int()[None], all_q[:, index].contiguous(), torch.empty_like(all_q)
    check = _attention.Check(q, k, v, bias)

    def scattered():
        torch.ops.specedit.mixed_res_attn_scatter_(target, q, k, v, index32, key_bias=bias)
        return target

    return _in_turn({
        "specedit": (lambda: attn(q, k, v, key_bias=bias), check, True),
        "specedit q_index": (lambda: attn(all_q, k, v, key_bias=bias, q_index=index32), check, True),
        "specedit scatter": (scattered, check, True, lambda out: out[:, index]),
    })  # fmt: skip


@pytest.mark.parametrize("impl", ("specedit", "specedit q_index", "specedit scatter"))
def test_gathered_queries(timed, impl):
    _row(timed, _gathered_queries(), impl, op="mixed_res_attn queries by index", shape=f"922 of {ROWS} x {ROWS}",
         flops=_attention.flops(922, ROWS))  # fmt: skip


@functools.lru_cache(maxsize=1)
def _lengths(share=0.6, queries=922):
    q, k, v, bias = _attention.inputs(queries, ROWS)
    bias = bias.sort().values.contiguous()
    n, m = int(share * queries), int(share * ROWS)
    q_lens, kv_lens = (torch.tensor([x], dtype=torch.int32, device="cuda") for x in (n, m))
    part = [x[:, :at].contiguous() for x, at in ((q, n), (k, m), (v, m), (bias, m))]
    check = _attention.Check(*part)

    def by_length():
        return attn(q, k, v, key_bias=bias, q_lens=q_lens, kv_lens=kv_lens)

    return _in_turn({
        "specedit": (lambda: attn(*part[:3], key_bias=part[3]), check, True),
        "specedit lengths": (by_length, check, True, lambda found: (found[0][:, :n], found[1][:, :, :n])),
        "specedit all": (lambda: attn(q, k, v, key_bias=bias), None, True),
    })  # fmt: skip


@pytest.mark.parametrize("impl", ("specedit", "specedit lengths", "specedit all"))
def test_lengths(timed, impl):
    """60 % of 922 queries and 8704 keys, a call of that size, and one of the capacity."""
    _row(timed, _lengths(), impl, op="mixed_res_attn lengths", shape=f"60 % of 922 x {ROWS}")


@functools.lru_cache(maxsize=1)
def _head_dim(shape, head_dim):
    q, k, v, bias = _attention.inputs(*shape, head_dim=head_dim)
    normal = torch.randn(bias.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    plain = _attention.Check(q, k, v)

    def by_cuda(bias):
        return _attention.forced("cuda", lambda: attn(q, k, v, key_bias=bias))

    cases = {
        "specedit cuda": (by_cuda(bias), _attention.Check(q, k, v, bias), True),
        "specedit cuda, normal bias": (by_cuda(normal), _attention.Check(q, k, v, normal), True),
        "specedit cuda, no bias": (by_cuda(None), plain, False),
    }
    flash = _attention.fa3()
    if flash is not None:
        cases["fa3"] = lambda: flash(q, k, v), plain, False
        cases["fa3, 2 splits"] = lambda: flash(q, k, v, num_splits=2), plain, False
    return _in_turn(cases)


@pytest.mark.parametrize(
    "impl", ("specedit cuda", "specedit cuda, normal bias", "specedit cuda, no bias", "fa3", "fa3, 2 splits")
)
@pytest.mark.parametrize("shape", (*_attention.SHAPES, (2560, 2560), (256, 8704)), ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("head_dim", (64,))
def test_head_dim(timed, head_dim, shape, impl):
    _row(timed, _head_dim(shape, head_dim), impl, op="mixed_res_attn", shape=f"{shape[0]}x{shape[1]} H24 D{head_dim}",
         flops=_attention.flops(*shape, head_dim=head_dim))  # fmt: skip
