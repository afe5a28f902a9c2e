# SPDX-License-Identifier: Apache-2.0
"""What a runner keeps and forgets, when steps stay eager, and on a GPU that a replayed step is what it stands for."""

import copy
import logging
import math

import pytest
import torch
from tiny_models import call_options, paper, tiny_image, tiny_pipeline

from specedit_kernels import SpecEditFluxKontextPipeline, disable_specedit, enable_specedit
from specedit_kernels.engine import pipeline, runner, stages
from specedit_kernels.engine.fused import FusedModel
from specedit_kernels.engine.runner import StepRunner, inspect

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.gpu


class Replayed:
    """Stands for a captured step where there is no GPU."""

    pool_bytes, input_bytes = 100, 10

    def __init__(self, function, inputs, pool, called=False):
        self.function, self.inputs = function, dict(inputs)

    def __call__(self, inputs):
        assert {k: x.shape for k, x in inputs.items() if x is not None} == {
            k: x.shape for k, x in self.inputs.items() if x is not None
        }
        return self.function(**inputs)


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr(runner, "CapturedStep", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def double(x):
    return 2 * x


def call(steps, size, tag="double", buffers=""):
    x = torch.randn(size)
    assert torch.equal(steps(tag, double, {"x": x}, buffers), 2 * x)


def test_a_tag_and_its_shapes_are_captured_once_and_the_longest_unused_goes(stubbed):
    steps = StepRunner("graph", graphs=2)
    for size in (3, 4, 3, 3):
        call(steps, size)
    assert steps.captures == 2
    call(steps, 5)  # 4 goes
    call(steps, 3)
    assert steps.captures == 3 and steps.graph_bytes == 3 * 100 + 2 * 10
    call(steps, 4)
    call(steps, 4, tag="other")
    assert steps.captures == 5
    steps.watch(["weights elsewhere"])
    assert steps.graph_bytes == 0
    call(steps, 4)
    assert steps.captures == 6


def test_buffers_have_the_memory_of_the_largest_need_and_never_move():
    steps, cpu = StepRunner("graph"), torch.device("cpu")
    floats = (5, (1, 100, 2, 4), torch.float32), (4, (1, 151, 2, 4), torch.float32), (5, (1, 151, 2, 4), torch.float32)
    shapes = *floats, (7, (2, 60, 2, 4), torch.half), (3, (1, 77, 3, 16), torch.float8_e4m3fn)

    def made(name="a"):
        return [steps.buffers(name, count, shape, dtype, cpu) for count, shape, dtype in shapes]

    first, held = made(), steps.buffer_bytes
    largest = max(count * (math.prod(shape) * dtype.itemsize + 255) // 256 * 256 for count, shape, dtype in shapes)
    longest = 256 * -(-151 * 8 * 4 // 256)
    assert largest <= held < largest + 2 * longest, "the end of a chunk holds no whole tensor"
    for found, again, (count, shape, dtype) in zip(first, made(), shapes):
        assert [x.data_ptr() for x in found] == [x.data_ptr() for x in again] and steps.buffer_bytes == held
        assert {(x.shape, x.dtype, x.is_contiguous(), x.data_ptr() % 16) for x in found} == {(shape, dtype, True, 0)}
        assert len(found) == count
        for i, x in enumerate(found):  # none lies over another of them
            x.copy_(torch.full(x.shape, i + 1.0))
        assert [x.float().unique().tolist() for x in found] == [[i + 1.0] for i in range(count)]
    others = made("b")
    assert steps.buffer_bytes == 2 * held
    assert not {x.data_ptr() for found in others for x in found} & {x.data_ptr() for found in first for x in found}
    steps.clear()
    assert steps.buffer_bytes == 0


def test_buffers_for_compiled_blocks_share_no_storage():
    steps, cpu = StepRunner("compile"), torch.device("cpu")
    for rows in (100, 60, 151, 100):
        found = steps.buffers("a", 6, (1, rows, 2, 4), torch.float32, cpu)
        assert len({x.untyped_storage().data_ptr() for x in found}) == len(found) == 6
        assert {x.shape for x in found} == {(1, rows, 2, 4)}
    held = steps.buffer_bytes
    steps.buffers("a", 6, (1, 140, 2, 4), torch.float32, cpu)
    assert steps.buffer_bytes == held


def test_graphs_stay_where_their_buffers_grow(stubbed):
    """Each stands for the place where its buffers lay: other rows are another graph."""
    steps, cpu = StepRunner("graph"), torch.device("cpu")

    def run(rows, value):
        [kept] = steps.buffers("a", 1, (1, rows, 2), torch.float32, cpu)
        other = steps.buffers("b", 1, (1, 3, 2), torch.float32, cpu)[0]

        def write(x):
            other.copy_(kept.fill_(0).add_(x)[:, :3])
            return x

        steps("write", write, {"x": torch.tensor(value)}, runner.BESIDE.join("ab"))
        return kept, other

    for rows, value, captures in ((10, 1.0, 1), (1000, 2.0, 2), (10, 3.0, 2), (1000, 4.0, 2), (200, 5.0, 3)):
        kept, other = run(rows, value)
        assert steps.captures == captures and (kept == value).all() and (other == value).all()


def test_a_deep_copy_keeps_nothing(stubbed):
    steps = StepRunner("graph", graphs=2)
    steps.buffers("a", 2, (1, 7, 2, 4), torch.float32, torch.device("cpu"))
    call(steps, 3)
    copied = copy.deepcopy(steps)
    assert (copied.name, copied.buffer_bytes, copied.graph_bytes, copied.captures) == ("graph", 0, 0, 0)
    for size in (3, 4, 5):
        call(copied, size)
    assert copied.graph_bytes == 3 * 100 + 2 * 10 and steps.captures == 1


def test_a_captured_picture_lies_as_the_given_one():
    """Convolutions go along with what they are given: a graph's own input that lay otherwise would give other bits."""
    picture = torch.zeros(2, 3, 4, 5)
    last = picture.contiguous(memory_format=torch.channels_last)
    assert runner._layout(picture) == runner._layout(picture[:, :1]) == torch.contiguous_format
    assert runner._layout(last) == torch.channels_last
    assert runner._layout(last[:, :, :2]) == runner._layout(last[0]) == torch.contiguous_format


def test_slots_come_by_a_sixteenth():
    model = FusedModel.__new__(FusedModel)
    for count in range(1, 5000):
        slots = model.slots(count)
        assert count <= slots < count + min(max(32, count / 8), 128) and slots % 32 == 0
    assert len({model.slots(count) for count in range(1, 1025)}) == 24 and model.slots(0) == 0


@pytest.fixture
def warnings(caplog):
    # the command line silences this logger for its process
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        yield caplog


def test_a_failed_capture_goes_on_uncaptured(stubbed, monkeypatch, warnings):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    steps = StepRunner("graph")
    call(steps, 2)
    monkeypatch.setattr(runner, "CapturedStep", fail)
    call(steps, 3)
    call(steps, 4)
    assert warnings.messages == ["runner='graph': steps go on uncaptured: capturing failed: out of memory"]
    assert steps.graph_bytes == 0 and steps.captures == 1 and (steps.name, steps.mode) == ("graph", "fused")


def mask(columns):
    found = torch.zeros(128, 128)
    found[:, : 16 * columns] = 1
    return found


def near(a, b):
    return (a - b).norm() < 0.02 * b.norm()


def edit(pipe, name, columns=2, seed=0, **options):
    config = paper(**{**dict(stages=(1, 4, 0), finish="locked", kv_refresh=4), **options}, runner=name)
    generator, output = torch.Generator().manual_seed(seed), "latent" if config.preserve is None else "pt"
    return pipe(image=tiny_image(seed=seed), mask_image=mask(columns), generator=generator, specedit=config,
                **call_options(output_type=output))  # fmt: skip


@pytest.mark.slow
def test_one_capture_serves_other_masks_and_pictures(stubbed, monkeypatch):
    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", []))
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    first = edit(pipe, "graph", 5)
    # encode twice (the picture, and at half its size), coarse, mixed, active; no decode of latents
    assert first.stats.captures == 5 and first.stats.graph_bytes == 5 * 110 and first.stats.kv_cache_bytes > 0
    other = edit(pipe, "graph", 6, seed=1)
    assert other.stats.captures == 0
    plain = SpecEditFluxKontextPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(other.images, edit(plain, "fused", 6, seed=1).images)
    assert torch.equal(first.images, edit(pipe, "graph", 5).images)


@pytest.mark.slow
def test_what_a_runner_has_ruled_out_is_not_looked_for(stubbed, monkeypatch):
    """Passes over all modules that cost more than a launch: weights are brought together where they lie elsewhere than
    at the last call, and no module is asked for hooks again."""
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    expected, lie, arranged = edit(pipe, "fused").images, ["here"], []

    def fail(*arguments):
        raise AssertionError("all modules are walked")

    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", list(lie)))
    monkeypatch.setattr(SpecEditFluxKontextPipeline, "_arrange", lambda pipe: bool(arranged.append(lie[0])))
    monkeypatch.setattr(SpecEditFluxKontextPipeline, "_execution_device", property(fail))
    monkeypatch.setattr(SpecEditFluxKontextPipeline, "maybe_free_model_hooks", fail)
    for lie[0] in ("here", "here", "there", "there", "here"):
        assert torch.equal(edit(pipe, "graph").images, expected)
    assert arranged == ["here", "there", "here"]


@pytest.mark.parametrize("hooked", [None, "transformer_blocks.0", "vae"])
def test_steps_stay_eager_where_the_runner_cannot_run_them(warnings, hooked):
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    module = None
    if hooked:
        module = pipe.vae if hooked == "vae" else pipe.transformer.get_submodule(hooked)
        module.register_forward_pre_hook(lambda *arguments: None)
    name = "fused" if hooked else "graph"
    expected = edit(pipe, "eager")
    warnings.clear()
    for _ in range(2):
        out = edit(pipe, name)
        assert out.stats.runner == "eager" and torch.equal(out.images, expected.images)
    reason = f"a {type(module).__name__} has hooks (offloading, caches), which it would leave out"
    reason = reason if hooked else "it needs one CUDA device, the weights are on cpu"
    assert warnings.messages == [f"runner={name!r}: steps run eagerly: {reason}"]


@pytest.mark.slow
def test_a_refused_runner_becomes_what_auto_takes(warnings, monkeypatch):
    """Quantised weights on a GPU, seen from a CPU: without graphs steps are fused ones, by one runner for all calls."""

    class Packed(torch.nn.Parameter):
        pass

    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    expected = edit(pipe, "fused")
    monkeypatch.setattr(pipeline, "inspect_weights", lambda name, *_: ("" if name == "fused" else "it cannot", []))
    monkeypatch.setattr(pipeline, "execution_device", lambda pipe: torch.device("cuda"))
    pipe.transformer.proj_out.weight = Packed(pipe.transformer.proj_out.weight.data)
    kept = pipe._specedit_runner
    warnings.clear()
    for name in ("graph", "auto", "compile", "graph", "fused"):
        out = edit(pipe, name)
        assert out.stats.runner == "fused" and out.stats.runner_reason == ("" if name == "fused" else "it cannot")
        assert torch.equal(out.images, expected.images) and pipe._specedit_runner is kept
    assert warnings.messages == [
        f"runner={name!r}: steps run with runner='fused': it cannot" for name in ("graph", "compile")
    ]


@torch.no_grad()
def test_the_signature_changes_with_weights_and_adapters():
    pipe = tiny_pipeline()
    layer = pipe.transformer.proj_out

    def now():
        return inspect("graph", pipe.transformer, pipe.vae)[1]

    seen = [now()]
    layer.weight.mul_(2.0)  # in place: a graph reads it
    assert now() == seen[0]
    layer.weight.data = layer.weight.data.clone()
    seen.append(now())
    layer.scaling, layer.merged = {"style": 1.0}, False
    seen.append(now())
    layer.scaling["style"] = 0.5
    seen.append(now())
    layer.merged = True
    seen.append(now())
    pipe.transformer.fuse_qkv_projections()
    seen.append(now())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_disabling_frees_the_runner(stubbed, monkeypatch):
    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", []))
    pipe = tiny_pipeline()
    enable_specedit(pipe)
    edit(pipe, "graph")
    assert pipe._specedit_runner.graph_bytes
    disable_specedit(pipe)
    assert "_specedit_runner" not in pipe.__dict__


# on a GPU


@pytest.fixture(scope="module")
def cuda_pipe():
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline()).to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@needs_gpu
@pytest.mark.parametrize(
    "options", [dict(), dict(finish="full", stages=(1, 2, 2), kv_refresh=1), dict(preserve="pixels")], ids=str
)
def test_replayed_steps_are_the_steps(cuda_pipe, options):
    def run(name, columns):
        return edit(cuda_pipe, name, columns, columns, **options)

    expected = {columns: run("fused", columns) for columns in (2, 6)}
    first = {}
    for columns in (2, 6, 2):
        out = run("graph", columns)
        assert out.stats.runner == "graph" and torch.equal(out.images, expected[columns].images)
        assert torch.equal(out.images, first.setdefault(columns, out.images))
    assert out.stats.captures == 0 and out.stats.graph_bytes > 0
    assert near(expected[2].images, edit(cuda_pipe, "eager", 2, 2, **options).images)


@pytest.mark.slow
@needs_gpu
def test_compiled_steps_are_near_the_eager_ones(cuda_pipe):
    out = edit(cuda_pipe, "compile")
    assert out.stats.runner == "compile" and out.stats.captures
    assert near(out.images, edit(cuda_pipe, "eager").images)


@needs_gpu
def test_graphs_are_bounded_on_the_device():
    steps = StepRunner("graph", graphs=2)
    for size in (8, 16, 8, 32, 8, 16):
        x = torch.randn(size, device="cuda")
        assert torch.equal(steps("double", double, {"x": x}), 2 * x)
    assert steps.captures == 4 and len(steps._graphs) == 2
    # moved or replaced weights free all of them
    steps.watch(["other"])
    assert not steps._graphs and steps.graph_bytes == 0


@needs_gpu
def test_a_failed_capture_leaves_torch_as_it_was():
    """Random numbers, other captures and the allocator go on working; the reason is kept."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    device, before = torch.device("cuda", torch.cuda.current_device()), torch.cuda.memory_reserved()
    steps = StepRunner("graph")
    big = torch.ones(1 << 20, device=device)

    def waits(x):
        return torch.rand_like(x.repeat(64)) * (x + 1).sum().item()

    assert steps("waits", waits, {"x": big}).shape == (64 << 20,)
    assert steps.mode == "fused" and steps.failure.startswith("capturing failed: ") and "\n" not in steps.failure
    generator = torch.Generator(device).manual_seed(0)
    first = torch.randn(8, device=device)
    assert (
        not torch.equal(first, torch.randn(8, device=device)) and torch.randn(8, device=device, generator=generator)[0]
    )
    other = StepRunner("graph")
    for _ in range(2):
        assert torch.equal(other("double", double, {"x": big}), 2 * big)
    assert other.captures == 1
    del steps, other, big
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # one of the allocator's blocks of 20 MiB stays; the pool would be 560
    assert torch.cuda.memory_reserved() <= before + (32 << 20)


@needs_gpu
def test_moved_weights_are_captured_anew():
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline(seed=3)).to("cuda", torch.bfloat16)
    edit(pipe, "graph")
    before = edit(pipe, "graph")
    assert before.stats.captures == 0
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.data = weight.data * 0.5
    changed = edit(pipe, "graph")
    assert changed.stats.captures > 0
    assert near(changed.images, edit(pipe, "fused").images) and not near(changed.images, before.images)


@needs_gpu
@pytest.mark.parametrize("name", ["eager", "fused", "graph"])
def test_nothing_after_select_waits_for_the_device(cuda_pipe, monkeypatch, name):
    options = dict(finish="full", stages=(2, 3, 2), kv_refresh=2)
    edit(cuda_pipe, name, **options)  # kernels are compiled and steps captured on first use, which synchronises
    select, run = stages.select, cuda_pipe._run

    def strict_from_here(*arguments):
        selection = select(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return selection

    def to_here(*arguments):
        try:
            return run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(stages, "select", strict_from_here)
    monkeypatch.setattr(cuda_pipe, "_run", to_here)
    assert edit(cuda_pipe, name, **options).stats.captures == 0
