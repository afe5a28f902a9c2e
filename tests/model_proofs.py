# SPDX-License-Identifier: Apache-2.0
"""What every model file is held to, on a tiny pipeline with random weights: for each registered model
(test_registered_models.py), and in the files of single models.

Of a pair of pipelines: `plain`, the stock one, and `ours`, SpecEdit on the same components; options: of a call, 128 x
128 pixels and output_type="latent". Of one `run`, the engine's, caught from a call by `run_of`.
"""

import numpy as np
import PIL.Image
import torch
from tiny_models import paper

from specedit_kernels import ops
from specedit_kernels.engine import registry, stages
from specedit_kernels.engine.attention import wrap_processors
from specedit_kernels.engine.model import Pictures
from specedit_kernels.engine.runner import StepRunner
from specedit_kernels.sampling.grid import coarse_grid, pack
from specedit_kernels.sampling.layout import build_layout

EVERYTHING = dict(stages=(0, 2, 2), draft="quarter", draft_steps=1, threshold=-1.0)
# the finishes, with and without kept keys
KINDS = (
    dict(finish="full", kv_refresh=1),
    dict(finish="locked", kv_refresh=1),
    dict(finish="locked", kv_refresh=9),
    dict(finish="locked", kv_refresh=9, lock_text=True),
    dict(finish="locked", kv_refresh="bracket"),
)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def enabled(plain, **options):
    """SpecEdit on a stock pipeline's components. options: what its class takes beside them."""
    ours = registry.pipelines()[type(plain)](**plain.components, **options)
    ours.set_progress_bar_config(disable=True)
    return ours


def mask(columns=4, rows=8, side=8):
    """White over that many of the 16-pixel tokens of a picture with `side` of them a side."""
    array = np.zeros((16 * side, 16 * side), np.uint8)
    array[: 16 * rows, : 16 * columns] = 255
    return array


def everything_is_the_plain_pipeline(plain, ours, steps=4, **options):
    expected = plain(num_inference_steps=steps, generator=seeded(), **options).images
    for draft in ("quarter", "full_step"):
        out = ours(generator=seeded(), specedit=paper(**{**EVERYTHING, "draft": draft}), **options)
        assert out.stats.fallback == "dense" and out.mask.all()
        assert torch.equal(out.images, expected), draft
    off = ours(specedit=False, num_inference_steps=steps, generator=seeded(), **options).images
    assert torch.equal(off, expected)
    # the test can fail: other noise is another picture
    assert not torch.equal(plain(num_inference_steps=steps, generator=seeded(2), **options).images, expected)


def nothing_is_the_source(ours, **options):
    """The edited picture has the output's own size."""
    image = options["image"][0] if isinstance(options["image"], list) else options["image"]
    options["output_type"] = "pil"
    for draft in ("coarse", "quarter", "full_step"):
        config = paper(draft=draft, draft_steps=1, threshold=4.0)
        out = ours(generator=seeded(), specedit=config, **options)
        assert (np.array(out.images[0]) == np.array(image)).all()
        assert out.stats.fallback == "source" and not out.mask.any()


def the_rest_is_the_sources(ours, **options):
    """At the source's own size, whatever the output's; further pictures are seen, not edited."""
    source = np.random.default_rng(0).integers(0, 256, (150, 210, 4), dtype=np.uint8)
    several = isinstance(options["image"], list)
    options["image"] = [PIL.Image.fromarray(source), *options["image"][1:]] if several else PIL.Image.fromarray(source)
    for finish in ("full", "locked"):
        config = paper(stages=(1, 2, 1), finish=finish)
        call = options | dict(output_type="np", output_size="source", region="0,0,40%,40%", specedit=config)
        out = ours(generator=seeded(), **call)
        found = out.images[0]
        assert len(out.images) == 1 and found.dtype == np.uint8 and found.shape == source.shape
        # whole blocks and the seam reach no further
        assert np.array_equal(found[115:], source[115:]) and np.array_equal(found[:, 160:], source[:, 160:])
        assert np.array_equal(found[..., 3], source[..., 3])
        assert not np.array_equal(found[:60, :84], source[:60, :84])


def batches_are_their_singles(ours, together, singles, masks):
    """together: options of one call; singles: those of each of its images alone. masks: one for each image."""
    seeds = [seeded(i) for i in range(len(singles))]
    for kind in KINDS:
        config = paper(stages=(1, 2, 1), **kind)
        got = ours(generator=[s.clone_state() for s in seeds], mask_image=np.stack(masks), specedit=config, **together)
        for i, options in enumerate(singles):
            alone = ours(generator=[seeds[i].clone_state()], mask_image=masks[i], specedit=config, **options)
            assert torch.allclose(got.images[i], alone.images[0], atol=1e-4), (kind, i)
        assert not torch.allclose(got.images[0], got.images[1], atol=1e-2)


def fused_is_eager(ours, atol=1e-4, **options):
    """Whole runs of every kind, and the runner said what it ran."""
    for kind in (*KINDS, dict(draft="quarter", draft_steps=1, threshold=-1.0)):
        found = {}
        for runner in ("eager", "fused"):
            config = paper(stages=(1, 2, 1), runner=runner, **kind)
            given = {} if "draft" in kind else {"mask_image": mask(3)}
            out = ours(generator=seeded(), specedit=config, **given, **options)
            assert out.stats.runner == runner
            found[runner] = out.images
        assert torch.allclose(found["eager"], found["fused"], atol=atol), kind


@torch.no_grad()
def mixed_is_dense(ours, text, grid, others=(), fused=True, guidance=None):
    """The velocity of a mixed sequence all of whose blocks are active is that of the whole pictures, token by token:
    positions, text and attention are the model's own. text: one sample's."""
    pictures = Pictures(grid, (grid, *others))
    count, blocks = grid[0] * grid[1], grid[0] * grid[1] // 4
    channels = ours.transformer.config.in_channels
    rows = [count, count, *(r * c for r, c in others)]
    target, condition, *behind = (torch.randn(1, n, channels, generator=seeded(i)) for i, n in enumerate(rows))
    empty = torch.full((1, blocks, channels), float("nan"))  # rows that nobody may read
    table = torch.cat([target, empty, condition, empty, *behind], dim=1)
    order = torch.randperm(blocks, generator=seeded(5))[None].int()
    layout = build_layout(order, torch.tensor([blocks]), grid, sum(rows), others=sum(rows[2:]))
    tokens = ops.gather_tokens(table, layout.index, sum(rows))
    wrap_processors(ours.transformer)
    expected = None
    for runner in (None, *(["fused"] if fused else [])):
        model = ours._model(None if runner is None else StepRunner(runner), guidance, {})
        [conditioning] = model.timestep_conditioning(text, torch.tensor([600.0]))
        if expected is None:
            whole = torch.cat([target, condition, *behind], dim=1)
            dense = model.dense_layout(text, pictures, (grid, grid, *others))
            expected = model.velocity(text, whole, conditioning, dense)
        for cached in (False, True):
            made = model.mixed_layout(text, pictures, layout, key_bias=True, cached=cached)
            got = model.velocity(text, tokens, conditioning, made)
            in_order = expected[:, layout.index[0, :count].long()]
            assert torch.allclose(got[:, :count], in_order, atol=1e-4), (runner, cached)


def lora(transformer, names=("attn.to_q", "attn.to_out.0"), rank=2, seed=7, scale=0.5):
    """A LoRA of the file format that diffusers' loaders read, of the layers whose names end so."""
    generator, state = seeded(seed), {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(tuple(names)):
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = scale * up
    assert state
    return state


def lora_is_applied(plain, ours, load, unload, fused=True, steps=4, **options):
    """load(pipeline), unload(pipeline): by the pipeline's own loader. Both pipelines have one transformer."""
    config = paper(stages=(1, 2, 1), finish="locked", kv_refresh=9)
    runners = ("eager", "fused") if fused else ("eager",)
    call = lambda **more: ours(generator=seeded(), **more, **options).images  # noqa: E731
    runs = lambda: [call(specedit=paper(stages=(1, 2, 1), finish="locked", kv_refresh=9, runner=r), mask_image=mask(3))  # noqa: E731
                    for r in runners]  # fmt: skip
    dense, mixed = call(specedit=paper(**EVERYTHING)), runs()
    load(ours)
    expected = plain(num_inference_steps=steps, generator=seeded(), **options).images
    assert torch.equal(call(specedit=paper(**EVERYTHING)), expected) and not torch.allclose(expected, dense, atol=1e-3)
    changed = runs()
    for before, after in zip(mixed, changed):
        assert not torch.allclose(before, after, atol=1e-3)
        assert torch.allclose(after, changed[0], atol=1e-4)
    unload(ours)
    assert torch.equal(call(specedit=config, mask_image=mask(3)), mixed[0])


# of a run


class Caught(Exception):
    pass


def run_of(pipe, **call):
    """The `Run` that the stages of this call would share."""
    caught = []

    def catch(run, *_):
        caught.append(run)
        raise Caught

    pipe._run = catch
    try:
        pipe(**call)
    except Caught:
        return caught[0]
    finally:
        del pipe._run
    raise AssertionError("expected a call that comes to its stages")


def selection_of(run, blocks):
    """The selection of the first so many blocks of each sample."""
    rows, columns = coarse_grid(run.grid)
    chosen = (torch.arange(rows * columns) < blocks).float().reshape(1, rows, columns)
    fine = chosen.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1).expand(run.batch, -1)
    return stages.select(run, fine.contiguous(), 0.5, 0)


def state_of(run, blocks, sigma=0.7):
    """(fine latents, the mixed sequence with so many active blocks), random at one sigma."""
    random = torch.Generator().manual_seed(11)
    fine = torch.randn(run.source.shape, generator=random).to(run.source.dtype)
    coarse = torch.randn(*fine.shape[:2], *(side // 2 for side in fine.shape[2:]), generator=random).to(fine.dtype)
    return fine, stages.expand(run, fine, coarse, sigma, selection_of(run, blocks))


@torch.no_grad()
def mixed_step_is_dense(run):
    """With all blocks active a mixed step is a dense one: position ids, text, timestep, references and guidance."""
    blocks = coarse_grid(run.grid)[0] * coarse_grid(run.grid)[1]
    fine, state = state_of(run, blocks)
    at = torch.tensor(700.0)
    mixed = run.velocity(state.tokens, at, state.layouts)
    grids = [run.grid, *(reference.grid for reference in run.references)]
    layouts = [run.model.dense_layout(text, run.pictures, grids) for text in run.texts]
    tokens = torch.cat([pack(x) for x in (fine, *(reference.latents for reference in run.references))], dim=1)
    dense = run.velocity(tokens, at, layouts)
    # the table of a mixed sequence has coarse rows after the fine ones, of the target and of the condition
    half = 5 * blocks
    row = state.layout.index[:, : tokens.shape[1]].long()
    row = torch.where(row < half, row, row - blocks)
    row = torch.where(row >= 2 * half - blocks, row - blocks, row)
    # clean tokens: a guidance that is a ratio may be 0 / 0 there
    n = state.layout.target_lengths[0]
    in_order = dense.gather(1, row[..., None].expand_as(dense))[:, :n]
    assert torch.allclose(mixed[:, :n], in_order, atol=1e-5) and in_order.std() > 1e-3


@torch.no_grad()
def kept_coarse_step_is_whole(run):
    """Coarse steps that keep keys and values are the plain ones, and so is one of the target alone over these where no
    token has moved."""
    random, at = torch.Generator().manual_seed(11), torch.tensor(700.0)
    grids = [coarse_grid(run.grid), *(tuple(-(-side // 2) for side in r.grid) for r in run.references)]
    counts, channels = [rows * columns for rows, columns in grids], pack(run.source, run.patch).shape[2]
    tokens = torch.randn(run.batch, sum(counts), channels, generator=random)
    layouts = [run.model.dense_layout(text, run.pictures, grids) for text in run.texts]
    plain = run.velocity(tokens, at, layouts, counts[0])
    layouts, alone, capacity, first, *_ = stages._kept_layouts(run, run.texts, grids, run.joined_branches)
    slots = torch.cat([tokens, tokens.new_zeros(run.batch, capacity - sum(counts), channels)], dim=1)
    whole = run.velocity(slots, at, layouts, counts[0])
    assert torch.allclose(whole, plain, atol=1e-4 * plain.abs().max()) and plain.std() > 1e-3
    again = run.velocity(slots[:, :first], at, alone, counts[0])
    assert torch.allclose(again, whole, atol=1e-5 * plain.abs().max())


@torch.no_grad()
def cached_step_is_whole(run):
    """A step over cached keys and values is the whole step where no token has moved. The run has kv_refresh > 1."""
    _, state = state_of(run, 5)
    at = torch.tensor(700.0)
    whole = run.velocity(state.tokens, at, state.layouts)[:, :20]
    active = run.velocity(state.tokens[:, : state.first], at, state.active_layouts)[:, :20]
    assert torch.allclose(active, whole, atol=1e-5) and whole.std() > 1e-3
    if state.locked_layouts:
        again = run.velocity(state.tokens, at, state.locked_layouts)[:, :20]
        assert torch.allclose(again, whole, atol=1e-5)


def graphs_replay_fused_steps(ours, **options):
    """On a CUDA device in bf16: "graph" has the bits of "fused", also after another size, and is near "eager"."""
    for kind in (*KINDS, dict(finish="locked", kv_refresh=9, kv_cache_dtype="fp8")):

        def call(runner, columns, kind=kind):
            config = paper(stages=(1, 2, 1), runner=runner, **kind)
            return ours(generator=seeded(), mask_image=mask(columns), specedit=config, **options)

        for columns in (3, 5, 3):
            expected, out = (call(runner, columns) for runner in ("fused", "graph"))
            eager = call("eager", columns).images
            assert out.stats.runner == "graph" and (expected.images - eager).norm() < 0.02 * eager.norm()
            found = call("graph", columns)
            assert torch.equal(found.images, expected.images) and found.stats.captures == 0
