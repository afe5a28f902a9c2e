# SPDX-License-Identifier: Apache-2.0
"""Weights of torchao's in a fused forward: products with them as they lie, or as they are made for one call, beside the
layers' own calls and float64; and what is not exactly as known is called."""

import gc
import weakref

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from test_fp8 import rounded, serves_here
from tiny_models import call_options, paper, tiny_image, tiny_pipeline

from specedit_kernels import SpecEditFluxKontextPipeline, ops
from specedit_kernels.engine import fp8, fused
from specedit_kernels.engine import quantised as module
from specedit_kernels.engine.low_rank import LowRankChange
from specedit_kernels.engine.low_rank import active as changing
from specedit_kernels.engine.quantised import quantised

torchao = pytest.importorskip("torchao")
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
    quant_api,
    quantize_,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torchao.__version__.startswith(module._VERSION), reason="weights of torchao 0.18 alone"),
]
ALONE = {
    "int8": Int8WeightOnlyConfig(),
    "int8, a tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "e4m3": Float8WeightOnlyConfig(),
    "e4m3, a tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
}
# Of a row a layer's own call may work on GPUs alone (on a CPU: torch 2.13).
DYNAMIC = {"a row": PerRow(), "a tensor": PerTensor()}


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch):
    """torchao makes dynamic fp8 for GPUs alone, and its weights are the same elsewhere."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)


def made(config, out=48, into=64, bias=True, dtype=torch.bfloat16, device="cpu", seed=0):
    torch.manual_seed(seed)
    holder = torch.nn.Sequential(torch.nn.Linear(into, out, bias=bias)).to(device, dtype).requires_grad_(False)
    if config is not None:
        quantize_(holder, config)
    return holder[0]


def dynamic(by, **options):
    return made(Float8DynamicActivationFloat8WeightConfig(granularity=DYNAMIC[by]), **options)


def exact_of(layer, x):
    weight = layer.weight
    weight = weight.qdata.double() * weight.scale.double() if hasattr(weight, "qdata") else weight.double()
    y = x.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.fixture
def calls(monkeypatch):
    """Names of what is called: the op, the quantisation, and layers; "kept" those whose weight torchao keeps."""
    seen = []

    def noted(name, function):
        return lambda *args, **kwargs: seen.append(name) or function(*args, **kwargs)

    def forward(layer, x, before=torch.nn.Linear.forward):
        seen.append("kept" if hasattr(layer.weight, "qdata") else "plain")
        return before(layer, x)

    monkeypatch.setattr(ops, "dequantize", noted("dequantize", ops.dequantize))
    monkeypatch.setattr(ops, "quantize_fp8", noted("quantize_fp8", ops.quantize_fp8))
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


# weights alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ALONE)
def test_weights_alone_are_the_layers_own_product(random, device, calls, name, bias, dtype):
    layers = [made(ALONE[name], out, 64, bias, dtype, device, seed=out) for out in (48, 17, 1)]
    x = random(2, 33, 64, dtype=dtype, device=device)
    own = [layer(x) for layer in layers]
    calls.clear()
    got = fused.linear_of_each(layers, x)
    assert calls == ["dequantize"] * 3
    for layer, y, theirs in zip(layers, got, own):
        assert y.dtype == dtype and y.shape == theirs.shape
        if not name.startswith("int8") and device.type == "cpu":
            # their sum without a bias to the last bit; they round it before they add one
            bare = made(None, *layer.weight.shape, bias=False)
            bare.weight = layer.weight
            [alone] = fused.linear_of_each([bare], x)
            assert torch.equal(alone if bias is False else alone + layer.bias, theirs)
        # of int8 they round the scale and the sum, here the weight is rounded
        assert_within_budget(y, exact_of(layer, x), theirs, luck=2.0)
    assert not torch.equal(got[0], own[0] * 0)


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_a_made_weight_is_gone_after_its_product(random, monkeypatch, name):
    seen, real = [], ops.dequantize

    def watched(*args, **kwargs):
        assert all(ref() is None for ref in seen)  # one at a time
        weight = real(*args, **kwargs)
        seen.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(ops, "dequantize", watched)
    fused.linear_of_each([made(ALONE[name], seed=i) for i in range(3)], random(5, 64, dtype=torch.bfloat16))
    gc.collect()
    assert len(seen) == 3 and all(ref() is None for ref in seen)


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_a_written_weight_is_the_new_one(random, name):
    layer, x = made(ALONE[name], dtype=torch.float32), random(5, 64)
    first = fused.linear(layer, x)
    layer.weight.scale.mul_(2)
    assert torch.allclose(fused.linear(layer, x) - layer.bias, 2 * (first - layer.bias), atol=1e-5)


def test_zero_points_are_not_in_torchaos_own_product(random):
    layer, x = made(ALONE["int8"], dtype=torch.float32), random(5, 64)
    before = layer(x)
    layer.weight.zero_point.fill_(3)
    assert torch.equal(layer(x), before) and torch.allclose(fused.linear(layer, x), before, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "e4m3", "e4m3 dynamic"])
def test_a_change_of_low_rank_is_added(random, name):
    layer = dynamic("a tensor") if "dynamic" in name else made(ALONE[name])
    holder, x = torch.nn.Sequential(layer), random(2, 5, 64, dtype=torch.bfloat16)
    change = LowRankChange({"0": (random(4, 64), random(48, 4))})
    bare = layer(x)
    with changing(change, holder):
        expected = layer(x)
        for linears in (None, fp8.Fp8Linears()):
            for every in (True, False):
                with fp8.active(linears, every):
                    assert linears is None or not fp8.serves([layer])
                    got = fused.linear(layer, x)
                assert (got - expected).norm() < 0.02 * (expected - bare).norm()
    change_free = fused.linear(layer, x)
    assert (change_free - bare).norm() < 0.02 * bare.norm()


# activations too


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("by", DYNAMIC)
def test_dynamic_weights_are_factors_as_they_lie(random, device, calls, by, bias):
    if not serves_here(device):
        pytest.skip(fp8.reason_against(device))
    layers = [dynamic(by, out=out, bias=bias, device=device, seed=out) for out in (48, 16, 32)]
    x = random(2, 33, 64, dtype=torch.bfloat16, device=device)
    plain = [exact_of(layer, x) for layer in layers]
    linears = fp8.Fp8Linears()
    with fp8.active(linears, every=False):
        assert fp8.serves(layers)
        calls.clear()
        got = fused.linear_of_each(layers, x)
        assert calls == ["quantize_fp8"]
    for layer, y, near in zip(layers, got, plain):
        exact = exact_of(layer, rounded(x))
        eager = exact_of(layer, rounded(x).float()).to(x.dtype)
        assert_within_budget(y, exact, eager, luck=2.0)
        assert 0 < (y.double() - near).norm() < 0.05 * near.norm()
    factors = linears.of(tuple(layers), every=False)
    assert [x.weight.data_ptr() for x in factors] == [layer.weight.qdata.data_ptr() for layer in layers]
    # the product takes a scale for each output
    assert linears.bytes == (0 if by == "a row" else 4 * (48 + 16 + 32)) and not linears.refused


@torch.no_grad()
def test_only_layers_that_ask_compute_in_fp8_unasked(random):
    x, asks = random(3, 64, dtype=torch.bfloat16), dynamic("a tensor")
    others = [made(None), made(ALONE["e4m3"]), made(ALONE["int8"]), dynamic("a tensor", out=40)]  # no multiple of 16
    for other in others:
        linears = fp8.Fp8Linears()
        with fp8.active(linears, every=False):
            assert fp8.serves([asks]) and not fp8.serves([other]) and not fp8.serves([asks, other])
            for got, layer in zip(fused.linear_of_each([asks, other], x), (asks, other)):
                assert (got - layer(x)).norm() < 0.01 * got.norm()
        assert linears.bytes == 4 * 48 and not linears.refused
    assert fp8.asked_by(torch.nn.Sequential(made(None), asks))
    assert not fp8.asked_by(torch.nn.Sequential(*others))


def test_attention_is_in_fp8_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(ops, "backend_of", lambda *args: ("cuda", ""))
    for every in (True, False):
        with fp8.active(fp8.Fp8Linears(), every):
            assert fp8.attends(torch.device("cuda"), torch.bfloat16, fp8.ATTENTION_DIM) == every


@torch.no_grad()
@pytest.mark.parametrize("name", ["e4m3", "e4m3, a tensor"])
def test_asked_for_fp8_takes_kept_weights_as_they_lie(random, device, name):
    if not serves_here(device):
        pytest.skip(fp8.reason_against(device))
    kept, plain, int8 = (made(config, device=device) for config in (ALONE[name], None, ALONE["int8"]))
    x, linears = random(33, 64, dtype=torch.bfloat16, device=device), fp8.Fp8Linears()
    with fp8.active(linears):
        assert fp8.serves([kept])
        [first, second] = linears.of((kept, plain))
        assert first.weight.data_ptr() == kept.weight.qdata.data_ptr()
        assert linears.bytes == 48 * (64 + 4 + 2) + (4 * 48 if "tensor" in name else 0)  # the other one's copy
        both = fused.linear_of_each([kept, plain], x)
        assert not fp8.serves([int8]) and list(linears.refused) == ["a weight is a Int8Tensor of torch.bfloat16"]
    for layer, weight, y in zip((kept, plain), (first, second), both):
        factor = weight.weight.double() * weight.scale.double().T
        exact = rounded(x) @ factor.T + layer.bias.double()
        assert_within_budget(y, exact, exact.float().to(x.dtype), luck=3.0)
        assert (y.double() - exact_of(layer, x)).norm() < 0.06 * y.double().norm()


@torch.no_grad()
def test_scales_for_each_output_follow_the_weights_own(random):
    layer, x = dynamic("a tensor"), random(3, 64, dtype=torch.bfloat16)
    linears = fp8.Fp8Linears()

    def run():
        with fp8.active(linears, every=False):
            return fused.linear(layer, x).float() - layer.bias.float()

    first = run()
    assert not linears.stale()
    layer.weight.scale.mul_(2)
    assert linears.stale()
    linears.clear()
    assert linears.bytes == 0 and torch.allclose(run(), 2 * first, rtol=0.02, atol=0.02)
    layer.weight.scale = layer.weight.scale * 2  # elsewhere
    assert torch.allclose(run(), 4 * first, rtol=0.02, atol=0.02)


def test_nothing_of_a_weight_is_kept(random):
    """Offloading frees it."""
    layer, linears = dynamic("a row"), fp8.Fp8Linears()
    data = weakref.ref(layer.weight.qdata)
    with torch.no_grad(), fp8.active(linears, every=False):
        fused.linear(layer, random(3, 64, dtype=torch.bfloat16))
    layer.weight = torch.nn.Parameter(torch.zeros(48, 64))
    gc.collect()
    assert data() is None


# what is not exactly as known


def _replaced(layer, **fields):
    weight = layer.weight
    names, others = weight.__tensor_flatten__()
    given = {n: getattr(weight, n) for n in names} | others | fields
    layer.weight = torch.nn.Parameter(type(weight)(**given), requires_grad=False)
    return layer


def _asked(**fields):
    layer = dynamic("a row")
    for name, value in fields.items():
        setattr(layer.weight.act_quant_kwargs, name, value)
    return layer


class Other(torch.nn.Linear):
    pass


def _classed(layer, cls):
    layer.__class__ = cls
    return layer


def _with_forward(layer):
    layer.forward = lambda x: 2 * torch.nn.Linear.forward(layer, x)
    return layer


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


STRANGE = {
    "groups": lambda: made(Float8WeightOnlyConfig(granularity=PerGroup(32))),
    "int8 groups": lambda: made(Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "int8 dynamic": lambda: made(Int8DynamicActivationInt8WeightConfig()),
    "blocks that are no rows": lambda: _replaced(made(ALONE["e4m3"]), block_size=[1, 32]),
    "int8 after a factor": lambda: _replaced(made(ALONE["int8"]), act_pre_scale=torch.full((64,), 2.0).bfloat16()),
    "scales in bf16": lambda: _replaced(made(ALONE["int8"]), scale=made(ALONE["int8"]).weight.scale.bfloat16()),
    "columns first": lambda: _replaced(made(ALONE["int8"]), qdata=torch.zeros(64, 48, dtype=torch.int8).t()),
    "a bound": lambda: _asked(hp_value_ub=1.0),
    "another granularity": lambda: _asked(granularity=PerRow(dim=0)),
    "an exact sum": lambda: _replaced(dynamic("a tensor"), mm_config=Float8MMConfig(use_fast_accum=False)),
    "a hook": lambda: _hooked(made(ALONE["e4m3"])),
    "a forward": lambda: _with_forward(made(ALONE["int8"])),
    "a class": lambda: _classed(made(ALONE["int8"]), Other),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_exactly_as_known_is_called(random, calls, name):
    layer = STRANGE[name]()
    assert quantised(layer) is None
    x = random(3, 64, dtype=torch.bfloat16)
    expected = None
    if name not in ("a bound", "another granularity"):  # not for a CPU
        expected = layer(x)
    calls.clear()
    for every in (True, False):
        with fp8.active(fp8.Fp8Linears(), every):
            assert not fp8.serves([layer])
            if expected is not None:
                assert torch.equal(fused.linear(layer, x), expected)
    assert "dequantize" not in calls and "quantize_fp8" not in calls


def test_other_versions_and_classes_are_called(monkeypatch):
    layer = made(ALONE["e4m3"])
    assert quantised(layer) is not None
    for version in ("0.19.0", "0.17.0", "1.0"):
        module._kind.cache_clear()
        monkeypatch.setattr(torchao, "__version__", version)
        assert quantised(layer) is None
    monkeypatch.undo()
    module._kind.cache_clear()
    assert quantised(layer) is not None
    monkeypatch.setattr(Float8Tensor, "__module__", "another")
    module._kind.cache_clear()
    assert quantised(layer) is None
    monkeypatch.undo()
    module._kind.cache_clear()


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_other_dtypes_and_autocast_are_called(random, calls, name):
    layer, x = made(ALONE[name], dtype=torch.float32), random(3, 64)
    assert fused.weight_of(layer, x) is not None and fused.weight_of(layer, x.bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.weight_of(layer, x) is None


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_a_bias_of_another_dtype_is_torchaos_to_add(random, name):
    """`to` of another dtype moves the bias alone."""
    layer, x = made(ALONE[name]).float(), random(3, 64, dtype=torch.bfloat16)
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(fused.linear(layer, x), layer(x))


# whole edits


def edits(pipe, runner="fused", **config):
    mask = np.zeros((128, 128), np.float32)
    mask[:, :32] = 1
    config = dict(stages=(1, 3, 0), finish="locked", kv_refresh=2) | config
    return pipe(image=tiny_image(), mask_image=mask, generator=torch.Generator().manual_seed(0),
                specedit=paper(**config, runner=runner), **call_options())  # fmt: skip


def pipeline(config=None, dtype=torch.float32, device="cpu"):
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)
    if config is not None:
        quantize_(pipe.transformer, config, filter_fn=lambda module, name: (
            type(module) is torch.nn.Linear and "blocks." in name and "norm" not in name))  # fmt: skip
    return pipe


def away(a, b):
    return ((a.images.float() - b.images.float()).norm() / b.images.float().norm()).item()


def test_an_edit_in_dynamic_fp8_is_near_that_of_whole_weights(calls):
    """Without being asked for, and nothing else is in fp8: attention over kept keys is as the model has it."""
    plain = edits(pipeline())
    pipe = pipeline(Float8DynamicActivationFloat8WeightConfig())
    calls.clear()
    got = edits(pipe)
    assert (got.stats.runner, got.stats.precision) == ("fused", "auto")
    outputs = sum(len(p) for p in pipe.transformer.parameters() if type(p) is Float8Tensor)
    # the last block's text is not computed
    assert 0 < got.stats.fp8_bytes <= 4 * outputs
    rows = calls.count("quantize_fp8")
    assert "kept" not in calls
    calls.clear()
    eager = edits(pipe, "eager")
    assert 0 < rows < 0.7 * calls.count("kept")  # q, k and v share theirs
    assert eager.stats.fp8_bytes == 0 and "quantize_fp8" not in calls
    assert 0 < away(got, plain) < 0.05 and 0 < away(eager, plain) < 0.05 and away(got, eager) < 0.05
    assert torch.equal(edits(pipe).images, got.images)
    assert away(edits(pipeline()), plain) == 0


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_an_edit_with_weights_alone(calls, name):
    pipe = pipeline(ALONE[name])
    eager = edits(pipe, "eager")
    calls.clear()
    got = edits(pipe)
    assert "dequantize" in calls and "kept" not in calls and got.stats.fp8_bytes == 0 and got.stats.precision == "auto"
    assert away(got, eager) < 1e-4 < away(got, edits(pipeline())) < 0.05


def test_an_edit_asked_for_in_fp8_of_a_checkpoint_in_fp8(calls):
    pipe = pipeline(ALONE["e4m3"])
    alone = edits(pipe)
    calls.clear()
    got = edits(pipe, precision="fp8")
    assert (got.stats.precision, got.stats.fp8_bytes) == ("fp8", 0)
    assert "dequantize" not in calls and "kept" not in calls
    assert 0 < away(got, alone) < 0.05


@pytest.mark.parametrize("name", ["int8", "e4m3", "e4m3 dynamic"])
def test_a_lora_on_such_layers_is_applied(name):
    peft = pytest.importorskip("peft")
    pipe = pipeline(ALONE[name] if name in ALONE else Float8DynamicActivationFloat8WeightConfig())
    bare = edits(pipe)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "one")
    got, eager = edits(pipe), edits(pipe, "eager")
    assert away(got, eager) < (0.05 if "dynamic" in name else 1e-4)
    assert away(got, bare) > 0.1 and away(edits(pipe, precision="fp8"), got) < 0.1
    pipe.transformer.disable_adapters()
    assert away(edits(pipe), bare) < (0.05 if "dynamic" in name else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["graph", "compile"])
@pytest.mark.parametrize("name", ["int8", "e4m3", "e4m3 dynamic", "e4m3 dynamic by row"])
def test_a_graph_replays_what_fused_steps_do(name, runner):
    if "dynamic" not in name and runner == "compile":
        pytest.skip("torch.compile has the layers' own calls")
    if not serves_here(torch.device("cuda", 0)):
        pytest.skip("needs compute capability 8.9")
    by = PerRow() if "row" in name else PerTensor()
    config = ALONE.get(name) or Float8DynamicActivationFloat8WeightConfig(granularity=by)
    pipe, plain = pipeline(config, torch.bfloat16, "cuda"), pipeline(None, torch.bfloat16, "cuda")
    expected, near = edits(pipe), edits(plain)
    assert 0 < away(expected, near) < 0.05
    assert away(expected, edits(pipe, "eager")) < (0.05 if "dynamic" in name else 0.02)
    for _ in range(2):
        got = edits(pipe, runner)
        assert got.stats.runner == runner and got.stats.runner_reason == ""
        assert away(got, expected) < 0.02
    assert (got.stats.fp8_bytes == 0) == (name != "e4m3 dynamic")
    for weight in pipe.transformer.parameters():  # written where they lie
        if hasattr(weight, "qdata"):
            weight.scale.mul_(1.5)
    assert away(edits(pipe, runner), edits(pipe)) < 0.02 < away(edits(pipe), expected)
