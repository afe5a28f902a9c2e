# SPDX-License-Identifier: Apache-2.0
"""What people load and wrap a model with: each is right, is applied, and is gone with `disable_specedit`.

The conditions are those of bench/models/conditions.py. Where all is selected an eager run is the stock pipeline's to
the last bit; a fused one is within rounding of the eager one; one that left a condition out would be the run without
it.
"""

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from tiny_models import call_options, paper, qwen_text, small_qwen, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import SpecEditFluxKontextPipeline, disable_specedit, enable_specedit
from specedit_kernels.engine import _diffusers, fused
from specedit_kernels.engine.quantised import made
from specedit_kernels.engine.runner import StepRunner, inspect, weight_signature

pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = Path(__file__).resolve().parents[1] / "bench" / "models"
CACHED = dict(stages=(1, 3, 0), finish="locked", kv_refresh=2)
PACKAGES = {"lora": "peft", "dora": "peft", "torchao": "torchao", "bitsandbytes": "bitsandbytes", "gguf": "gguf",
            "quanto": "optimum.quanto"}  # fmt: skip
# How far an edit by quantised weights may be from that by the weights themselves, as a share of the latter's norm.
BOUNDS = {"8": 0.05, "4": 0.5}


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        spec = importlib.util.spec_from_file_location("conditions_bench", BENCH / "conditions.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module", autouse=True)
def small():
    """The stock Qwen pipeline works on a megapixel whatever it is given; here on 128 x 128 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        small_qwen(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def dynamic_fp8_on_any_device():
    """torchao makes dynamic fp8 for GPUs alone, but computes with it on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchao") is not None:
            patch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
        yield


def needs(name):
    """Skip where the condition's package is missing."""
    package = PACKAGES.get(name.split()[0])
    if package:
        pytest.importorskip(package)


def make(family="flux", dtype=torch.float32):
    pipe = tiny_pipeline() if family == "flux" else tiny_qwen(zero_cond_t=True)
    pipe.transformer.to(dtype)
    return pipe


def texts(pipe):
    if "Flux" in type(pipe).__name__:
        return call_options()
    return qwen_text() | qwen_text(9, negative=True, seed=5) | dict(true_cfg_scale=3.0, output_type="latent")


def stock(pipe, steps=2, **options):
    """The pipeline's own call."""
    options = dict(height=128, width=128, num_inference_steps=steps) | texts(pipe) | options
    return pipe(image=tiny_image(), generator=torch.Generator().manual_seed(0), **options).images


def edit(pipe, runner="eager", columns=2, options=CACHED, **call):
    mask = np.zeros((128, 128), np.float32)
    mask[:, : 16 * columns] = 1
    return pipe(image=tiny_image(), mask_image=mask, generator=torch.Generator().manual_seed(0),
                specedit=paper(**options, runner=runner), **texts(pipe) | call)  # fmt: skip


def everything(pipe, runner="eager", **call):
    return edit(pipe, runner, 8, dict(stages=(0, 0, 2), finish="full"), **call)


def away(a, b):
    """How far a is from b, as a share of b's norm."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


NAMES = ["lora 16", "lora 16, fused", "dora 16", "torchao int8 weight-only", "torchao int8 dynamic",
         "torchao fp8 weight-only", "torchao fp8 dynamic", "layerwise fp8", "bitsandbytes nf4", "bitsandbytes int8",
         "gguf Q8_0", "gguf Q4_0", "quanto int8", "quanto fp8"]  # fmt: skip


@pytest.fixture(scope="module")
def without():
    """{family: (an eager edit, a fused one) without any condition}."""
    found = {}
    for family in ("flux", "qwen"):
        pipe = make(family)
        enable_specedit(pipe)
        found[family] = tuple(edit(pipe, runner).images for runner in ("eager", "fused"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("name", NAMES)
def test_a_condition_is_right_applied_and_restored(bench, without, name, family):
    needs(name)
    if family == "qwen" and name not in ("torchao int8 weight-only", "layerwise fp8", "bitsandbytes nf4"):
        pytest.skip("the mechanism is Flux's")
    pipe = make(family)
    kind = type(pipe)
    bench.CONDITIONS[name](pipe)
    expected = stock(pipe)
    enable_specedit(pipe)
    whole = everything(pipe)
    assert whole.stats.fallback == "dense" and torch.equal(whole.images, expected)
    eager, quick = edit(pipe), edit(pipe, "fused")
    assert (eager.stats.runner, quick.stats.runner) == ("eager", "fused"), quick.stats.runner_reason
    plain = without[family]
    # what is quantised step by step by the largest number of a row takes another step where that number rounds
    bound, factor = (1e-3, 2) if "dynamic" in name or name == "bitsandbytes int8" else (1e-4, 100)
    if name == "torchao fp8 dynamic":  # fused steps quantise activations by row, the layers' own calls by tensor
        bound, factor = BOUNDS["8"], 0.1
    for got, bare in zip((eager, quick), plain):
        assert away(got.images, bare) > factor * away(quick.images, eager.images)
    assert away(quick.images, eager.images) < bound
    if "lora" not in name and "dora" not in name:
        few = any(x in name for x in ("nf4", "Q4"))
        assert away(eager.images, plain[0]) < BOUNDS["4" if few else "8"]
    disable_specedit(pipe)
    assert type(pipe) is kind and torch.equal(stock(pipe), expected)


@pytest.mark.slow
def test_a_gguf_file_is_applied(bench, tmp_path):
    """A file written with the gguf package, loaded as diffusers loads them."""
    gguf = pytest.importorskip("gguf")
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    pipe = make()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "flux")
    packed = {f"{name}.weight" for name, _ in bench.linear_layers(pipe.transformer)}
    for name, x in pipe.transformer.state_dict().items():
        kind = gguf.GGMLQuantizationType["Q8_0" if name in packed else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe.transformer.save_config(tmp_path / "transformer")
    loaded = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "tiny.gguf"), config=str(tmp_path), subfolder="transformer", torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    assert type(loaded.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    layers = [x for x in loaded.modules() if type(x).__name__ == "GGUFLinear"]
    assert len(layers) == len(packed) and all(made(x) is not None for x in layers)
    enable_specedit(pipe)
    before = edit(pipe).images
    pipe.transformer = loaded
    disable_specedit(pipe)
    expected = stock(pipe)
    enable_specedit(pipe)
    assert torch.equal(everything(pipe).images, expected)
    eager, quick = edit(pipe).images, edit(pipe, "fused")
    assert quick.stats.runner == "fused" and away(quick.images, eager) < 1e-4 < away(eager, before) < BOUNDS["8"]


# what a graph takes for granted


@pytest.mark.parametrize("name", [n for n in NAMES if n.split()[0] in ("torchao", "bitsandbytes", "gguf", "quanto")])
@torch.no_grad()
def test_a_graphs_premises_know_all_memory_of_a_quantised_weight(bench, name):
    """Each tensor of a weight, moved by itself, is another premise; and nothing moved is none."""
    needs(name)
    pipe = make()
    bench.CONDITIONS[name](pipe)
    edits = (enable_specedit(pipe), edit(pipe, "fused"))  # libraries arrange their weights at the first call
    assert edits[1].stats.runner == "fused"
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    premises = weight_signature(pipe.transformer)
    assert premises == weight_signature(pipe.transformer)
    tensors = quantised_parts(layer)
    assert len(tensors) >= (1 if name.startswith("gguf") else 2)
    for x in tensors:
        kept = x.data
        x.data = kept.clone()
        assert weight_signature(pipe.transformer) != premises
        x.data = kept
        assert weight_signature(pipe.transformer) == premises


def quantised_parts(layer):
    """The tensors that a library computes with in place of a layer's weight."""
    weight = layer.weight
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    if hasattr(weight, "quant_state"):
        return [weight, weight.quant_state.absmax, weight.quant_state.code]
    return [layer.state.CB, layer.state.SCB] if hasattr(layer, "state") else [weight]


@pytest.mark.parametrize(
    "name, words",
    [
        ("bitsandbytes int8", "looks for outliers"),
        ("gguf Q4_0", "one CUDA device"),
        ("gguf IQ4_NL", "is GGUF's IQ4_NL"),
        ("quanto int8", "one CUDA device"),
        ("torchao int8 dynamic", "torchao's int8 with quantised activations"),
    ],
)
def test_layers_that_wait_for_the_host_are_no_graphs(bench, name, words):
    needs(name)
    pipe = make()
    if name == "bitsandbytes int8":
        bench.bnb_int8(pipe, threshold=6.0)
    elif name == "gguf IQ4_NL":
        bench.gguf("Q4_0", pipe)  # blocks of the same size
        for weight in pipe.transformer.parameters():
            if hasattr(weight, "quant_type"):
                weight.quant_type = type(weight.quant_type).IQ4_NL
    else:
        bench.CONDITIONS[name](pipe)
    assert words in inspect("graph", pipe.transformer, pipe.vae)[0]
    assert inspect("fused", pipe.transformer, pipe.vae)[0] == ""
    if name == "torchao int8 dynamic":  # what is compiled asks for nothing
        assert "one CUDA device" in inspect("compile", pipe.transformer, pipe.vae)[0]
    if name == "gguf Q4_0":  # there it is called
        assert "is GGUF's Q4_0" in inspect("compile", pipe.transformer, pipe.vae)[0]


# hooks


@pytest.mark.slow
def test_hooks_and_forwards_of_called_layers_work_in_fused_steps():
    pipe = make()
    enable_specedit(pipe)
    double, single = pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[0]
    # not to_q and to_k: a norm takes the factor away again
    layers = [double.attn.to_v, double.attn.to_out[0], double.ff.net[0].proj, double.ff.net[2], single.attn.to_v,
              single.proj_mlp, single.proj_out, double.norm1.linear, pipe.transformer.proj_out,
              pipe.transformer.x_embedder]  # fmt: skip
    bare = edit(pipe).images
    for layer in layers:
        handle = layer.register_forward_hook(lambda module, args, output: 1.1 * output)
        eager, quick = edit(pipe), edit(pipe, "fused")
        assert quick.stats.runner == "fused" and away(quick.images, eager.images) < 1e-4 < away(eager.images, bare)
        assert "has hooks" in inspect("graph", pipe.transformer, pipe.vae)[0]
        handle.remove()
        before = layer.forward
        layer.forward = lambda x, before=before: 1.1 * before(x)
        again = edit(pipe, "fused")
        assert again.stats.runner == "fused" and away(again.images, eager.images) < 1e-4
        assert "a forward of its own" in inspect("graph", pipe.transformer, pipe.vae)[0]
        del layer.forward
    assert torch.equal(edit(pipe).images, bare)


@pytest.mark.slow
def test_hooks_of_passed_modules_are_refused_with_the_reason():
    pipe = make()
    enable_specedit(pipe)
    for module in (pipe.transformer, pipe.transformer.transformer_blocks[0].norm1, pipe.vae.decoder):
        handle = module.register_forward_hook(lambda *args: None)
        out = edit(pipe, "fused")
        assert out.stats.runner == "eager" and f"a {type(module).__name__} has hooks" in out.stats.runner_reason
        handle.remove()
    assert edit(pipe, "fused").stats.runner == "fused"


@pytest.mark.slow
def test_hooks_are_not_left_out_where_layers_compute_in_fp8():
    pipe, calls = make(), []
    enable_specedit(pipe)
    bare = edit(pipe, "fused", options=CACHED | dict(precision="fp8"))
    pipe.transformer.transformer_blocks[0].attn.to_out[0].register_forward_hook(
        lambda module, args, output: calls.append(1) or 1.5 * output
    )
    hooked = edit(pipe, "fused", options=CACHED | dict(precision="fp8"))
    assert hooked.stats.precision == "fp8" and calls and away(hooked.images, bare.images) > 1e-3


def test_cast_layers_stay_where_they_lie():
    """A fused step does not move the weights that layerwise casting keeps small, so graphs and threads find them."""
    pipe = make()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    enable_specedit(pipe)
    before = weight_signature(pipe.transformer)
    quick = edit(pipe, "fused")
    assert quick.stats.runner == "fused" and weight_signature(pipe.transformer) == before
    assert away(quick.images, edit(pipe).images) < 1e-4
    assert weight_signature(pipe.transformer) != before  # the hook moves them


# LoRA


def loaded(bench, pipe, *adapters, rank=4):
    for i, adapter in enumerate(adapters):
        pipe.load_lora_weights(bench.lora_state(pipe.transformer, rank, seed=i), adapter_name=adapter)


def same_in_both(pipe, **call):
    """A fused edit, near the eager one."""
    eager, quick = edit(pipe, **call), edit(pipe, "fused", **call)
    assert quick.stats.runner == "fused" and away(quick.images, eager.images) < 1e-4
    return quick.images


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True])
def test_loras_come_go_and_change(bench, joined):
    pytest.importorskip("peft")
    from specedit_kernels.models.flux_kontext import join_projections_

    pipe = make()
    enable_specedit(pipe)
    seen = [same_in_both(pipe)]

    def differs(**call):
        if joined:
            join_projections_(pipe.transformer)
        seen.append(same_in_both(pipe, **call))
        assert all(away(seen[-1], x) > 1e-3 for x in seen[:-1])
        return seen[-1]

    loaded(bench, pipe, "one")
    one = differs()
    half = differs(joint_attention_kwargs={"scale": 0.5})
    assert away(same_in_both(pipe), one) < 1e-6  # the scale was the call's
    loaded_two = bench.lora_state(pipe.transformer, 4, seed=1)
    pipe.load_lora_weights(loaded_two, adapter_name="two")
    pipe.set_adapters(["two"])
    differs()
    pipe.set_adapters(["one", "two"], adapter_weights=[0.7, 0.4])
    differs()
    pipe.set_adapters(["one"], adapter_weights=[0.5])
    assert away(same_in_both(pipe), half) < 1e-4
    pipe.set_adapters(["one"], adapter_weights=[1.0])
    pipe.fuse_lora(adapter_names=["one"])
    assert away(same_in_both(pipe), one) < 1e-4
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert away(same_in_both(pipe), seen[0]) < 1e-4
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert away(same_in_both(pipe), seen[0]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_hot_swapped_lora_is_the_new_one(bench, scale):
    pytest.importorskip("peft")
    pipe, call = make(), dict(joint_attention_kwargs={"scale": scale})
    pipe.enable_lora_hotswap(target_rank=8)
    enable_specedit(pipe)
    loaded(bench, pipe, "one", rank=8)
    first, premises = same_in_both(pipe, **call), weight_signature(pipe.transformer)
    assert torch.equal(edit(pipe, "fused", **call).images, first)  # a scale that is a tensor is as it was
    state = bench.lora_state(pipe.transformer, 4, seed=1)
    pipe.load_lora_weights(state, adapter_name="one", hotswap=True)
    second = same_in_both(pipe, **call)
    other = make()
    enable_specedit(other)
    other.load_lora_weights(state, adapter_name="one")
    assert away(second, first) > 1e-3 and away(second, edit(other, "fused", **call).images) < 1e-4
    # all was written where it lay, but for numbers on the host, which a graph keeps
    assert weight_signature(pipe.transformer) == premises
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.scaling["one"].fill_(2.0)
    assert weight_signature(pipe.transformer) != premises


@torch.no_grad()
def test_joined_projections_with_adapters_are_one_product(bench, monkeypatch):
    pytest.importorskip("peft")
    from specedit_kernels.models.flux_kontext import join_projections_

    pipe = make()
    loaded(bench, pipe, "one")
    join_projections_(pipe.transformer)
    attn, x = pipe.transformer.transformer_blocks[0].attn, torch.randn(1, 5, 32)
    layers = (attn.to_q, attn.to_k, attn.to_v)
    expected = [layer(x) for layer in layers]
    assert all(not torch.equal(layer.base_layer(x), y) for layer, y in zip(layers, expected))
    shapes, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(fused.F, "linear", lambda x, w, b=None: shapes.append(tuple(w.shape)) or linear(x, w, b))
    for got, y in zip(fused.linear_of_each(layers, x), expected):
        assert torch.allclose(got, y, atol=1e-6)
    assert shapes.count((96, 32)) == 1 and (32, 32) not in shapes
    # what is more than a sum is called
    for change in ("lora_variant", "hook", "dropout"):
        layer = attn.to_k
        if change == "lora_variant":
            layer.lora_variant["one"] = object()
        elif change == "hook":
            handle = layer.register_forward_hook(lambda *args: None)
        else:
            layer.lora_dropout["one"] = torch.nn.Dropout(0.5)
        assert _diffusers.low_rank_parts(layer) == (layer, [])
        if change == "lora_variant":
            del layer.lora_variant["one"]
        elif change == "hook":
            handle.remove()
    layer.lora_dropout["one"].eval()
    assert _diffusers.low_rank_parts(layer)[0] is layer.base_layer


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("joined", [False, True])
def test_adapters_are_added_in_few_products(bench, joined, monkeypatch):
    """What two adapters add to q, k and v is their own sum, by the weights and scales of the moment."""
    pytest.importorskip("peft")
    from specedit_kernels.models.flux_kontext import join_projections_

    pipe = make()
    loaded(bench, pipe, "one", "two")
    pipe.set_adapters(["one", "two"], adapter_weights=[0.7, -1.3])
    if joined:
        join_projections_(pipe.transformer)
    attn, x = pipe.transformer.transformer_blocks[0].attn, torch.randn(2, 6, 32)[:, 1:]
    layers = (attn.to_q, attn.to_k, attn.to_v)
    called, linear = [], torch.nn.functional.linear

    def near():
        expected = [layer(x) for layer in layers]
        bare = [layer.base_layer(x) for layer in layers]
        assert all((y - b).abs().max() > 1e-2 for y, b in zip(expected, bare))
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: called.append(a[1].shape[0]) or linear(*a))
        called.clear()
        got = fused.linear_of_each(layers, x)
        monkeypatch.undo()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected))
        # never the layers' own weights
        assert all(torch.equal(layer.base_layer(x), b) for layer, b in zip(layers, bare))

    near()
    base = [96] if joined else [32, 32, 32]
    assert called == [*base, 24]
    attn.to_k.lora_A["two"].weight.mul_(3.0)  # where it lies
    attn.to_v.lora_B["one"].weight.add_(0.1)
    near()
    attn.to_q.scaling["one"] = torch.tensor(0.25)
    near()
    attn.to_q.lora_B["one"].register_forward_hook(lambda module, args, output: 2 * output)
    near()
    assert called.count(4) == 6  # each is called


def with_dora(dtype, *names):
    """A layer of 192 x 256 with DoRAs of PEFT's."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    holder = torch.nn.Sequential(torch.nn.Linear(256, 192)).to(dtype)
    config = peft.LoraConfig(r=16, lora_alpha=24, target_modules=["0"], use_dora=True, init_lora_weights=False)
    for name in names:
        holder = peft.inject_adapter_in_model(config, holder, name)
    layer = holder.to(dtype).eval().requires_grad_(False)[0]
    for name in names:
        layer.lora_A[name].weight.mul_(0.5)
        layer.lora_magnitude_vector[name].weight.mul_(torch.rand(192) + 0.5)
    return layer


@pytest.fixture
def changes(monkeypatch):
    """How often PEFT makes the whole change of a layer."""
    whole_changes = []
    peft = pytest.importorskip("peft")
    whole = peft.tuners.lora.dora.DoraLinearLayer.get_lora_weight
    monkeypatch.setattr(peft.tuners.lora.dora.DoraLinearLayer, "get_lora_weight",
                        lambda *args, **kwargs: whole_changes.append(1) or whole(*args, **kwargs))  # fmt: skip
    return whole_changes


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dora_makes_no_weight(changes, dtype, bias):
    """As near to float64 as its own call, with what is there at the call."""
    layer, x = with_dora(dtype, "one"), torch.randn(2, 33, 256).to(dtype)
    down, up, length = layer.lora_A["one"].weight, layer.lora_B["one"].weight, layer.lora_magnitude_vector["one"].weight
    base = layer.base_layer
    if not bias:
        base.bias = None
    for change in (lambda: None, lambda: down.mul_(2), lambda: up.mul_(0.5), lambda: length.mul_(3),
                   lambda: base.weight.mul_(-1), lambda: layer.scaling.update(one=0.3)):  # fmt: skip
        change()
        own = layer(x)
        changes.clear()
        got = fused.linear(layer, x)
        # without a bias torch.nn.Linear is called as it is
        assert bool(changes) != bias and got.dtype == dtype and got.shape == own.shape
        weight = base.weight.double() + layer.scaling["one"] * up.double() @ down.double()
        exact = x.double() @ (weight * (length.double() / weight.norm(dim=1))[:, None]).T
        exact += base.bias.double() if bias else 0
        assert away(got.double(), exact) <= 1.2 * away(own.double(), exact) < away(base(x).double(), exact) / 50


@torch.no_grad()
def test_other_doras_are_called(changes):
    x = torch.randn(5, 256)

    def is_called(layer):
        own = layer(x)
        changes.clear()
        assert torch.equal(fused.linear(layer, x), own) and changes

    layer = with_dora(torch.float32, "one", "two")
    layer.set_adapter(["one", "two"])  # each has the sum of those before it
    is_called(layer)
    layer.set_adapter(["one"])
    assert away(fused.linear(layer, x), layer(x)) < 1e-5
    handle = layer.lora_magnitude_vector["one"].register_forward_hook(lambda module, args, output: 2 * output)
    is_called(layer)
    handle.remove()
    handle = layer.lora_B["one"].register_forward_hook(lambda module, args, output: 2 * output)
    is_called(layer)
    handle.remove()
    layer.scaling["one"] = torch.tensor(0.7)
    is_called(layer)
    layer.scaling["one"] = 0.7
    layer.lora_dropout["one"] = torch.nn.Dropout(0.0)
    layer.train()
    is_called(layer)
    layer.eval()
    with torch.enable_grad():
        is_called(layer)
    layer.enable_adapters(False)
    changes.clear()
    assert torch.equal(fused.linear(layer, x), layer(x)) and not changes


# model offloading


def offloaded(pipe):
    """Model offloading whose weights are no numbers until their model is called, and are elsewhere each time."""
    import accelerate

    class CpuOffload(accelerate.hooks.CpuOffload):
        def init_hook(self, module):
            self.weights = {name: x.data.clone() for name, x in module.named_parameters()}
            self.away(module)
            return module

        def away(self, module):
            for x in module.parameters():
                x.data = torch.full_like(x, float("nan"))

        def pre_forward(self, module, *args, **kwargs):
            for before in (part for part in (pipe.transformer, pipe.vae) if part is not module):
                before._hf_hook.away(before)
            if next(module.parameters()).isnan().all():
                for name, x in module.named_parameters():
                    x.data = self.weights[name].clone()
            return args, kwargs

    for part in (pipe.transformer, pipe.vae):
        accelerate.hooks.add_hook_to_module(part, CpuOffload(execution_device="cpu"), append=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_fused_steps_bring_a_model_in(family):
    plain, pipe = make(family), make(family)
    for x in (plain, pipe):
        enable_specedit(x)
    offloaded(pipe)
    for _ in range(2):
        out = edit(pipe, "fused")
        assert out.stats.runner == "fused" and away(out.images, edit(plain, "fused").images) < 1e-5
        assert torch.equal(edit(pipe).images, edit(plain).images)


@pytest.mark.slow
def test_cast_layers_of_a_moved_model():
    """Layerwise casting with model offloading: the recipe for a card of 16 GB."""
    pipes = [make(), make()]
    for pipe in pipes:
        enable_specedit(pipe)
    bare = edit(pipes[0], "fused").images
    for pipe in pipes:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    offloaded(pipes[1])
    for _ in range(2):
        plain, moved = (edit(pipe, "fused", options=CACHED | dict(kv_cache_dtype="fp8")) for pipe in pipes)
        assert plain.stats.runner == moved.stats.runner == "fused"
        assert away(moved.images, plain.images) < 1e-5 < away(plain.images, bare)


@pytest.mark.slow
def test_graphs_of_a_moved_model_are_of_where_it_lies(monkeypatch):
    from test_runner import Replayed

    from specedit_kernels.engine import runner

    captured = []

    class Captured(Replayed):
        def __init__(self, function, inputs, pool, called):
            assert called
            captured.append(weight_signature(pipe.transformer))
            super().__init__(function, inputs, pool)

        def __call__(self, inputs):
            assert captured[-1] == weight_signature(pipe.transformer)
            return super().__call__(inputs)

    monkeypatch.setattr(runner, "CapturedStep", Captured)
    monkeypatch.setattr(runner, "_first_call", lambda function, inputs: function(**inputs))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("specedit_kernels.engine.pipeline.inspect_weights", lambda *arguments: ("", []))
    plain, pipe = make(), make()
    enable_specedit(plain)
    enable_specedit(pipe)
    offloaded(pipe)
    expected = edit(plain, "fused", options=CACHED | dict(stages=(2, 4, 0), kv_refresh=4)).images
    for _ in range(2):
        out = edit(pipe, "graph", options=CACHED | dict(stages=(2, 4, 0), kv_refresh=4))
        # the second of two coarse steps, and of three active ones; the mixed step has no second
        assert out.stats.captures == 2 and out.stats.runner == "graph" and away(out.images, expected) < 1e-5
        pipe.transformer._hf_hook.away(pipe.transformer)
    steps = StepRunner("graph")
    steps.bring(pipe.transformer)  # nothing is moved for a runner of fixed weights
    assert steps._signature is None


# refusals


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_are_refused_by_name(kind):
    pipe = make()
    flow = {} if "Heun" in kind.__name__ else dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe.scheduler = kind(**flow)
    with pytest.raises(TypeError, match=f"scheduler: .*FlowMatchEuler.*one evaluation.*got {kind.__name__}"):
        enable_specedit(pipe)


@pytest.mark.parametrize("config", [
    FirstBlockCacheConfig(), TaylorSeerCacheConfig(), MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4),
    PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 0),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_caches_are_refused_with_what_to_use_instead(config):
    pipe = make()
    enable_specedit(pipe)
    pipe.transformer.enable_cache(config)
    for runner in ("eager", "fused"):
        with pytest.raises(ValueError, match="transformer: expected no cache .*preset and kv_refresh") as error:
            edit(pipe, runner)
        assert "\n" not in str(error.value)
    pipe.transformer.disable_cache()
    assert edit(pipe).images.isfinite().all()


LIGHTNING = dict(base_image_seq_len=256, base_shift=1.0986, max_image_seq_len=8192, max_shift=1.0986, shift=1.0,
                 shift_terminal=None, time_shift_type="exponential", use_dynamic_shifting=True)  # fmt: skip


@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("sigmas", [None, [1.0, 0.7, 0.25]])
@pytest.mark.parametrize(
    "config", [{}, LIGHTNING, dict(shift=3.0), dict(use_beta_sigmas=False, use_karras_sigmas=True)]
)
def test_euler_schedules_are_the_stock_pipelines(config, sigmas, runner):
    pipe = make()
    if config:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    expected = stock(pipe, 3, sigmas=sigmas)
    enable_specedit(pipe)
    got = edit(pipe, runner, 8, dict(stages=(0, 0, 3), finish="full"), sigmas=sigmas).images
    assert torch.equal(got, expected) if runner == "eager" else away(got, expected) < 1e-4


# attention backends, torch.compile


@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_users_attention_serves_whole_steps(family, when, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    pipe, calls = make(family), []
    name = AttentionBackendName._NATIVE_MATH
    before = _AttentionBackendRegistry._backends[name]

    def own(*args, **kwargs):
        calls.append(1)
        return before(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, own)
    # set_attention_backend sets the process's too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    if when == "before":
        pipe.transformer.set_attention_backend("_native_math")
    enable_specedit(pipe)
    if when == "after":
        pipe.transformer.set_attention_backend("_native_math")
    blocks, passes = 2, 2 if family == "qwen" else 1
    bare = make(family)
    enable_specedit(bare)
    for runner in ("eager", "fused"):
        calls.clear()
        got = everything(pipe, runner)
        # Qwen's padded text has a bias of its own, which another attention takes
        joined = runner == "fused" and family == "qwen"
        assert len(calls) == (0 if joined else 2 * blocks * passes)
        assert away(got.images, everything(bare, runner).images) < 1e-4
    disable_specedit(pipe)
    calls.clear()
    stock(pipe)
    assert len(calls) == 2 * blocks * passes


# threads


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("siblings", [False, True])
def test_each_thread_has_its_own_edit(family, runner, siblings):
    pipe = make(family)
    enable_specedit(pipe)
    columns = (2, 3, 4, 5)
    # a scale of its own, which a run sets on the shared module
    calls = [{}] * 4 if family == "qwen" else [{"guidance_scale": 1.0 + n} for n in columns]
    expected = [edit(pipe, runner, n, **call).images for n, call in zip(columns, calls)]
    pipes, wrong = [pipe] * 4, []
    if siblings:
        pipes = [pipe, *(type(pipe).from_pipe(pipe) for _ in range(3))]
        for each in pipes:
            each.set_progress_bar_config(disable=True)

    def work(i):
        try:
            if not torch.equal(edit(pipes[i], runner, columns[i], **calls[i]).images, expected[i]):
                wrong.append(i)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# on a GPU: python -m pytest tests/test_conditions.py -m gpu


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ON_GPU = [pytest.param(name, marks=GPU) for name in NAMES]


def on_gpu(change=None):
    pipe = SpecEditFluxKontextPipeline.from_pipe(make()).to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    if change is not None:
        change(pipe)
    return pipe


@pytest.mark.parametrize("name", ON_GPU)
def test_replayed_steps_under_a_condition_are_the_steps(bench, name):
    needs(name)
    bare, pipe = on_gpu(), on_gpu(bench.CONDITIONS[name])
    quick, first, second = edit(pipe, "fused"), edit(pipe, "graph"), edit(pipe, "graph")
    on_host = {"torchao int8 dynamic": "torchao's int8"}
    if name in on_host:
        assert first.stats.runner == "fused" and on_host[name] in first.stats.runner_reason  # what "auto" takes
        return
    assert first.stats.runner == second.stats.runner == "graph", second.stats.runner_reason
    assert second.stats.captures == 0
    assert torch.equal(second.images, first.images) and away(second.images, quick.images) < 0.01
    assert away(second.images, edit(bare, "graph").images) > 0


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU)])
def test_graphs_follow_what_changes(bench, _):
    """No stale replay: after each change a graph's edit is that of steps without graphs."""
    pytest.importorskip("peft")
    pipe = on_gpu()
    state = [bench.lora_state(pipe.transformer, 8, seed=i) for i in range(2)]
    seen = [edit(pipe, "graph").images]
    changes = [
        lambda: pipe.load_lora_weights(state[0], adapter_name="one"),
        lambda: pipe.set_adapters(["one"], adapter_weights=[0.5]),
        lambda: pipe.load_lora_weights(state[1], adapter_name="two"),
        lambda: pipe.set_adapters(["one", "two"], adapter_weights=[0.9, 0.3]),
        lambda: (pipe.set_adapters(["one"]), pipe.fuse_lora()),
        lambda: (pipe.unfuse_lora(), pipe.set_adapters(["two"])),
    ]
    for change in changes:
        change()
        got = edit(pipe, "graph")
        twin = SpecEditFluxKontextPipeline.from_pipe(pipe)
        twin.set_progress_bar_config(disable=True)
        assert got.stats.runner == "graph" and away(got.images, edit(twin, "fused").images) < 0.01
        assert all(away(got.images, x) > 0.01 for x in seen[-1:])
        again = edit(pipe, "graph")
        assert again.stats.captures == 0 and torch.equal(again.images, got.images)
        seen.append(got.images)
    pipe.unload_lora_weights()
    assert away(edit(pipe, "graph").images, seen[0]) < 0.01


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU)])
def test_a_hot_swap_needs_no_new_graph(bench, _):
    pytest.importorskip("peft")
    pipe = on_gpu()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(bench.lora_state(pipe.transformer, 8), adapter_name="one")
    edit(pipe, "graph")
    first = edit(pipe, "graph")
    pipe.load_lora_weights(bench.lora_state(pipe.transformer, 4, seed=1), adapter_name="one", hotswap=True)
    second = edit(pipe, "graph")
    assert second.stats.captures == 0 and away(second.images, first.images) > 0.01
    assert away(second.images, edit(pipe, "fused").images) < 0.01


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU)])
def test_graphs_run_while_an_offloaded_transformer_is_on_the_card(_):
    bare, pipe = on_gpu(), on_gpu()
    options = CACHED | dict(stages=(2, 5, 0), kv_refresh=5)
    expected = edit(bare, "graph", options=options).images
    pipe.enable_model_cpu_offload()
    for _ in range(3):
        out = edit(pipe, "graph", options=options)
        assert out.stats.runner == "graph" and out.stats.captures == 2 and away(out.images, expected) < 0.01
        assert pipe.transformer.device.type == "cpu"
    pipe.remove_all_hooks()
    pipe.to("cuda")
    pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    out = edit(pipe, "graph", options=options)
    assert out.stats.runner == "eager" and away(out.images, expected) < 0.02
