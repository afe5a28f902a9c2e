# SPDX-License-Identifier: Apache-2.0
"""One edit on several ranks: the picture of one process, the keys and values of own heads alone, clear errors."""

import functools
import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from ranks import CPU_ONLY, on_ranks, share_sequence
from tiny_models import (
    WIDTH,
    TinyVisionProcessor,
    call_options,
    paper,
    qwen_text,
    tiny_flux2,
    tiny_image,
    tiny_pipeline,
    tiny_qwen,
    tiny_vision_encoder,
)

from specedit_kernels import (
    FlashEditFluxKontextPipeline,
    SpecEditConfig,
    disable_guidance_parallelism,
    disable_specedit,
    enable_guidance_parallelism,
    enable_specedit,
)
from specedit_kernels.engine import fp8
from specedit_kernels.engine._diffusers import without_context_parallel
from specedit_kernels.engine.model import Text
from specedit_kernels.engine.parallel import Ranks, all_tokens, texts_of_each, to_heads, to_tokens
from specedit_kernels.engine.sequence import MixedSequence, all_heads, own_tokens
from specedit_kernels.engine.strips import Strips
from specedit_kernels.models.qwen_image_edit import FusedQwenModel, QwenImageEditModel

pytestmark = CPU_ONLY


def box(side=128, low=32, high=64):
    mask = torch.zeros(side, side)
    mask[low:high, low:high] = 1
    return mask


CACHED = dict(finish="locked", kv_refresh=9)
KINDS = {
    "full": {}, "cached": CACHED, "locked text": CACHED | dict(lock_text=True),
    "bracket": dict(finish="locked", kv_refresh="bracket"),
    "all that is kept": dict(
        stages=(3, 4, 0), finish="locked", kv_refresh="bracket", lock_text=True, coarse_refresh=2
    ),
    "fp8 cache": CACHED | dict(kv_cache_dtype="fp8"),
}  # fmt: skip


def flux(heads=2):
    pipe = tiny_pipeline()
    if heads != 2:
        config = dict(pipe.transformer.config) | dict(num_attention_heads=heads)
        torch.manual_seed(5)
        pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    return pipe, lambda: call_options(image=tiny_image(), height=128, width=128)


def qwen(text=12, guided=False, plus=False):
    pipe = tiny_qwen(plus, zero_cond_t=plus)

    def call():
        options = dict(qwen_text(text), image=tiny_image(), height=128, width=128, max_area=128 * 128)
        if guided:
            options |= dict(qwen_text(8, negative=True, seed=4), true_cfg_scale=3.0)
        return options | dict(output_type="latent")

    return pipe, call


def flux2(kind="dev"):
    pipe = tiny_flux2(kind)
    embeds = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(3))
    pictures = [tiny_image(), tiny_image(seed=1)]
    return pipe, lambda: dict(image=pictures, height=128, width=128, prompt_embeds=embeds, output_type="latent")


def edited(pipe, call, mask, seed=7, **options):
    """(latents, bytes of kept keys and values, selected tokens, runner)."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = pipe(specedit=paper(**options), mask_image=mask, generator=generator, **call())
    return found.images, found.stats.kv_cache_bytes, found.mask, found.stats.runner


def edits(make, kinds, size=None, masked=True, hooks=None, seed=7):
    """{(kind, runner): what `edited` gives}, on the ranks of the group where `size` is given."""
    pipe, call = make()
    if size:
        share_sequence(pipe.transformer, size, **hooks or {})
    enable_specedit(pipe)
    mask = box() if masked else None
    return {
        (kind, runner): edited(pipe, call, mask, seed, runner=runner, **KINDS[kind])
        for kind in kinds
        for runner in ("eager", "fused")
    }


def same(found, expected, tolerance=2e-5):
    for key, (images, _, mask, runner) in expected.items():
        assert found[key][3] == runner == key[1], key
        assert torch.equal(found[key][2], mask), key
        torch.testing.assert_close(found[key][0], images, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def test_the_parts_of_a_sequence():
    ranks = Ranks(None, 1, 4)
    assert ranks.split(10) == [len(x) for x in torch.arange(10).tensor_split(4)] == [3, 3, 2, 2]
    assert ranks.bounds(10) == (3, 6)


def _sequence(text, image, by_stream=False, ranks=None):
    tables = torch.zeros(1, text + image, 1)
    return MixedSequence(text, tables, tables, ranks=ranks, by_stream=by_stream)


@pytest.mark.parametrize("text, image", [(5, 9), (13, 2), (0, 7)])
@pytest.mark.parametrize("by_stream", [False, True])
def test_each_token_is_of_one_rank(text, image, by_stream):
    words, cells = torch.arange(text)[None], torch.arange(image)[None]
    sequences = [_sequence(text, image, by_stream, Ranks(None, rank, 4)) for rank in range(4)]
    parts = [(x.own_text(words), x.own_image(cells)) for x in sequences]
    assert torch.equal(torch.cat([x for x, _ in parts], 1), words)
    assert torch.equal(torch.cat([x for _, x in parts], 1), cells)
    for (a, b), sequence in zip(parts, sequences):
        assert (a.shape[1], b.shape[1]) == sequence.own
    counts = [a.shape[1] + b.shape[1] for a, b in parts]
    if not by_stream:  # the first ranks have the text, and all as many tokens
        assert max(counts) - min(counts) <= 1
    alone = _sequence(text, image)
    assert alone.own == (text, image) and alone.own_text(words) is words


def _there_and_back(by_stream):
    ranks, generator = Ranks.of(None), torch.Generator().manual_seed(0)
    for text, image in ((5, 4), (1, 7), (0, 5)):
        sequence = _sequence(text, image, by_stream, ranks)
        whole = [torch.randn(2, text + image, 4, 3, generator=generator) for _ in range(3)]
        streams = [
            [sequence.own_text(x[:, :text]) for x in whole],
            [sequence.own_image(x[:, text:]) for x in whole],
        ]
        found = all_heads(streams, sequence)
        for x, y in zip(found, whole):
            assert torch.equal(x, y.unflatten(2, (ranks.size, -1))[:, :, ranks.rank])
        own = torch.cat([x[0] for x in streams], dim=1).flatten(2)
        assert torch.equal(own_tokens(found[0], sequence), own)
        image_of_all = sequence.whole_image(streams[1][0].flatten(2))
        assert torch.equal(image_of_all, whole[0][:, text:].flatten(2))


@pytest.mark.parametrize("by_stream", [False, True])
def test_a_sequence_to_heads_and_back(tmp_path, by_stream):
    on_ranks(2, tmp_path, _there_and_back, by_stream)


def _exchanged(sizes, batch):
    ranks, heads, dim = Ranks.of(None), 4, 3
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(batch, sum(sizes), heads, dim, generator=generator).double() for _ in range(3)]
    first = sum(sizes[: ranks.rank])
    mine = [x[:, first : first + sizes[ranks.rank]] for x in whole]
    own = heads // ranks.size
    for streams in ([mine], [[x[:, :1] for x in mine], [x[:, 1:].float() for x in mine]]):
        found = to_heads([[x.float() for x in s] for s in streams], sizes, ranks)
        for x, y in zip(found, whole):
            assert torch.equal(x, y[:, :, ranks.rank * own : (ranks.rank + 1) * own].float())
    assert torch.equal(to_tokens(found[0], sizes, ranks), mine[0].float().flatten(2))
    assert torch.equal(all_tokens(mine[1][:, :, 0], sizes, ranks), whole[1][:, :, 0])


@pytest.mark.parametrize("sizes", [[3, 3], [4, 3]])
def test_tokens_to_heads_and_back(tmp_path, sizes):
    on_ranks(2, tmp_path, _exchanged, sizes, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, kinds",
    [
        pytest.param(flux, tuple(KINDS), marks=pytest.mark.proves("several GPUs", model="FLUX.1-Kontext")),
        pytest.param(flux2, ("cached",), marks=pytest.mark.proves("several GPUs", model="FLUX.2-dev")),
        pytest.param(
            functools.partial(flux2, "klein"),
            ("cached",),
            marks=pytest.mark.proves("several GPUs", model="FLUX.2-klein 4B, 9B (distilled, base)"),
        ),
        pytest.param(
            qwen, ("full", "cached", "locked text"), marks=pytest.mark.proves("several GPUs", model="Qwen-Image-Edit")
        ),
    ],
)
def test_two_ranks_give_the_picture_of_one(tmp_path, one_thread, make, kinds):
    expected = edits(make, kinds)
    for found in on_ranks(2, tmp_path, edits, make, kinds, 2):
        same(found, expected)
        for key, (_, kept, *_) in found.items():
            half = expected[key][1] // 2  # each has its heads' alone; a buffer of these tiny ones is rounded up
            assert half <= kept <= 1.1 * half, key


@pytest.mark.slow
def test_four_ranks_some_with_text_alone(tmp_path, one_thread):
    make = functools.partial(flux, heads=4)
    expected = edits(make, ("cached",))
    for found in on_ranks(4, tmp_path, edits, make, ("cached",), 4):
        same(found, expected)
        # slots are rounded up to as many for each rank
        assert all(1 <= 4 * found[key][1] / expected[key][1] < 1.1 for key in expected)


@pytest.mark.slow
@pytest.mark.proves("several GPUs", model="Qwen-Image-Edit-2509, -2511")
def test_lengths_that_ranks_do_not_divide(tmp_path, one_thread):
    make = functools.partial(qwen, text=13, plus=True)
    expected = edits(make, ("cached",))
    for found in on_ranks(2, tmp_path, edits, make, ("cached",), 2, True, dict(ulysses_anything=True)):
        same(found, expected)


def _in_fp8(make, size=None):
    """Edits whose products are in e4m3, and whose attention over kept keys and values is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "attends", lambda *_: fp8.is_active())
        pipe, call = make()
        if size:
            share_sequence(pipe.transformer, size)
        enable_specedit(pipe)
        options = dict(runner="fused", precision="fp8")
        return {kind: edited(pipe, call, box(), **KINDS[kind], **options) for kind in ("cached", "bracket")}


@pytest.mark.slow
@pytest.mark.parametrize("make", [flux, qwen])
def test_attention_in_fp8_on_two_ranks(tmp_path, one_thread, make):
    expected = _in_fp8(make)
    for found in on_ranks(2, tmp_path, _in_fp8, make, 2):
        for kind, (images, kept, *_) in expected.items():
            torch.testing.assert_close(found[kind][0], images, rtol=0, atol=1e-3, msg=lambda m, k=kind: f"{k}: {m}")
            assert 0 < found[kind][1] < 0.6 * kept, kind


def _native(config, size=None):
    pipe, _ = flux()
    if size:
        share_sequence(pipe.transformer, size, ulysses_anything=True)
    enable_specedit(pipe)
    source = np.random.default_rng(0).random((300, 420, 3), np.float32)
    options = call_options(image=source, region="0,0,40%,40%", output_size="source", detail="native", output_type="np")
    found = pipe(specedit=config, generator=torch.Generator().manual_seed(7), **options)
    assert found.stats.native[0].windows and found.stats.runner == "fused"
    return found.images[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", [paper(runner="fused"), SpecEditConfig(runner="fused")], ids=lambda c: c.quality)
def test_the_second_pass_on_two_ranks(tmp_path, one_thread, config):
    expected = _native(config)
    first, second = on_ranks(2, tmp_path, _native, config, 2)
    # The pass sees pictures of 8 bits, and its windows what those before them gave. A level that rounding turns is ten
    # times as much a few windows on, with random weights.
    off = np.abs(first - expected)
    assert np.quantile(off, 0.95) < 1e-4 and off.max() < 0.1 and off.mean() < 1e-3
    assert np.array_equal(first, second)


def _qualities(make, share=None):
    """{(quality, masked, runner): (pixels, mask, solver's steps, strips begun)} of steps of second order."""
    pipe, call = make()
    if share == "sequence":
        share_sequence(pipe.transformer, 2)
    enable_specedit(pipe)
    if share == "guidance":
        enable_guidance_parallelism(pipe)
    found, begun, begin = {}, [], Strips.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Strips, "begin", lambda *args: begun.append(1) or begin(*args))
        for quality in ("fast", "balanced"):
            for masked in (True, False):
                for runner in ("eager", "fused"):
                    config = SpecEditConfig(quality=quality, runner=runner)
                    assert config.resolved().solver == "ab2"
                    generator = torch.Generator().manual_seed(7)
                    options = call() | dict(output_type="np", generator=generator)
                    result = pipe(specedit=config, mask_image=box() if masked else None, **options)
                    assert result.stats.runner == runner
                    found[quality, masked, runner] = result.images, result.mask, len(begun)
                    begun.clear()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, share",
    [(flux, "sequence"), (functools.partial(qwen, guided=True), "guidance"),
     (functools.partial(qwen, guided=True), "sequence")],
)  # fmt: skip
def test_steps_of_second_order_and_regions_of_drafts(tmp_path, one_thread, make, share):
    expected = _qualities(make)
    first, second = on_ranks(2, tmp_path, _qualities, make, share)
    for key, (images, mask, whole) in expected.items():
        assert torch.equal(first[key][1], mask) and mask.any(), key
        np.testing.assert_allclose(first[key][0], images, rtol=0, atol=5e-5, err_msg=str(key))
        assert np.array_equal(first[key][0], second[key][0]), key
        assert whole == 0 and first[key][2] >= 2, key  # the source is encoded, the edit decoded, in strips


def _odd_text():
    pipe, call = qwen(text=13)
    share_sequence(pipe.transformer, 2)
    enable_specedit(pipe)
    with pytest.raises(ValueError, match="2 ranks do not divide 13 text and .* ulysses_anything=True"):
        edited(pipe, call, box())
    # the fused forward shares out the sequence itself
    with pytest.raises(ValueError, match="2 ranks do not divide 13 text"):
        edited(pipe, call, box(), runner="compile")  # which runs eagerly
    assert "is not compiled: expected 'graph' or 'fused'" in pipe._runner_reason
    return edited(pipe, call, box(), runner="fused")[3]


@pytest.mark.slow
def test_the_eager_forward_says_what_it_cannot_divide(tmp_path):
    assert on_ranks(2, tmp_path, _odd_text) == ["fused", "fused"]


def _drafted(make):
    torch.manual_seed(dist.get_rank())  # without a generator each rank would draw noise of its own
    return edits(make, ("full", "cached"), 2, masked=False, seed=None)


@pytest.mark.slow
def test_ranks_agree_on_noise_and_region(tmp_path, one_thread):
    first, second = on_ranks(2, tmp_path, _drafted, flux)
    for key, (images, _, mask, _) in first.items():
        assert torch.equal(images, second[key][0]) and torch.equal(mask, second[key][2]), key
        assert mask.any()
    assert len({tuple(images.flatten()[:3].tolist()) for images, *_ in first.values()}) > 1  # no seed is fixed


def _guided(sequence):
    pipe, call = qwen(guided=True)
    group = None
    if sequence:
        names = ("guidance", "ring", "ulysses")
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)
        group = mesh["guidance"].get_group()
        share_sequence(pipe.transformer, 2, mesh=mesh)
    enable_specedit(pipe)
    alone, steps = None, []
    if not sequence:
        alone = edited(pipe, call, box(), draft_guidance=False, **CACHED)
    enable_guidance_parallelism(pipe, group)
    found = {}
    for runner, kind in (("eager", QwenImageEditModel), ("fused", FusedQwenModel)):
        velocity = kind.velocity
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "velocity", lambda *args, of=velocity: steps.append(1) or of(*args))
            found[runner] = edited(pipe, call, box(), runner=runner, draft_guidance=False, **CACHED)
    disable_guidance_parallelism(pipe)
    assert pipe._specedit_guides is None
    return alone, found, len(steps)


@pytest.mark.slow
def test_guidance_on_two_ranks(tmp_path, one_thread):
    for alone, found, steps in on_ranks(2, tmp_path, _guided, False):
        for name, (images, _, _, runner) in found.items():
            torch.testing.assert_close(images, alone[0], rtol=0, atol=2e-5)
            assert runner == name
        assert steps == 2 * 9  # of each runner: a call a step, not two
        assert found["eager"][1] < alone[1]  # of one branch


@pytest.mark.slow
def test_guidance_and_sequence_on_four_ranks(tmp_path, one_thread):
    [(alone, *_), _] = on_ranks(2, _sub(tmp_path, "two"), _guided, False)
    for _, found, _ in on_ranks(4, _sub(tmp_path, "four"), _guided, True):
        for images, *_ in found.values():
            torch.testing.assert_close(images, alone[0], rtol=0, atol=2e-5)


@dataclass
class _Text(Text):
    layers: list[torch.Tensor]
    mask: torch.Tensor | None
    start: int


def _texts_exchanged():
    ranks = Ranks.of(None)
    made = [
        _Text(torch.arange(3.0)[None, :, None], [torch.ones(2)], None, 4),
        _Text(torch.arange(5).bfloat16().expand(2, 5)[..., None], [torch.zeros(1)] * 2, torch.eye(3) > 0, 5),
    ]
    for found, text in zip(texts_of_each(made[ranks.rank], torch.device("cpu"), ranks), made):
        assert type(found) is _Text and found.start == text.start
        for x, y in ((found.embeds, text.embeds), *zip(found.layers, text.layers, strict=True)):
            assert torch.equal(x, y) and x.dtype == y.dtype
        assert found.mask is text.mask or torch.equal(found.mask, text.mask)


def test_each_has_the_texts_of_both(tmp_path):
    on_ranks(2, tmp_path, _texts_exchanged)


def _prompted(share):
    pipe = tiny_qwen(text_encoder=tiny_vision_encoder(), processor=TinyVisionProcessor())
    enable_specedit(pipe)
    if share:
        enable_guidance_parallelism(pipe)
    read, forward = [], pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda *args, **kwargs: read.append(1) or forward(*args, **kwargs)
    options = dict(prompt="red fox", negative_prompt="a", true_cfg_scale=3.0, image=tiny_image(), max_area=128 * 128)
    images = edited(pipe, lambda: options | dict(output_type="latent"), box(), draft_guidance=False, **CACHED)[0]
    return images, len(read)


@pytest.mark.slow
def test_each_reads_the_prompt_of_its_branch(tmp_path, one_thread):
    expected, read = _prompted(False)
    assert read == 2
    for images, read in on_ranks(2, tmp_path, _prompted, True):
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
        assert read == 1


def _sub(folder, name):
    (folder / name).mkdir()
    return folder / name


def _unhooked():
    for make in (flux, qwen):
        pipe, _ = make()
        assert without_context_parallel(pipe.transformer) is pipe.transformer
        share_sequence(pipe.transformer, 2)
        before = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
        hooked = {name for name, own in before.items() if own.get("_diffusers_hook") is not None}
        assert hooked and len(hooked) < len(before) / 2
        twin = without_context_parallel(pipe.transformer)
        for name, module in twin.named_modules():
            own = pipe.transformer.get_submodule(name)
            holds = any(other == name or other.startswith(f"{name}.") or not name for other in hooked)
            assert (module is own) is not holds, name  # what holds no hook is not made anew
            if name in hooked:
                assert "_diffusers_hook" not in vars(module) and "forward" not in vars(module)
            assert vars(own) == before[name]  # the user's stay
        assert all(a is b for a, b in zip(twin.parameters(), pipe.transformer.parameters(), strict=True))


@pytest.mark.slow
def test_hooks_of_the_sequence_are_left_out_of_few_new_modules(tmp_path):
    on_ranks(2, tmp_path, _unhooked)


def _refused():
    pipe, _ = flux()
    share_sequence(pipe.transformer, 2)
    pipe.transformer._parallel_config.context_parallel_config.ring_degree = 2
    with pytest.raises(ValueError, match="transformer: expected ring_degree=1 .*, got 2"):
        enable_specedit(pipe)
    pipe.transformer._parallel_config.context_parallel_config.ring_degree = 1
    pipe.transformer.register_to_config(num_attention_heads=3)
    with pytest.raises(ValueError, match="transformer: expected a ulysses_degree that divides its 3 heads, got 2"):
        enable_specedit(pipe)
    pipe.transformer.register_to_config(num_attention_heads=2)
    flash = FlashEditFluxKontextPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="transformer: expected no context parallelism"):
        flash(**call_options(image=tiny_image()))
    with pytest.raises(TypeError, match="pipe: expected a pipeline with SpecEdit, got FlashEdit"):
        enable_guidance_parallelism(flash)
    enable_specedit(pipe)
    alone = dist.new_group([0]), dist.new_group([1])
    with pytest.raises(ValueError, match="group: expected 2 ranks, one for each branch of guidance, got 1"):
        enable_guidance_parallelism(pipe, alone[dist.get_rank()])
    # what is enabled beside is undone, the hooks of diffusers stay
    disable_specedit(pipe)
    assert pipe.transformer._parallel_config is not None


def test_what_is_refused(tmp_path):
    on_ranks(2, tmp_path, _refused)
    pipe, _ = flux()
    enable_specedit(pipe)
    with pytest.raises(RuntimeError, match="group: expected torch.distributed.init_process_group"):
        enable_guidance_parallelism(pipe)


def _loses_a_rank(runner, end):
    pipe, call = flux()
    share_sequence(pipe.transformer, 2)
    enable_specedit(pipe)

    def on_step(pipe, index, timestep, tensors):
        if dist.get_rank() == 1 and index == 3:
            os.kill(os.getpid(), end)
        return {}

    begun = time.monotonic()
    with pytest.raises(RuntimeError) as found:
        pipe(specedit=paper(runner=runner), mask_image=box(), callback_on_step_end=on_step, **call())
    return str(found.value), time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.parametrize(
    "runner, end", [("fused", signal.SIGKILL), ("eager", signal.SIGKILL), ("fused", signal.SIGSTOP)]
)
def test_a_rank_that_dies_or_hangs_ends_the_others(tmp_path, one_thread, runner, end):
    [(text, seconds), _] = on_ranks(2, tmp_path, _loses_a_rank, runner, end, seconds=4, dies=(1,))
    if runner == "fused":
        assert text.startswith("rank 0: another rank has ended, or did not answer in the time limit")
    assert "\n" not in text and seconds < 20
