# SPDX-License-Identifier: Apache-2.0
"""Features of every registered model that no file of its own has, and the page that says what was tested."""

import ast
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import support_matrix
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import model_proofs as proofs
import test_models_fibo as fibo
import test_models_qwen_image_21 as qwen21
from tiny_models import TINY, WIDTH, paper, qwen_text, tiny_image

from specedit_kernels import FlashEditConfig, SpecEditConfig, enable_specedit
from specedit_kernels.engine import registry
from specedit_kernels.engine.pipeline import stock_class
from specedit_kernels.flash_edit import flash_pipelines

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
# what SpecEdit itself serves
NAMES = [kind.__name__ for kind, ours in registry.pipelines().items() if ours.SEES_SOURCE]
# files of their own prove their guidance and references; FlashEdit refuses them
APART = ("BriaFiboEditPipeline", "QwenImage21Pipeline")
SEVERAL = [name for name in NAMES if name in registry.model_of(name).several_pictures]
LOCKED = dict(stages=(1, 3, 0), finish="locked", kv_refresh=3)


def tiny(name, patch, pictures=1):
    """(the SpecEdit pipeline of a class with random weights, the arguments of a call of it)."""
    if name == "BriaFiboEditPipeline":
        pipe, call = fibo.tiny_fibo(), fibo.options(guided=False, pictures=pictures)
    elif name == "QwenImage21Pipeline":
        qwen21.without_encoder(patch)
        pipe, call = qwen21.tiny_qwen21(), qwen21.options(pictures=pictures)
    else:
        pipe, made = TINY[name](patch)
        call = made()
        several = [tiny_image(), tiny_image(96, 160, seed=1)][:pictures]
        call["image"] = several if name in SEVERAL else tiny_image()
    enable_specedit(pipe)
    return pipe, {**call, "output_type": "latent"}


def edit(pipe, call, columns=3, **config):
    """An edit of that many of eight columns, on the pipeline's device."""

    def moved(x):
        if not torch.is_tensor(x):
            return x
        return x.to(pipe.device, pipe.dtype if x.is_floating_point() else x.dtype)

    call = {name: moved(value) for name, value in call.items()}
    return pipe(generator=proofs.seeded(), mask_image=proofs.mask(columns), specedit=paper(**config), **call)


def away(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# what is refused


@pytest.mark.proves("several references", refused="the stock call has one")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEVERAL])
def test_models_of_one_picture(name, monkeypatch):
    """A list is a batch, a picture for each prompt, or an error that says so; a second picture is no reference."""
    pipe, call = tiny(name, monkeypatch)
    call["image"] = [tiny_image(), tiny_image(seed=1)]
    with pytest.raises(ValueError, match="one picture|as many pictures as prompts|as prompts"):
        edit(pipe, call, runner="eager", **LOCKED)


@pytest.mark.proves("true guidance", refused="distilled", model="FLUX.2-dev")
def test_a_distilled_model_has_no_second_branch(monkeypatch):
    pipe, _ = tiny("Flux2Pipeline", monkeypatch)
    assert pipe.TRUE_CFG == ""
    assert not [name for name in inspect.signature(type(pipe).__call__).parameters if name.startswith("negative")]


# what is there


def guided(name):
    """Further arguments of a call with a second branch."""
    if name == "FluxKontextPipeline":
        return dict(negative_prompt="red", true_cfg_scale=3.0)
    if name.startswith("QwenImageEdit"):
        return dict(qwen_text(7, negative=True, seed=4), true_cfg_scale=3.0)
    return dict(guidance_scale=3.0)


@pytest.mark.proves("true guidance")
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("Flux2Pipeline", *APART)])
def test_true_guidance_is_the_stock_pipelines(name, monkeypatch):
    pipe, call = tiny(name, monkeypatch)
    everything = dict(columns=8, stages=(0, 0, 2), finish="full", kv_refresh=1)
    lone = edit(pipe, call, **everything).images
    call |= guided(name)
    found = edit(pipe, call, **everything).images
    expected = pipe(specedit=False, num_inference_steps=2, generator=proofs.seeded(), **call).images
    assert torch.equal(found, expected) and away(found, lone) > 1e-4


@pytest.mark.slow
@pytest.mark.proves("several references")
@pytest.mark.parametrize("name", [name for name in SEVERAL if name not in APART])
def test_several_references_are_the_stock_pipelines(name, monkeypatch):
    found = []
    for pictures in (1, 2):
        pipe, call = tiny(name, monkeypatch, pictures)
        whole = edit(pipe, call, 8, stages=(0, 0, 2), finish="full", kv_refresh=1).images
        expected = pipe(specedit=False, num_inference_steps=2, generator=proofs.seeded(), **call).images
        assert torch.equal(whole, expected)
        part = edit(pipe, call, **LOCKED).images
        assert part.isfinite().all()
        found.append((whole, part))
    assert all(away(two, one) > 1e-3 for one, two in zip(*found))


@pytest.mark.proves("fp8")
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_in_fp8_is_near_the_edit(name, monkeypatch):
    """In emulation on a CPU."""
    pipe, call = tiny(name, monkeypatch)
    plain = edit(pipe, call, runner="fused", **LOCKED)
    out = edit(pipe, call, runner="fused", precision="fp8", **LOCKED)
    assert (plain.stats.precision, out.stats.precision) == ("auto", "fp8") and out.stats.fp8_bytes > 0
    assert 0 < away(out.images, plain.images) < 0.1


@pytest.mark.proves("quantised")
@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_act(name, monkeypatch):
    """torchao's int8 weights: whole steps are the stock pipeline's, mixed ones are near those of the weights."""
    quantization = pytest.importorskip("torchao.quantization")
    pipe, call = tiny(name, monkeypatch)
    before = edit(pipe, call, runner="eager", **LOCKED).images
    quantization.quantize_(
        pipe.transformer, quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, place: isinstance(module, torch.nn.Linear) and "blocks" in place,
    )  # fmt: skip
    expected = pipe(specedit=False, num_inference_steps=2, generator=proofs.seeded(), **call).images
    whole = edit(pipe, call, 8, stages=(0, 0, 2), finish="full", kv_refresh=1).images
    assert torch.equal(whole, expected)
    for runner in ("eager", "fused"):
        out = edit(pipe, call, runner=runner, **LOCKED)
        assert out.stats.runner == runner, out.stats.runner_reason
        assert 1e-5 < away(out.images, before) < 0.05


@pytest.mark.proves("offload")
@pytest.mark.parametrize("name", NAMES)
def test_an_offloaded_model_is_brought_in_for_every_call(name, monkeypatch):
    from test_conditions import offloaded

    pipe, call = tiny(name, monkeypatch)
    expected = edit(pipe, call, runner="eager", **LOCKED).images
    offloaded(pipe)
    for _ in range(2):
        out = edit(pipe, call, runner="eager", **LOCKED)
        assert out.images.isfinite().all() and away(out.images, expected) < 1e-6


def flash(name, patch):
    """(a FlashEdit pipeline, the arguments of a call with the source's text)."""
    pipe, call = tiny(name, patch)
    made = flash_pipelines()[registry.pipelines()[stock_class(type(pipe))]]
    extra = {"is_distilled": False} if name == "Flux2KleinPipeline" else {}
    ours = made(**pipe.components, **extra)
    ours.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(9)
    if name.startswith("QwenImageEdit"):
        call |= qwen_text(9, negative=True, seed=4)
    elif name in ("Flux2KleinPipeline", "LongCatImageEditPipeline"):
        call |= dict(negative_prompt_embeds=torch.randn(1, 9, WIDTH, generator=random))
    call.pop("guidance_scale", None)
    return pipe, ours, call


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(n, marks=pytest.mark.proves("FlashEdit")) for n in NAMES if n not in (*APART, "Flux2Pipeline")
])  # fmt: skip
def test_flash_edits_of_everything_are_a_plain_step(name, monkeypatch):
    """With all selected the edit is one step of the model; of a part it computes that part over the source branch."""
    pipe, ours, call = flash(name, monkeypatch)

    def run(columns, **options):
        # the draft adds nothing to the mask, and watches the text
        config = FlashEditConfig(mask_ratio=1e6, **options)
        return ours(generator=proofs.seeded(), mask_image=proofs.mask(columns), mask_mode="add", specedit=config,
                    **call)  # fmt: skip

    whole = {k: v for k, v in call.items() if not k.startswith("negative")}
    if ours.TRUE_CFG:
        whole[ours.TRUE_CFG] = 1.0
    config = SpecEditConfig(quality="paper", stages=(0, 0, 1), runner="eager")
    expected = pipe(generator=proofs.seeded(), mask_image=proofs.mask(8), specedit=config, **whole).images
    assert away(run(8).images, expected) < 1e-4
    part = run(4)
    assert [step.stage for step in part.stats.steps] == ["draft", "source", "edit"]
    assert part.images.isfinite().all() and away(part.images, expected) > 1e-3
    fused = run(4, runner="fused")
    assert fused.stats.runner == ("eager" if name.startswith("QwenImageEdit") else "fused")
    assert away(fused.images, part.images) < 1e-3


@pytest.mark.parametrize("name, said", [
    pytest.param(name, said, marks=pytest.mark.proves("FlashEdit", refused=said)) for name, said in (
        ("BriaFiboEditPipeline", "its stages know tokens of 2 x 2 latent pixels alone"),
        ("QwenImage21Pipeline", "the image's attention to the text is not recorded"),
    )
])  # fmt: skip
def test_models_without_flash_edit_say_so(name, said, monkeypatch):
    _, ours, call = flash(name, monkeypatch)
    with pytest.raises(TypeError, match=f"specedit: FlashEdit does not serve {name}"):
        ours(generator=proofs.seeded(), mask_image=proofs.mask(4), specedit=FlashEditConfig(), **call)


@pytest.mark.parametrize("name", ["LongCatImageEditPipeline", *APART])
@pytest.mark.proves("several GPUs", refused="its sequence is not shared; guidance branches and folders are")
def test_models_whose_sequence_is_not_shared_say_so(name, monkeypatch):
    pipe, call = tiny(name, monkeypatch)
    monkeypatch.setattr(pipe.transformer, "_parallel_config", SimpleNamespace(context_parallel_config=object()))
    with pytest.raises(ValueError, match="transformer: expected no context parallelism"):
        edit(pipe, call)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "runner", [pytest.param("graph", marks=pytest.mark.proves("graph")),
               pytest.param("compile", marks=[pytest.mark.proves("compile"), pytest.mark.slow])],
)  # fmt: skip
def test_captured_edits_are_the_eager_ones(name, runner, monkeypatch):
    pipe, call = tiny(name, monkeypatch)
    pipe.to("cuda", torch.bfloat16)
    if name == "LongCatImageEditPipeline":  # what stands for its encoder
        text = type(pipe)._encode_prompt
        monkeypatch.setattr(type(pipe), "_encode_prompt", lambda *given: text(*given).to("cuda", torch.bfloat16))
    eager = edit(pipe, call, runner="eager", **LOCKED).images
    for _ in range(2):
        out = edit(pipe, call, runner=runner, **LOCKED)
        assert out.stats.runner == runner, out.stats.runner_reason
        assert away(out.images, eager) < 0.03
    assert out.stats.captures == 0


# the page


def test_the_page_is_what_the_outcomes_give():
    runs = support_matrix.runs_on_disk()
    assert "cpu" in runs
    page = support_matrix.PAGE.read_text(encoding="utf-8")
    assert support_matrix.page_with(support_matrix.table(runs), page) == page


def marked(source):
    """Names of a file's functions that are marked, or one of whose parameters is."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
            if "mark.proves(" in decorators:
                found.add(node.name)
    return found


@pytest.mark.slow
def test_every_cell_stands_on_a_test_that_is_there():
    seen = 0
    for where, run in support_matrix.runs_on_disk().items():
        for row, cells in run["models"].items():
            for feature, cell in cells.items():
                assert cell["tests"] and not cell["failed"], f"{where}: {row}, {feature}"
                for test in cell["tests"]:
                    file, _, name = test.partition("::")
                    assert name in marked((ROOT / "tests" / file).read_text(encoding="utf-8")), test
                    seen += 1
    assert seen > 30


def test_each_registered_pipeline_has_a_row_and_no_name_means_two():
    registered = {kind.__name__ for kind in registry.pipelines()}
    assert registered == {pipeline for pipeline, _ in support_matrix.MODELS.values()}
    names = [name for _, names in support_matrix.MODELS.values() for name in names]
    assert len(names) == len(set(names)) and support_matrix.meant("FluxKontextPipeline") == "FLUX.1-Kontext"
    assert support_matrix.meant("none") is None and support_matrix.meant(3) is None


def test_what_a_mark_means():
    of = support_matrix.proofs_of
    assert of([(("eager", "batch"), {})], ["x", "dev", 3]) == [
        {"model": "FLUX.2-dev", "feature": "eager", "refused": None},
        {"model": "FLUX.2-dev", "feature": "batch", "refused": None},
    ]
    assert of([(("fp8",), {"model": "FIBO-Edit", "refused": "why"})], ["dev"])[0]["model"] == "FIBO-Edit"
    for args, options, values in ((("eagre",), {}, ["dev"]), (("eager",), {}, ["x"]), (("eager",), {"model": "x"}, [])):
        with pytest.raises(ValueError, match="expected"):
            of([(args, options)], values)


def test_a_table_of_outcomes():
    def outcome(model, feature, outcome, refused=None):
        return dict(model=model, feature=feature, outcome=outcome, refused=refused, test="test_a.py::test_b")

    run = support_matrix.collected([
        outcome("FIBO-Edit", "eager", "passed"), outcome("FIBO-Edit", "eager", "passed"),
        outcome("FIBO-Edit", "batch", "passed"), outcome("FIBO-Edit", "batch", "failed"),
        outcome("FIBO-Edit", "fused", "passed", "why"), outcome("FIBO-Edit", "LoRA", "skipped"),
    ])  # fmt: skip
    assert run["FIBO-Edit"]["eager"] == {"passed": 2, "failed": 0, "refused": None, "tests": ["test_a.py::test_b"]}
    gpu = support_matrix.collected([outcome("FIBO-Edit", x, "passed") for x in ("eager", "graph")])
    facts = dict(device="d", command="c", versions={"torch": "2"}, commit="x", date="y")
    text = support_matrix.table({"cpu": {"models": run, **facts}, "gpu": {"models": gpu, **facts}})
    row = next(line for line in text.splitlines() if line.startswith("| FIBO-Edit"))
    cells = dict(zip(support_matrix.FEATURES, row.strip("| ").split(" | ")[2:]))
    assert cells["eager"] == "tested, on a GPU too" and cells["graph"] == "tested on a GPU"
    assert cells["batch"] == "**fails**" and cells["fused"] == "refused: why" and cells["LoRA"] == "untested"
    assert "* d: `c`; torch 2; commit x, y." in text


def test_outcomes_are_written_where_the_option_says(tmp_path):
    from types import SimpleNamespace

    from conftest import Matrix

    path = tmp_path / "matrix.json"
    matrix = Matrix(SimpleNamespace(getoption=lambda name: str(path), option=SimpleNamespace(markexpr="proves")))
    proof = ("proves", {"model": "FIBO-Edit", "feature": "batch", "refused": None})

    def report(when, outcome, properties, node="tests/test_a.py::test_b[x]"):
        made = SimpleNamespace(when=when, outcome=outcome, user_properties=properties, nodeid=node)
        matrix.pytest_runtest_logreport(made)

    report("setup", "passed", [proof])
    report("call", "passed", [proof, ("other", 1)])
    report("teardown", "passed", [proof])
    report("call", "passed", [])
    report("setup", "skipped", [proof], "tests/test_a.py::test_skipped")
    report("setup", "failed", [("proves", {**proof[1], "feature": "eager"})], "tests/test_a.py::test_c")
    matrix.pytest_sessionfinish()
    found = json.loads(path.read_text())
    assert found["command"] == "python -m pytest tests -m 'proves'" and found["versions"]["torch"]
    assert found["models"] == {"FIBO-Edit": {
        "eager": {"passed": 0, "failed": 1, "refused": None, "tests": ["test_a.py::test_c"]},
        "batch": {"passed": 1, "failed": 0, "refused": None, "tests": ["test_a.py::test_b"]},
    }}  # fmt: skip
