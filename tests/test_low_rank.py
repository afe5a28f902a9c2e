# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes in calls: they are what merged weights give, to the thread that asked; adapters go on working."""

import copy
import functools
import gc
import threading

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import call_options, tiny_image, tiny_pipeline

from specedit_kernels import FlashEditConfig, FlashEditFluxKontextPipeline, disable_specedit
from specedit_kernels.engine import merged
from specedit_kernels.engine.fused import gelu, linear_of_each, product_of
from specedit_kernels.engine.low_rank import LowRankChange, active, active_serial, changed, changed_of_each, detach

pytestmark = pytest.mark.usefixtures("one_thread")


def change_of(module, rank=3, seed=0):
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            out, inner = layer.weight.shape
            layers[name] = tuple(0.1 * torch.randn(n, m, generator=generator) for n, m in ((rank, inner), (out, rank)))
    return LowRankChange(layers)


def small():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).double()


def test_within_the_block_calls_are_those_of_merged_weights():
    module, x = small(), torch.randn(5, 8, dtype=torch.float64)
    change = change_of(module)
    plain = module(x)
    merged = small()
    for name, (down, up) in change.layers.items():
        merged.get_submodule(name).weight.data += up.double() @ down.double()
    with active(change, module):
        found = module(x)
    torch.testing.assert_close(found, merged(x))
    assert not torch.allclose(found, plain) and torch.equal(module(x), plain)
    detach(list(module.modules()))
    assert not any(m._forward_hooks for m in module.modules())


def test_paths_that_pass_by_a_layers_forward_add_it_too():
    torch.manual_seed(2)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    change, x = change_of(layers), torch.randn(1, 4, 8)
    with active(change, layers):
        found = [*linear_of_each(layers, x), gelu(layers[0], x)]
        want = [*(F.linear(x, m.weight, m.bias) for m in layers)]
        want = [changed(m, x, y) for m, y in zip(layers, want)]
    for a, b in zip(found, [*want, F.gelu(want[0], approximate="tanh")]):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_layers_of_one_input_have_one_product_to_their_low_ranks(monkeypatch):
    torch.manual_seed(2)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, n) for n in (8, 4, 6)).double()
    change, x = change_of(layers, rank=3), torch.randn(1, 4, 8, dtype=torch.float64)
    plain = [F.linear(x, m.weight, m.bias) for m in layers]
    shapes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: shapes.append(tuple(w.shape)) or linear(x, w, *b))
    with active(change, layers):
        found = changed_of_each(layers, x, [y.clone() for y in plain])
    assert shapes == [(3 * 8, 8)]  # each rank of 3 has 5 zeros
    for i, (y, before) in enumerate(zip(found, plain)):
        down, up = (part.double() for part in change.layers[str(i)])
        torch.testing.assert_close(y, before + x @ down.T @ up.T)
    few = LowRankChange({"1": change.layers["1"]})
    with active(few, layers):
        kept = changed_of_each(layers, x, [y.clone() for y in plain])
    assert torch.equal(kept[0], plain[0]) and torch.equal(kept[2], plain[2])
    torch.testing.assert_close(kept[1], found[1])


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_merged_weights_give_what_the_change_adds_in_one_product(bias):
    torch.manual_seed(2)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, n, bias=bias) for n in (8, 4, 6)).double()
    change, x, copies = change_of(layers), torch.randn(1, 4, 8, dtype=torch.float64), merged.MergedLinears()
    products, linear = [], F.linear
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)  # the change is in fp32

    def run():
        return [*linear_of_each(layers[:2], x), gelu(layers[2], x)]

    with active(change, layers):
        want = run()
        assert product_of(layers[2], x) is None  # it is added
        with merged.active(copies):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "linear", lambda *a: products.append(a) or linear(*a))
                found = run()
            weight, _ = product_of(layers[2], x)
    assert len(products) == 2  # of both layers with the same rows, and of the other
    for a, b in zip(found, want):
        close(a, b)
    down, up = (part.double() for part in change.layers["2"])
    close(weight, layers[2].weight + up @ down)
    assert copies.bytes == 8 * 18 * (8 + bias)
    with merged.active(copies):  # of no change
        assert torch.equal(run()[0], linear_of_each(layers[:2], x)[0]) and copies.bytes == 8 * 18 * (8 + bias)
    # as long as the weights lie where they were, and the change lives
    assert not copies.stale()
    layers[1].weight.data += 1
    assert copies.stale()
    copies.clear()
    with active(change, layers), merged.active(copies):
        close(run()[1], want[1] + x.sum(dim=2, keepdim=True))
        layers[0].weight = torch.nn.Parameter(layers[0].weight * 2)
        moved = run()[0]
    with active(change, layers):
        close(moved, run()[0])
    del change
    gc.collect()
    assert copies.bytes == 0


@torch.no_grad()
def test_a_weight_that_is_back_and_was_written_meanwhile_is_merged_again():
    torch.manual_seed(2)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 4)])
    own, x, copies = layers[0].weight, torch.randn(1, 4, 8), merged.MergedLinears()
    first, second = change_of(layers), change_of(layers)

    def run(change, copies):
        with active(change, layers), merged.active(copies):
            return linear_of_each(layers, x)[0].clone()

    run(first, copies), run(second, copies)
    layers[0].weight = torch.nn.Parameter(own * 2)
    run(first, copies)  # the second has a copy of `own` still
    own.mul_(3)
    layers[0].weight = own
    assert not copies.stale()
    for change in (first, second):
        torch.testing.assert_close(run(change, copies), run(change, None))


@torch.no_grad()
def test_a_deep_copy_is_changed_once():
    model, x = small(), torch.randn(3, 8).double()
    change = change_of(model)
    with active(change, model):
        expected = model(x)
    copied = copy.deepcopy(model)
    with active(change, copied):
        torch.testing.assert_close(copied(x), expected)
    detach(list(copied))
    assert [len(m._forward_hooks) for m in (*copied, *model)] == [0, 0, 0, 1, 0, 1]


def test_layers_that_are_more_than_a_weight_are_not_merged():
    torch.manual_seed(2)
    layer, x, copies = torch.nn.Linear(8, 4), torch.randn(1, 4, 8), merged.MergedLinears()
    model = torch.nn.Sequential(layer)
    change = change_of(model)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    with active(change, model), merged.active(copies):
        found = linear_of_each([layer], x)[0]
        torch.testing.assert_close(found, layer(x))
        assert copies.bytes == 0
        with torch.autocast("cpu", torch.bfloat16):
            linear_of_each([layer], x)
        assert copies.bytes == 0


def test_a_layer_that_is_put_in_later_is_changed_too():
    model = small()
    change = change_of(model)
    change.attach(model)
    assert [len(m._forward_hooks) for m in model] == [1, 0, 1]
    model[2] = torch.nn.Linear(16, 4).double()
    change.attach(model)
    assert [len(m._forward_hooks) for m in model] == [1, 0, 1]
    detach([model[0]])
    change.attach(model)
    assert [len(m._forward_hooks) for m in model] == [1, 0, 1]
    model[0].fused_projections = True
    with pytest.raises(ValueError, match="separate projections"):
        change.attach(model)


def test_another_thread_does_not_see_it():
    module, seen = small(), []
    with active(change_of(module), module):
        thread = threading.Thread(target=lambda: seen.append(active_serial()))
        thread.start()
        thread.join()
        assert active_serial() > 0
    assert seen == [0] and active_serial() == 0


def test_a_file_gives_back_what_was_saved(tmp_path):
    change = change_of(small())
    change.save(tmp_path / "x.safetensors")
    again = LowRankChange.load(tmp_path / "x.safetensors")
    assert again.layers.keys() == change.layers.keys() and again.serial != change.serial
    assert all(torch.equal(a, b) for n in change.layers for a, b in zip(change.layers[n], again.layers[n]))


@pytest.mark.parametrize(("name", "shape"), [("9", (16, 8)), ("0", (16, 9)), ("1", (4, 4))])
def test_layers_of_another_model_are_named(name, shape):
    change = LowRankChange({name: (torch.zeros(2, shape[1]), torch.zeros(shape[0], 2))})
    with pytest.raises(ValueError, match=f"expected a linear layer {name} of"):
        change.attach(small())


def edit(pipe, runner="eager"):
    text = dict(generator=torch.Generator().manual_seed(1), output_type="latent")
    config = FlashEditConfig(runner=runner, mask_ratio=0.5, ssca=False, region_noise="inverted")
    return pipe(**call_options(image=tiny_image(), specedit=config, **text)).images


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_a_lora_that_is_loaded_later_reaches_the_generator(runner):
    peft = pytest.importorskip("peft")
    pipe = FlashEditFluxKontextPipeline(**tiny_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    pipe._generator = pipe._inverter = change_of(pipe.transformer)
    before = edit(pipe, runner)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    after = edit(pipe, runner)
    assert after.isfinite().all() and not torch.allclose(before, after, atol=1e-3)
    # and the generator's change is still there under the adapter
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(edit(pipe, runner), before, atol=1e-5, rtol=1e-5)
    disable_specedit(pipe)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


class _InTheInputsDtype(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


class _Turned(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(0, 1).contiguous()).transpose(0, 1)


class _OneRowForAll(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x[:1]).expand(x.shape[0], -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [_InTheInputsDtype, _Turned, _OneRowForAll])
def test_outputs_that_nothing_can_be_added_to_in_place(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(kind(8, 6))
    change, x = LowRankChange({"0": (torch.randn(2, 8), torch.randn(6, 2))}), torch.randn(2, 3, 8)
    down, up = change.layers["0"]
    for autocast, tolerance in ((False, 1e-6), (True, 0.1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = model(x)
            with active(change, model):
                found = model(x)
        assert found.dtype == plain.dtype
        torch.testing.assert_close(found.float(), plain.float() + x @ down.T @ up.T, rtol=0, atol=tolerance)
