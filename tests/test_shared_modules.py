# SPDX-License-Identifier: Apache-2.0
"""The user's modules beside a call: unchanged while it works, brought in where they are offloaded, never left out."""

import functools
import threading

import accelerate
import numpy as np
import pytest
import torch
from combinations import ALL
from diffusers.hooks import MagCacheConfig, apply_group_offloading, apply_mag_cache
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from tiny_models import call_options, paper, qwen_text, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import (
    SpecEditFluxKontextPipeline,
    SpecEditQwenImageEditPipeline,
    disable_specedit,
)
from specedit_kernels.engine import fused, registry
from specedit_kernels.engine.runner import StepRunner, inspect
from specedit_kernels.models import qwen_image_edit

pytestmark = pytest.mark.usefixtures("one_thread")
CACHED = dict(stages=(1, 3, 0), finish="locked", kv_refresh=2)
FAMILIES = ["flux", "qwen"]


def make(family):
    if family == "flux":
        pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    else:
        pipe = SpecEditQwenImageEditPipeline.from_pipe(tiny_qwen(zero_cond_t=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


TEXTS = qwen_text() | qwen_text(9, negative=True, seed=5)


def edit(pipe, columns=4, output_type="latent", **options):
    """columns: of the mask, in tokens; None: a draft says where the edit is."""
    if "Flux" in type(pipe).__name__:
        call = call_options(output_type=output_type)
    else:
        texts = {name: x.to(pipe.transformer.device) if isinstance(x, torch.Tensor) else x for name, x in TEXTS.items()}
        call = dict(texts, max_area=128 * 128, true_cfg_scale=3.0, output_type=output_type)
    if columns is not None:
        call["mask_image"] = np.zeros((128, 128), np.float32)
        call["mask_image"][:64, : 16 * columns] = 1
    generator = torch.Generator().manual_seed(0)
    return pipe(image=tiny_image(), generator=generator, specedit=paper(**options), **call)


def state(pipe):
    """Every module of a pipeline's transformer and autoencoder, and what stands on it."""
    found = {}
    for part in (pipe.transformer, pipe.vae):
        for name, module in part.named_modules():
            # but for what the stock autoencoder itself keeps of its last frames
            own = {k: id(v) for k, v in vars(module).items() if not k.endswith(("_feat_map", "_conv_idx", "_conv_num"))}
            children = {k: id(v) for k, v in vars(module)["_modules"].items()}
            weights = {k: x.data_ptr() for k, x in vars(module)["_parameters"].items() if x is not None}
            found[id(part), name] = (own, children, weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_call_leaves_the_modules_as_they_were(family, monkeypatch):
    """Ctrl-C at any op: the next call is the same to the last bit."""
    pipe = make(family)
    for runner in ("eager", "fused"):
        expected = edit(pipe, runner=runner, output_type="pt", **CACHED).images
        before, calls, stop = state(pipe), [0], [None]

        class Interrupt(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                calls[0] += 1
                if calls[0] == stop[0]:
                    raise KeyboardInterrupt
                return function(*args, **(kwargs or {}))

        with Interrupt():
            edit(pipe, runner=runner, output_type="pt", **CACHED)
        total = calls[0]
        for share in (0.02, 0.3, 0.6, 0.98):
            calls[0], stop[0] = 0, int(share * total)
            with pytest.raises(KeyboardInterrupt), Interrupt():
                edit(pipe, runner=runner, output_type="pt", **CACHED)
            assert state(pipe) == before
        assert torch.equal(edit(pipe, runner=runner, output_type="pt", **CACHED).images, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_another_thread_sees_the_shared_autoencoder_unchanged(family):
    pipe = make(family)
    shape = (1, 16, 12, 12) if family == "flux" else (1, 16, 1, 12, 12)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    decode = threading.Lock()
    with torch.no_grad():
        expected = pipe.vae.decode(z).sample
    errors = []

    def work():
        try:
            for _ in range(2):
                edit(pipe, runner="fused", output_type="pt", preset=4)
        except Exception as error:  # shown by the other thread
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    seen = 0
    while worker.is_alive() or not seen:
        with decode, torch.no_grad():
            assert torch.equal(pipe.vae.decode(z).sample, expected)
        seen += 1
    worker.join()
    assert not errors


@pytest.mark.slow
def test_edits_of_one_transformer_in_two_threads_are_those_of_one():
    """Keys and values that a step keeps are its own run's."""
    pipe = make("flux")
    expected = {n: edit(pipe, n, **CACHED).images for n in (2, 5)}
    other = SpecEditFluxKontextPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    wrong = []

    def work(pipe, n):
        for _ in range(2):
            if not torch.equal(edit(pipe, n, **CACHED).images, expected[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=each) for each in ((pipe, 2), (other, 5))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# offloading: what is not brought in is no number (poison), or on no device


def on_disk(module, kind, folder):
    options = dict(num_blocks_per_group=1) if kind == "block_level" else {}
    apply_group_offloading(
        module, onload_device=torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(folder), **options
    )


class Load(accelerate.hooks.ModelHook):
    """Model offloading whose weights are no numbers until its module is called."""

    def init_hook(self, module):
        self.weights = {name: x.data.clone() for name, x in module.named_parameters()}
        for x in module.parameters():
            x.data = torch.full_like(x, float("nan"))
        return module

    def pre_forward(self, module, *args, **kwargs):
        for name, x in module.named_parameters():
            x.data = self.weights[name]
        return args, kwargs


def offload(module, kind, folder):
    if kind in ("block_level", "leaf_level"):
        on_disk(module, kind, folder)
    elif kind == "sequential":
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    else:
        accelerate.hooks.add_hook_to_module(module, Load())


@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_part_of_an_offloaded_model_finds_its_weights(family, kind, tmp_path, poison):
    """The decoder's features and the transformer's embedder, which `verify` calls past their models' forward."""
    plain, pipe = make(family), make(family)
    offload(pipe.vae, kind, tmp_path / "vae")
    offload(pipe.transformer, kind, tmp_path / "transformer")
    expected, got = (x._model(None, None, {}) for x in (plain, pipe))
    latents, tokens = torch.randn(1, 16, 8, 8), torch.randn(1, 4, 64)
    for _ in range(2):  # the second call finds what the first left offloaded
        for a, b in zip(expected.codec.features(latents), got.codec.features(latents)):
            assert torch.equal(a, b) and a.isfinite().all()
        assert torch.equal(expected.embed(tokens), got.embed(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_with_an_offloaded_autoencoder_is_the_same(family, kind, tmp_path, poison):
    plain, pipe = make(family), make(family)
    offload(pipe.vae, kind, tmp_path)
    expected, got = (edit(x, None, stages=(1, 1, 1)) for x in (plain, pipe))
    assert torch.equal(got.scores, expected.scores) and torch.equal(got.images, expected.images)


# what the fused forward stands for


def called(module):
    """(names of a module's layers, set of those that were called since)."""
    seen, handles = set(), []
    for name, layer in module.named_modules():
        handles.append(layer.register_forward_pre_hook(lambda m, a, name=name: seen.add(name)))
    return seen, handles


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_bypassed_is_what_the_model_says(family, monkeypatch):
    """Each module is called as one, or is in the model's list, or is a linear layer or a container."""
    pipe = make(family)
    transformer = pipe.transformer
    names = {id(module): name for name, module in transformer.named_modules()}
    listed = {names[id(module)] for module, _ in registry.replaced_by(transformer)}
    seen, handles = called(transformer)
    monkeypatch.setattr(type(pipe), "_runner", lambda self, config: StepRunner("fused"))
    edit(pipe, runner="fused", **CACHED)
    for handle in handles:
        handle.remove()
    held = (torch.nn.ModuleList, torch.nn.Linear, torch.nn.Dropout)
    bypassed = {n for n, m in transformer.named_modules() if n not in seen and not isinstance(m, held)}
    assert bypassed - listed == set()
    assert listed & seen == set()


def patched(transformer):
    block = transformer.transformer_blocks[0]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    return "a FluxTransformerBlock has a forward that is not its model's"


def subclassed(transformer):
    class OwnBlock(FluxTransformerBlock):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    transformer.transformer_blocks[0].__class__ = OwnBlock
    return "a OwnBlock has a forward that is not its model's"


def norm_replaced(transformer):
    transformer.norm_out.norm = torch.nn.Identity()
    return "a Identity has a forward that is not its model's"


@pytest.mark.parametrize("change", [patched, subclassed, norm_replaced])
def test_a_forward_that_would_be_left_out_is_run_eagerly(change):
    pipe = make("flux")
    reason = change(pipe.transformer)
    found, _ = inspect("fused", pipe.transformer, pipe.vae)
    assert found == f"{reason}, which it would leave out"
    assert edit(pipe, runner="fused", preset=4).stats.runner == "eager"


def test_hooks_for_all_modules_are_not_left_out():
    pipe = make("flux")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "hooks for all modules" in inspect("fused", pipe.transformer, pipe.vae)[0]
    finally:
        handle.remove()
    assert inspect("fused", pipe.transformer, pipe.vae)[0] == ""


def test_what_an_offloading_left_behind_is_no_patch():
    pipe = make("flux")
    for module in (pipe.transformer, pipe.vae.decoder, pipe.transformer.transformer_blocks[0]):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
        accelerate.hooks.remove_hook_from_module(module)
        assert "forward" in vars(module)
    assert edit(pipe, runner="fused", preset=4).stats.runner == "fused"


def test_a_cache_of_steps_is_refused_by_name():
    pipe = make("flux")
    apply_mag_cache(pipe.transformer, MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4))
    with pytest.raises(ValueError, match="transformer: expected no cache .*, got MagCache"):
        edit(pipe, preset=4)


def test_joined_weights_are_separate_again_when_their_runner_is_closed_or_freed():
    from specedit_kernels.models.flux_kontext import join_projections_, separate_projections_

    transformer = tiny_pipeline().transformer
    attn, values = transformer.transformer_blocks[0].attn, {n: p.clone() for n, p in transformer.named_parameters()}
    parts = [attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]
    for end in ("close", "free"):
        assert join_projections_(transformer) and fused._as_one(parts) is not None
        runner = StepRunner("fused")
        runner.undoes(lambda: separate_projections_(transformer))
        if end == "close":
            runner.close()
        del runner
        assert len({x.untyped_storage().data_ptr() for x in parts}) == 3
        assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in parts)
    assert parts == [attn.to_q.weight, attn.to_k.weight, attn.to_v.weight] or parts[0] is attn.to_q.weight
    assert all(torch.equal(p, values[n]) for n, p in transformer.named_parameters())


# torch.compile, autocast, quantised weights


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES if ALL else FAMILIES[:1])
def test_compiled_blocks_keep_keys_within_the_recompile_limit(family):
    """A block guards on what it keeps itself; and the stock pipeline works on afterwards."""
    pipe = make(family)
    options = CACHED | dict(lock_text=True)
    # not 4 first: as many edited tokens as a head has channels are one symbol with them, a kind of call of its own
    expected = {n: edit(pipe, n, **options).images for n in (6, 4)}
    torch._dynamo.reset()
    # Qwen's two texts of two lengths: each kind of step would be compiled for fixed lengths first
    dynamic = True if family == "qwen" else None
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, backend="eager")
    for n, images in expected.items():
        assert torch.allclose(edit(pipe, n, **options).images, images, atol=1e-5)
    disable_specedit(pipe)
    size = call_options() if family == "flux" else dict(TEXTS, output_type="latent", height=128, width=128)
    assert pipe(image=tiny_image(), num_inference_steps=2, **size).images.isfinite().all()
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_runner_has_more_kinds_of_calls_than_torchs_limit(monkeypatch):
    """What runner="compile" compiles, here without a GPU: each kind of step of two sizes, with locked text."""
    pipe, options = make("qwen"), CACHED | dict(lock_text=True)
    expected = {n: edit(pipe, n, runner="fused", **options).images for n in (4, 6)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    block = fused.compiled(qwen_image_edit.double_block)
    monkeypatch.setattr(qwen_image_edit.FusedQwenModel, "_block", property(lambda self: block))
    for n, images in expected.items():
        assert torch.allclose(edit(pipe, n, runner="fused", **options).images, images, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > torch._dynamo.config.recompile_limit == 8
    edit(pipe, 5, runner="fused", **options)  # another size is no other kind
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_under_torch_compile_are_the_modules(family, runner):
    pipe = make(family)
    expected = edit(pipe, runner=runner, **CACHED).images
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    if runner == "fused":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    out = edit(pipe, runner=runner, **CACHED)
    assert out.stats.runner == runner and torch.equal(out.images, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [CACHED, CACHED | dict(lock_text=True, kv_cache_dtype="fp8")], ids=["", "fp8"])
@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_weights_run_under_autocast(family, runner, options, device):
    pipe = make(family).to(device)
    expected = edit(pipe, runner=runner, output_type="pt", **options)
    with torch.autocast(device.type, torch.bfloat16):
        out = edit(pipe, runner=runner, output_type="pt", **options)
    assert out.stats.runner == runner
    assert (out.images - expected.images).abs().max() < 0.15 and (out.images - expected.images).abs().mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_dtype_is_the_users(family, runner):
    pipe = make(family)
    expected = edit(pipe, runner=runner, output_type="pt", **CACHED).images
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            got = edit(pipe, runner=runner, output_type="pt", **CACHED).images
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.allclose(got, expected, atol=1e-5)


class Rows(torch.Tensor):
    """Stands for a weight that is quantised with its input's rows: their largest number is asked for."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and not args[0].numel():
            raise RuntimeError("amax of no rows")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_locked_text_needs_no_rows_of_quantised_layers(family):
    pipe = make(family)
    options = CACHED | dict(lock_text=True)
    expected = edit(pipe, **options).images
    for layer in pipe.transformer.modules():
        if type(layer) is torch.nn.Linear:
            weight = layer.weight.detach().as_subclass(Rows)
            layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    assert torch.allclose(edit(pipe, **options).images.as_subclass(torch.Tensor), expected, atol=1e-5)
