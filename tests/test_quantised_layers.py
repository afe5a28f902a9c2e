# SPDX-License-Identifier: Apache-2.0
"""Layers of diffusers' GGUF and of optimum-quanto in a fused forward: one op makes the bits of the weight that their
own forward multiplies with, and one product follows. What is not exactly as known is called."""

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from test_dequantize import assert_bits
from test_dequantize_gguf import blocks_of
from tiny_models import call_options, paper, tiny_image, tiny_pipeline

from specedit_kernels import SpecEditFluxKontextPipeline, ops
from specedit_kernels._gguf import BLOCKS
from specedit_kernels.engine import fused, quantised
from specedit_kernels.engine.quantised import made
from specedit_kernels.engine.runner import inspect

gguf = pytest.importorskip("gguf")
import diffusers
from diffusers.quantizers.gguf import utils

KNOWN = diffusers.__version__.startswith(quantised._GGUF_VERSIONS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not KNOWN, reason="layers of diffusers 0.41 and 0.42 alone"),
]
QUANTO = ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2")


def of_gguf(kind, out=48, into=512, bias=True, dtype=torch.bfloat16, device="cpu", seed=0):
    torch.manual_seed(seed)
    layer = utils.GGUFLinear(into, out, bias, compute_dtype=dtype, device=device).to(dtype).requires_grad_(False)
    values = BLOCKS[kind][0]
    blocks = blocks_of(kind, out, into // values, seed=seed, device=device)
    layer.weight = utils.GGUFParameter(blocks, quant_type=gguf.GGMLQuantizationType[kind])
    return layer


def of_quanto(kind, out=48, into=64, bias=True, dtype=torch.bfloat16, device="cpu", activations=None):
    quanto = pytest.importorskip("optimum.quanto")
    if quanto.__version__ != quantised._QUANTO_VERSION:
        pytest.skip("layers of optimum-quanto 0.2.7 alone")
    torch.manual_seed(0)
    holder = torch.nn.Sequential(torch.nn.Linear(into, out, bias=bias)).to(device, dtype)
    quanto.quantize(holder, weights=getattr(quanto, kind), activations=activations and getattr(quanto, activations))
    quanto.freeze(holder)
    return holder[0]


@pytest.fixture
def calls(monkeypatch):
    """Names of what is called: the ops, and GGUF layers."""
    seen = []

    def noted(name, function):
        return lambda *args, **kwargs: seen.append(name) or function(*args, **kwargs)

    for name in ("dequantize", "dequantize_gguf"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    monkeypatch.setattr(utils.GGUFLinear, "forward", noted("layer", utils.GGUFLinear.forward))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gguf_layer_has_its_own_bits(random, device, calls, kind, dtype):
    for bias in (True, False):
        layer = of_gguf(kind, bias=bias, dtype=dtype, device=device)
        x = random(2, 9, 512, dtype=dtype, device=device)
        assert_bits(made(layer).make(), utils.dequantize_gguf_tensor(layer.weight).to(dtype))
        expected = layer(x)
        calls.clear()
        assert torch.equal(fused.linear(layer, x), expected) and calls == ["dequantize_gguf"]
        assert torch.equal(fused.called(layer, x), expected)


@torch.no_grad()
def test_a_gguf_layer_of_bf16_is_a_view(random, calls):
    weight = random(48, 64, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        layer = of_gguf("Q8_0", into=64, dtype=dtype)
        kind = gguf.GGMLQuantizationType.BF16
        layer.weight = utils.GGUFParameter(weight.view(torch.uint8), quant_type=kind)
        assert_bits(made(layer).make(), weight.to(dtype))
        x = random(5, 64, dtype=dtype)
        expected = layer(x)
        calls.clear()
        assert torch.equal(fused.linear(layer, x), expected) and calls == []
        assert (made(layer).make().data_ptr() == weight.data_ptr()) == (dtype == torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", QUANTO)
def test_a_quanto_layer_has_its_own_bits(random, device, calls, kind, dtype):
    for bias in (True, False):
        layer, x = of_quanto(kind, bias=bias, dtype=dtype, device=device), random(2, 9, 64, dtype=dtype, device=device)
        weight = made(layer).make()
        assert_bits(weight, layer.weight.dequantize())
        own = layer(x)
        calls.clear()
        got = fused.linear(layer, x)
        assert calls == ["dequantize"]
        # it rounds the product before it adds a bias, and on a CPU multiplies bf16 with int8 as they are
        if not bias and not (device.type == "cpu" and (kind, dtype) == ("qint8", torch.bfloat16)):
            assert torch.equal(got, own)
        exact = x.double() @ weight.double().T + (layer.bias.double() if bias else 0)
        eager = torch.nn.functional.linear(x, weight) + (layer.bias if bias else 0)
        assert_within_budget(got, exact, eager, luck=2.0)
        assert (own - got).norm() < 0.01 * got.norm()


def test_gradients_of_a_quanto_weight_are_its_own_calls():
    layer = of_quanto("qint8", dtype=torch.float32)
    assert layer.weight.requires_grad and made(layer) is None
    with torch.no_grad():
        assert made(layer) is not None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Q8_0", "qint8"])
def test_gelu_and_several_layers(random, calls, kind):
    """GELU has the weight too; layers with the same input have theirs one after another."""
    make = of_gguf if kind in BLOCKS else of_quanto
    layers, x = [make(kind, out=out, into=64, dtype=torch.float32) for out in (48, 16, 32)], random(2, 5, 64)
    expected = [layer(x) for layer in layers]
    calls.clear()
    for got, own in zip(fused.linear_of_each(layers, x), expected):
        assert torch.allclose(got, own, atol=1e-6)
    own = torch.nn.functional.gelu(expected[0], approximate="tanh")
    assert torch.allclose(fused.gelu(layers[0], x), own, atol=1e-6)
    assert len(calls) == 4 and "layer" not in calls


@torch.no_grad()
def test_written_blocks_are_the_new_ones(random):
    layer, x = of_gguf("Q8_0", into=64, dtype=torch.float32), random(5, 64)
    first = fused.linear(layer, x)
    layer.weight.as_tensor().copy_(blocks_of("Q8_0", 48, 2, seed=5))
    assert torch.equal(fused.linear(layer, x), layer(x)) and not torch.equal(layer(x), first)


# what is not exactly as known


class Other(utils.GGUFLinear):
    pass


def _with(layer, **fields):
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer


def _forward(layer):
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    return layer


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def _typed(layer, kind):
    layer.weight.quant_type = gguf.GGMLQuantizationType[kind]
    return layer


def _axis(layer):
    layer.weight._axis = -1
    return layer


GGUF = dict(into=64, dtype=torch.float32)
STRANGE = {
    "a hook": lambda: _hooked(of_gguf("Q8_0", **GGUF)),
    "a forward": lambda: _forward(of_gguf("Q8_0", **GGUF)),
    "a class": lambda: _with(of_gguf("Q8_0", **GGUF), __class__=Other),
    "another type": lambda: _typed(of_gguf("Q4_0", **GGUF), "IQ4_NL"),  # blocks of the same size
    "a bias in 16 bits": lambda: _with(of_gguf("Q8_0", **GGUF), bias=torch.nn.Parameter(torch.ones(48).half(), False)),
    "another shape": lambda: _with(of_gguf("Q8_0", **GGUF), in_features=32),
    "a quanto hook": lambda: _hooked(of_quanto("qint8", dtype=torch.float32)),
    "quanto's activations": lambda: of_quanto("qint8", activations="qint8", dtype=torch.float32),
    "quanto's other axis": lambda: _axis(of_quanto("qint8", dtype=torch.float32)),
    "quanto's one row": lambda: of_quanto("qint8", out=1, dtype=torch.float32),
    "a quanto forward": lambda: _forward(of_quanto("qint8", dtype=torch.float32)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_exactly_as_known_is_called(random, calls, name):
    layer = STRANGE[name]()
    x = random(3, 64)
    expected = layer(x)
    calls.clear()
    got = fused.linear(layer, x)
    if not torch.is_tensor(expected) or type(expected) is torch.Tensor:
        assert torch.equal(got, expected)
    assert made(layer) is None and not {"dequantize", "dequantize_gguf"} & set(calls)


@torch.no_grad()
def test_other_versions_dtypes_and_kernels_are_called(monkeypatch, random):
    layer, x = of_gguf("Q8_0", **GGUF), random(3, 64)
    assert fused.weight_of(layer, x) is not None and fused.weight_of(layer, x.bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.weight_of(layer, x) is None
    for version in ("0.40.0", "0.43.0", "1.0"):
        monkeypatch.setattr(diffusers, "__version__", version)
        assert made(layer) is None
    monkeypatch.undo()
    monkeypatch.setattr(utils, "ops", object())
    assert made(layer) is None
    monkeypatch.undo()
    assert made(layer) is not None
    quanto = pytest.importorskip("optimum.quanto")
    layer = of_quanto("qint8", dtype=torch.float32)
    assert made(layer) is not None
    monkeypatch.setattr(quanto, "__version__", "0.2.8")
    assert made(layer) is None


# whole edits


def pipeline(kind=None, every=False, dtype=torch.float32, device="cpu"):
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)
    for name, layer in list(pipe.transformer.named_modules()) if kind else ():
        if type(layer) is torch.nn.Linear and layer.in_features % 32 == 0 and (every or "blocks." in name):
            made = utils.GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype)
            own = gguf.GGMLQuantizationType[kind]
            blocks = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().float().cpu().numpy(), own))
            made.weight, made.bias = utils.GGUFParameter(blocks.to(device), quant_type=own), layer.bias
            parent, _, child = name.rpartition(".")
            setattr(pipe.transformer.get_submodule(parent), child, made)
    return pipe


def edits(pipe, runner="fused"):
    mask = np.zeros((128, 128), np.float32)
    mask[:, :32] = 1
    return pipe(image=tiny_image(), mask_image=mask, generator=torch.Generator().manual_seed(0),
                specedit=paper(stages=(1, 3, 0), finish="locked", kv_refresh=2, runner=runner),
                **call_options())  # fmt: skip


def away(a, b):
    return ((a.images.float() - b.images.float()).norm() / b.images.float().norm()).item()


def test_an_edit_calls_no_gguf_layer_within_a_step(calls):
    """But those of the timestep's embedding, which are called before the steps."""
    pipe = pipeline("Q4_0", every=True)
    eager = edits(pipe, "eager")
    layers = sum(type(x) is utils.GGUFLinear for x in pipe.transformer.modules())
    embedding = sum(type(x) is utils.GGUFLinear for x in pipe.transformer.time_text_embed.modules())
    assert layers > embedding + 20 and embedding > 0
    calls.clear()
    got = edits(pipe)
    assert calls.count("dequantize_gguf") > layers and calls.count("layer") % embedding == 0
    assert calls.count("layer") <= 3 * embedding
    assert away(got, eager) < 1e-4 < away(got, edits(pipeline()))
    assert "one CUDA device" in inspect("graph", pipe.transformer, pipe.vae)[0]
    assert "GGUF's Q4_0" in inspect("compile", pipe.transformer, pipe.vae)[0]


def test_a_lora_on_such_layers_is_added_to_the_product(calls):
    peft = pytest.importorskip("peft")
    pipe = pipeline("Q8_0")
    bare = edits(pipe)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "one")
    eager = edits(pipe, "eager")
    calls.clear()
    got = edits(pipe)
    assert "dequantize_gguf" in calls and "layer" not in calls
    assert away(got, eager) < 1e-4 and away(got, bare) > 0.05
    pipe.transformer.disable_adapters()
    assert away(edits(pipe), bare) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_graph_replays_what_fused_steps_do(kind):
    pipe, plain = pipeline(kind, True, torch.bfloat16, "cuda"), pipeline(None, False, torch.bfloat16, "cuda")
    expected = edits(pipe)
    assert 0 < away(expected, edits(plain)) < 0.3
    for _ in range(2):
        got = edits(pipe, "graph")
        assert got.stats.runner == "graph" and got.stats.runner_reason == "" and away(got, expected) < 0.02
    for weight in pipe.transformer.parameters():  # written where they lie
        if hasattr(weight, "quant_type"):
            weight.as_tensor().view(-1, BLOCKS[kind][1]).view(torch.float16)[:, 0].mul_(0.5)
    changed = edits(pipe, "graph")
    assert changed.stats.captures == 0 and away(changed, edits(pipe)) < 0.02 < away(changed, expected)
