# SPDX-License-Identifier: Apache-2.0
"""What every op keeps: opcheck's four tests, torch.compile, torch.export, CUDA graphs, no host synchronisation."""

import copy
import functools
import subprocess
import sys

import pytest
import torch

from specedit_kernels import ops
from specedit_kernels._panels import in_panels

OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def i32(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def samples(device):
    """(op, args, kwargs): each op with its optional arguments absent and present."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    specedit = torch.ops.specedit
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 12, 8), (2, 8, 6, 4), (0, 12, 8)):
            yield specedit.token_discrepancy, (normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), (3, 4)), {}
    score = normal(2, 12)
    yield specedit.select_tokens, (score, (3, 4), 0.5), {}
    yield specedit.select_tokens, (score[:, ::1], (3, 4), 0.5, 1, 2), {}
    index = i32([3, -1, 0], [1, 2, -1], device=device)
    yield specedit.gather_tokens, (normal(2, 12, 8), index, 3), {}
    yield specedit.gather_tokens, (normal(2, 12, 8)[:, :, ::1], index, 0), {}
    yield specedit.scatter_tokens_, (normal(2, 12, 8), normal(2, 3, 8), index), {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = normal(2, 5, 4, 32, dtype=dtype), normal(2, 9, 2, 32, dtype=dtype), normal(2, 9, 2, 32, dtype=dtype)
        lens = dict(q_lens=i32(2, 3, device=device), kv_lens=i32(9, 1, device=device))
        options = dict(key_bias=normal(2, 9), q_index=index, kv_index=index, **lens, scale=0.2)
        yield specedit.mixed_res_attn, (q, k, v), {}
        yield specedit.mixed_res_attn, (q, k, v), options
        yield specedit.mixed_res_attn, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), lens
        yield specedit.mixed_res_attn, (q[:, :0], k, v), {}
        packed = dict(
            cu_seqlens_q=i32(0, 4, 10, device=device),
            cu_seqlens_k=i32(0, 9, 18, device=device),
            max_seqlen_q=6,
            max_seqlen_k=9,
            key_bias=normal(18),
        )
        yield specedit.mixed_res_attn, (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)), packed
        out = normal(2, 7, 4, 32, dtype=dtype)
        yield specedit.mixed_res_attn_scatter_, (out, q, k, v, i32([0, 2, -1], [3, 1, 6], device=device)), options
        a, b = (specedit.mixed_res_attn(q, k, v) for _ in range(2))
        yield specedit.merge_attn, (*a, *b), {}
        text = normal(2, 6, 4, 32, dtype=dtype)
        sees = (torch.arange(6) % torch.tensor([[1], [2], [3]]) == 0).to(device).expand(2, 3, 6)
        region = i32([0, -1, 2, 1, 1], [-1, -1, 0, 0, 2], device=device)
        yield specedit.sparse_cross_attn, (q, text, text + 1, region, sees), {}
    pairs = [specedit.quantize_fp8(normal(2, n, heads, 32)) for n, heads in ((5, 4), (9, 2), (9, 2))]
    factors = tuple(x for x, _ in pairs) + tuple(scale[..., 0] for _, scale in pairs)
    options = dict(key_bias=normal(2, 9), q_index=index, kv_index=index, q_lens=i32(2, 3, device=device), scale=0.2)
    yield specedit.mixed_res_attn_fp8, factors, {}
    yield specedit.mixed_res_attn_fp8, factors, options
    yield specedit.mixed_res_attn_fp8, (*factors[:2], in_panels(factors[2]), *factors[3:]), options
    kept = [x for _ in range(3) for x in (normal(2, 9, 4, 32).to(torch.float8_e4m3fn), normal(2, 1, 4).abs() + 0.1)]
    yield specedit.dequantize, (normal(2, 9, 4).to(torch.float8_e4m3fn), torch.bfloat16), {}
    yield specedit.dequantize, (normal(9, 4).to(torch.int8), torch.float32), dict(scale=normal(9, 1))
    blocks = normal(3, 2 * 144).abs().to(torch.uint8)  # of 0 to 3: no scale is NaN
    yield specedit.dequantize_gguf, (blocks, "Q4_K", torch.bfloat16), {}
    yield specedit.lerp_, (*(normal(2, 5, 3, 8, dtype=torch.bfloat16) for _ in range(3)), normal(1)[0].sigmoid()), {}
    yield specedit.lerp_fp8_, (*kept, normal(1)[0].sigmoid()), {}
    yield specedit.lerp_fp8_, (*(in_panels(x) if x.dim() == 4 else x for x in kept), normal(1)[0].sigmoid()), {}
    scales = [normal(2, 1, heads).abs() + 0.01 for heads in (4, 2, 2)]
    yield specedit.raise_scales_fp8_, (*scales, normal(2, 5, 2, 32)), dict(q_weight=normal(32), headroom=8.0)
    targets = i32([0, 2, -1, 6, 3], [3, 1, 6, -1, 0], device=device)
    for dtype, chosen in ((torch.float32, False), (torch.bfloat16, True)):
        q, k, v = (normal(2, 5, heads, 32, dtype=dtype) for heads in (4, 2, 2))
        outs = [normal(2, 7, heads, 32, dtype=dtype) for heads in (4, 2, 2)]
        angle, weight = normal(1, 5, 16), normal(2, 32, dtype=dtype)
        options = dict(q_weight=weight, k_weight=weight[0], split=2, q_out_index=targets, kv_out_index=targets)
        yield specedit.qk_norm_rope_scatter_, (*outs, q, k, v, angle.cos(), angle.sin()), options if chosen else {}
        scales = [normal(2, 1, heads).abs() + 0.01 for heads in (4, 2, 2)]
        outs = [x.to(torch.float8_e4m3fn) for x in outs]
        args = (*outs[:2], in_panels(outs[2]), q, k, v, *scales, angle.cos(), angle.sin())
        yield specedit.qk_norm_rope_scatter_fp8_, args, options if chosen else {}
        x, rows = normal(2, 5, 48, dtype=dtype), normal(2, 3, 48, dtype=dtype)
        options = dict(modulation_index=targets.clamp_max(2), index=index) if chosen else {}
        vector = rows if chosen else rows[:, 0]
        yield specedit.adaln_modulate, (x, vector, vector + 1), options
        given = dict(scale=vector, shift=vector + 1, modulation_index=options["modulation_index"]) if chosen else {}
        yield specedit.quantize_fp8, (x,), given
        yield specedit.quantize_fp8, (q,), dict(before=normal(2, 5, 4, 3), gelu=True)
        maps = normal(2, 48, 5, 3, dtype=dtype)
        if chosen:
            maps = maps.contiguous(memory_format=torch.channels_last)
        found = dict(statistics=normal(2, 2, 4).abs(), x_bias=normal(48)) if chosen else {}
        yield specedit.group_norm, (maps, 4, normal(48), normal(48)), dict(silu=chosen) | found
        yield specedit.group_norm_statistics, (maps, 4), dict(x_bias=normal(48)) if chosen else {}
        options_of_sum = dict(residual=maps, residual_bias=normal(48)) if chosen else {}
        yield specedit.add_bias_, (maps.clone(), normal(48)), options_of_sum
        vectors = dict(bias=normal(48), silu=True, x_bias=normal(48)) if chosen else {}
        yield specedit.channel_rms_norm, (maps, normal(48)), vectors
        yield specedit.scaled_softmax, (normal(2, 5, 9, dtype=dtype), 0.3, torch.bfloat16), {}
        yield specedit.gated_residual_add_, (x, normal(2, 3 if chosen else 5, 48, dtype=dtype), vector), options


@functools.cache
def made(device):
    """The samples, made once: some are results of ops, which take long in Triton's interpreter. Copy what you write."""
    return list(samples(device))


def ids():
    return [f"{op.__name__}-{i}" for i, (op, _, _) in enumerate(made(torch.device("cpu")))]


SAMPLES = list(enumerate(ids()))


@pytest.fixture(params=SAMPLES, ids=lambda sample: sample[1])
def sample(request, device):
    op, args, kwargs = made(device)[request.param[0]]
    return op, *copy.deepcopy((args, kwargs))


def test_opcheck(sample):
    op, args, kwargs = sample
    # the first one compares arguments with what they were, for which PyTorch cannot compute with fp8
    fp8 = any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in args)
    torch.library.opcheck(op.default, args, kwargs, test_utils=OPCHECK[1:] if fp8 else OPCHECK)


def clone(args):
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)


def results(op, args, kwargs):
    """All that a call produces: what it returns, and its arguments, of which the in-place ops write some."""
    args = clone(args)
    returned = op(*args, **kwargs)
    returned = [] if returned is None else [returned] if isinstance(returned, torch.Tensor) else list(returned)
    return [*returned, *(x for x in args if isinstance(x, torch.Tensor))]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_compile_fullgraph(sample):
    op, args, kwargs = sample
    torch._dynamo.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"

    @torch.compile(fullgraph=True, backend=backend)
    def step(*args, **kwargs):
        return results(op, args, kwargs)

    assert_same(step(*args, **kwargs), results(op, args, kwargs))


def test_export(sample):
    op, args, kwargs = sample
    tensors = [x for x in args if isinstance(x, torch.Tensor)]

    class Step(torch.nn.Module):
        def forward(self, tensors, options):
            given = iter(tensors)
            return results(op, tuple(next(given) if isinstance(x, torch.Tensor) else x for x in args), options)

    program = torch.export.export(Step(), (tensors, kwargs))
    assert any("specedit" in str(node.target) for node in program.graph.nodes)
    assert_same(program.module()(tensors, kwargs), results(op, args, kwargs))


def test_dynamic_shapes_compile_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def attend(q, k, v, bias):
        return torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)[0]

    for queries, keys in ((5, 9), (6, 12), (11, 7)):
        q, k = torch.randn(1, queries, 2, 32), torch.randn(1, keys, 2, 32)
        attend(q, k, k, torch.zeros(1, keys))
    assert counter.frame_count == 1


def test_no_grad_mode_accepts_parameters():
    weight = torch.nn.Parameter(torch.ones(1, 4, 8))
    with torch.no_grad():
        assert torch.ops.specedit.token_discrepancy(weight, weight, (2, 2)).shape == (1, 4)


@pytest.mark.gpu  # CUDA graphs need a GPU
def test_cuda_graph_replays_with_new_inputs(sample):
    op, args, kwargs = sample
    results(op, args, kwargs)  # the warm-up call that the contract allows
    torch.cuda.synchronize()
    static = clone(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = op(*static, **kwargs)
    returned = [] if returned is None else [returned] if isinstance(returned, torch.Tensor) else list(returned)
    fresh = tuple(
        torch.randn_like(x, dtype=torch.float32).to(x.dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in args
    )
    for target, value in zip(static, fresh):
        if isinstance(target, torch.Tensor):
            target.copy_(value)
    graph.replay()
    assert_same([*returned, *(x for x in static if isinstance(x, torch.Tensor))], results(op, fresh, kwargs))


@pytest.mark.gpu  # synchronisation is a matter of GPUs
def test_no_host_synchronisation(sample):
    op, args, kwargs = sample
    results(op, args, kwargs)
    args = clone(args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu  # launches are a matter of GPUs
def test_score_select_gather_is_few_launches(device):
    draft, source = (torch.randn(1, 4096, 64, dtype=torch.bfloat16, device=device) for _ in range(2))

    def run():
        score = ops.token_discrepancy(draft, source, (64, 64))
        _, index, _ = ops.select_tokens(score, (64, 64), 1.0, 1, 0)
        return ops.gather_tokens(source, index, 1024)

    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 3 <= len(kernels) <= 4, kernels


def test_forced_backends(monkeypatch):
    x = torch.randn(1, 4, 8)
    monkeypatch.setenv("SPECEDIT_BACKEND", "fastest")
    with pytest.raises(ValueError, match="SPECEDIT_BACKEND: expected one of cuda, triton, reference.*got 'fastest'"):
        ops.token_discrepancy(x, x, (2, 2))
    monkeypatch.setenv("SPECEDIT_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="SPECEDIT_BACKEND=cuda cannot serve token_discrepancy: .*CUDA tensor"):
        ops.token_discrepancy(x, x, (2, 2))
    with pytest.raises(RuntimeError, match="SPECEDIT_BACKEND=cuda cannot serve merge_attn: no CUDA C"):
        ops.merge_attn(x, torch.zeros(4, 1), x, torch.zeros(4, 1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="SPECEDIT_BACKEND=triton cannot serve token_discrepancy"):
        ops.token_discrepancy(x, x, (2, 2))


def test_backend_forced_for_one_op(monkeypatch):
    x = torch.randn(1, 4, 8)
    monkeypatch.setenv("SPECEDIT_BACKEND", "merge_attn=reference, token_discrepancy=cuda")
    assert ops.backend_of("merge_attn", "cpu") == ("reference", "forced by SPECEDIT_BACKEND")
    assert ops.backend_of("select_tokens", "cpu") == ("reference", "CPU tensors are served by the reference")
    with pytest.raises(RuntimeError, match="SPECEDIT_BACKEND=cuda cannot serve token_discrepancy"):
        ops.token_discrepancy(x, x, (2, 2))
    for wrong in ("merge_attn=fast", "attention=cuda", "cuda,triton", "merge_attn=cuda,merge_attn=triton", "=cuda"):
        monkeypatch.setenv("SPECEDIT_BACKEND", wrong)
        with pytest.raises(ValueError, match="SPECEDIT_BACKEND: expected one of .*or op=backend"):
            ops.backend_of("merge_attn", "cpu")


def test_backend_of():
    for name in ops.names():
        assert ops.backend_of(name, "cpu")[0] == "reference"
    with pytest.raises(ValueError, match="op: expected one of .*, got 'attention'"):
        ops.backend_of("attention", "cpu")


def test_devices_may_not_mix():
    x = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="source: expected a tensor on cpu, got one on meta"):
        ops._checks.check_device("token_discrepancy", "source", x.to("meta"), x.device)


IMPORT_WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import torch, specedit_kernels
x = torch.randn(1, 4, 8)
assert torch.ops.specedit.token_discrepancy(x, x, (2, 2)).shape == (1, 4)
assert not [m for m in sys.modules if m.partition(".")[0] in {blocked!r}]
assert "specedit_kernels.reference.mixed_res_attn" not in sys.modules
"""


@pytest.mark.slow
def test_import_without_optional_packages():
    """Only torch is needed, and nothing of a backend is imported before its first call."""
    code = IMPORT_WITHOUT.format(blocked=["triton", "diffusers", "transformers", "PIL", "numpy_financial"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
