# SPDX-License-Identifier: Apache-2.0
"""precision="fp8": attention over kept keys and values in e4m3. On a CPU the reference serves its ops."""

import pytest
import torch
from test_fp8 import edit  # noqa: F401  (a fixture)
from test_runner import stubbed, warnings  # noqa: F401  (fixtures)
from tiny_models import call_options, tiny_image, tiny_pipeline

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, ops
from specedit_kernels._panels import PANEL, of_panels
from specedit_kernels.engine import fp8
from specedit_kernels.engine.kv_cache import HEADROOM, Fp8KV
from specedit_kernels.engine.sequence import MixedSequence, Stream, attention

pytestmark = pytest.mark.usefixtures("one_thread")
B, N, TEXT, H, D = 2, 40, 9, 3, 128
ROWS = PANEL


@pytest.fixture
def everywhere(monkeypatch):
    """Attention in e4m3 wherever layers are, as if its CUDA kernel served."""
    monkeypatch.setattr(fp8, "attends", lambda *_: fp8.is_active())


def streams_of(random, device, dtype, text, image, scale=1.0):
    def norm():
        made = torch.nn.RMSNorm(D, eps=1e-6, device=device, dtype=dtype)
        with torch.no_grad():
            made.weight.copy_(1 + 0.3 * random(D))
        return made

    found = []
    for at, n in ((slice(0, text), text), (slice(text, None), image)):
        q, k, v = (random(B, n, H, D, dtype=dtype, device=device) for _ in range(3))
        found.append(Stream(at, (q, k, v * scale), norm(), norm()))
    return found


def kept_in_fp8(device, rows=ROWS):
    nan = torch.full((2, B, rows, H, D), 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    panels = nan[1].view(B, rows // PANEL, H, D, PANEL)
    return Fp8KV(nan[0], panels, *(torch.full((B, 1, H), float("nan"), device=device) for _ in range(3)))


def rows_of(kept):
    """Keys and values [B, rows, H, D], copies."""
    return kept.k.clone(), of_panels(kept.v, kept.k.shape[1]).clone()


def sequence_of(random, device, tokens, rows=None, queries=None, bias=True):
    angle = random(B, tokens, D // 2, device=device) * 3
    lens = torch.full((B,), N, dtype=torch.int32, device=device)
    bias = random(B, ROWS, device=device) if bias else None
    return MixedSequence(TEXT, angle.cos(), angle.sin(), bias, lens if queries is None else queries, lens, rows)


def run(streams, kept, sequence):
    """The result, and the same over keys and values that are not rounded."""
    got, seen = attention(streams, kept, sequence)
    assert seen is None and got.dtype == streams[0].qkv[0].dtype and got.shape[2] == H * D
    return got


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_over_kept_keys_are_near_those_in_the_models_dtype(random, device, dtype, bias):
    """A whole sequence, then an active step of the text and a few tokens, one of them in no row."""
    whole = streams_of(random, device, dtype, TEXT, N - TEXT)
    sequence = sequence_of(random, device, N, bias=bias)
    plain_bias = None if sequence.key_bias is None else sequence.key_bias[:, :N].contiguous()

    def plain(sequence):
        return MixedSequence(**(vars(sequence) | {"key_bias": plain_bias}))

    kept, pair = kept_in_fp8(device), tuple(torch.zeros(B, N, H, D, dtype=dtype, device=device) for _ in range(2))
    exact, _ = attention(whole, pair, plain(sequence))
    got = run(whole, kept, sequence)
    assert 0 < (got - exact).float().norm() < 0.1 * exact.float().norm()
    for x, scale, of in zip(rows_of(kept), kept.scales[1:], pair):
        error = x[:, :N].float() * scale[..., None] - of.float()
        assert (error.abs() <= of.abs() / 15 + scale[..., None] * 2.0**-9).all()
    # of keys nothing can be cut off; of values there is room above the largest
    assert (kept.k_scale * 448 >= pair[0].float().abs().amax((1, 3))[:, None]).all()
    largest = pair[1].float().abs().amax((1, 3))[:, None]
    torch.testing.assert_close(kept.v_scale * 448, largest * HEADROOM, rtol=1e-2, atol=0)

    fresh = TEXT + 6
    rows = torch.arange(fresh, dtype=torch.int32, device=device).repeat(B, 1)
    rows[1, -1] = -1
    queries = torch.tensor([fresh, fresh - 1], dtype=torch.int32, device=device)
    active = sequence_of(random, device, fresh, rows, queries, bias)
    active = MixedSequence(**(vars(active) | {"key_bias": sequence.key_bias}))
    parts = streams_of(random, device, dtype, TEXT, fresh - TEXT, scale=3.0)
    before = [*rows_of(kept), *(x.clone() for x in kept.scales)]
    exact, got = attention(parts, pair, plain(active))[0], run(parts, kept, active)
    assert 0 < (got - exact).float().norm() < 0.1 * exact.float().norm()
    assert not got[1, -1].any()
    for x, old in zip(rows_of(kept), before):
        same = (x.view(torch.uint8) == old.view(torch.uint8)).flatten(2).all(-1)
        assert same[:, fresh:].all() and same[1, fresh - 1] and not same[:, : fresh - 1].any()
    assert all(torch.equal(x, old) for x, old in zip(kept.scales, before[2:]))


@torch.no_grad()
def test_values_beyond_the_headroom_are_cut_off(random, device):
    kept, sequence = kept_in_fp8(device), sequence_of(random, device, N)
    run(streams_of(random, device, torch.float32, TEXT, N - TEXT), kept, sequence)
    rows = torch.arange(N, dtype=torch.int32, device=device).repeat(B, 1)
    again = MixedSequence(**(vars(sequence) | {"rows": rows}))
    got = run(streams_of(random, device, torch.float32, TEXT, N - TEXT, scale=1e4), kept, again)
    assert got.isfinite().all() and (kept.v[..., :N].float().abs() == 448).float().mean() > 0.9


@torch.no_grad()
def test_a_blend_of_two(random, device):
    made = []
    for scale in (1.0, 5.0):
        made.append(kept_in_fp8(device))
        run(streams_of(random, device, torch.float32, TEXT, N - TEXT, scale), made[-1], sequence_of(random, device, N))
    (near, far), between = made, kept_in_fp8(device)
    between.blend_(near, far, torch.tensor(0.25, device=device))
    for at, scale in ((0, 3), (1, 4)):
        x, y, z = (rows_of(kept)[at][:, :N].float() * kept[scale][..., None] for kept in (near, far, between))
        error = (z - (0.75 * x + 0.25 * y)).norm()
        assert error < 0.04 * z.norm()
    assert torch.equal(between.q_scale, near.q_scale)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, dict(key_bias=False), dict(lock_text=True), dict(kv_refresh="bracket"),
                                    dict(kv_refresh=2), dict(kv_cache_dtype="fp8"),
                                    dict(stages=(3, 3, 0), lock_text=True, kv_refresh="bracket", coarse_refresh=3)],
                         ids=str)  # fmt: skip
def test_an_edit(edit, everywhere, monkeypatch, warnings, config):  # noqa: F811
    served: list[int] = []
    plain_op = ops.mixed_res_attn_fp8

    def counted(*args, **kwargs):
        served.append(args[0].shape[1])
        return plain_op(*args, **kwargs)

    monkeypatch.setattr(ops, "mixed_res_attn_fp8", counted)
    run, _ = edit
    plain, got = run(**config), run(precision="fp8", **config)
    assert not warnings.messages and got.stats.precision == "fp8"
    assert len(set(served)) >= 2  # whole sequences and active steps
    assert 0 < (got.images - plain.images).norm() < 0.15 * plain.images.norm()
    assert torch.equal(run(precision="fp8", **config).images, got.images)
    monkeypatch.setattr(fp8, "attends", lambda *_: False)
    served.clear()
    linears = run(precision="fp8", **config)
    assert not served and not torch.equal(linears.images, got.images)
    assert (linears.images - got.images).norm() < 0.15 * plain.images.norm()
    assert torch.equal(run(**config).images, plain.images)


def test_keys_and_values_take_half_the_memory(edit, everywhere):  # noqa: F811
    run, pipe = edit
    half = run(precision="fp8").stats.kv_cache_bytes
    pipe._free_runner()
    whole = run().stats.kv_cache_bytes
    assert half < 0.55 * whole * (2 if pipe.transformer.dtype == torch.bfloat16 else 1)


def test_steps_that_keep_nothing_attend_as_before(edit, everywhere, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ops, "mixed_res_attn_fp8", None)
    run, _ = edit
    assert run(precision="fp8", kv_refresh=1).stats.precision == "fp8"


def test_where_attention_is_in_fp8(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    served = {"mixed_res_attn_fp8": "cuda"}
    monkeypatch.setattr(ops, "backend_of", lambda op, device: (served[op], ""))
    assert not fp8.attends(cuda, torch.bfloat16, 128)
    with fp8.active(fp8.Fp8Linears()):
        assert fp8.attends(cuda, torch.bfloat16, 128)
        assert not fp8.attends(cuda, torch.float16, 128)
        assert not fp8.attends(cuda, torch.bfloat16, 64)
        assert not fp8.attends(cpu, torch.bfloat16, 128)
        served["mixed_res_attn_fp8"] = "triton"
        assert not fp8.attends(cuda, torch.bfloat16, 128)


@pytest.mark.gpu  # graphs need a GPU
def test_a_graph_replays_what_fused_steps_do(everywhere):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline()).to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(128, 128)
    mask[:, :32] = 1

    def run(runner, **config):
        config = dict(stages=(1, 3, 0), finish="locked", kv_refresh="bracket", runner=runner) | config
        found = pipe(image=tiny_image(), generator=torch.Generator().manual_seed(0), mask_image=mask,
                     specedit=SpecEditConfig(**config), **call_options())  # fmt: skip
        assert found.stats.runner == runner
        return found.images.float()

    plain, expected = run("fused"), run("fused", precision="fp8")
    assert 0 < (expected - plain).norm() < 0.15 * plain.norm()
    for _ in range(2):
        torch.testing.assert_close(run("graph", precision="fp8"), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(run("graph"), plain, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu  # its CUDA kernel
@torch.no_grad()
def test_the_cuda_kernel_serves(random):
    device = torch.device("cuda", 0)
    if ops.backend_of("mixed_res_attn_fp8", device)[0] != "cuda":
        pytest.skip(ops.backend_of("mixed_res_attn_fp8", device)[1])
    with fp8.active(fp8.Fp8Linears()):
        assert fp8.attends(device, torch.bfloat16, D)
    kept, sequence = kept_in_fp8(device), sequence_of(random, device, N)
    streams = streams_of(random, device, torch.bfloat16, TEXT, N - TEXT)
    run(streams, kept, sequence)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(streams, kept, MixedSequence(**(vars(sequence) | {"rows": torch.arange(N, dtype=torch.int32, device=device)
                                                               .repeat(B, 1)})))  # fmt: skip
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert not any("pack_kv" in name for name in names), names  # values are read as they are kept
    assert sum("mixed_res_attn_kernel" in name for name in names) == 1, names
