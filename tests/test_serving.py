# SPDX-License-Identifier: Apache-2.0
"""hosts/vllm_omni and hosts/sglang on recorded interfaces (serving_standin.py), and on the real hosts where they are
installed: the pictures of our own pipeline, bit for bit."""

import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the hosts' pipelines need diffusers")

import serving_standin as host
from PIL import Image, ImageDraw
from tiny_models import qwen_text, small_qwen, tiny_image, tiny_qwen

import specedit_kernels
from specedit_kernels import SpecEditConfig, SpecEditQwenImageEditPlusPipeline
from specedit_kernels.hosts import _serving

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = Path(specedit_kernels.__file__).parent / "assets"
SIDE = 128

pytestmark = pytest.mark.usefixtures("one_thread")


def generator():
    return torch.Generator().manual_seed(0)


def same(pictures, expected):
    assert len(pictures) == len(expected)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pictures, expected))


def mask():
    picture = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(picture).rectangle((32, 32, 79, 95), fill=255)
    return picture


def forget(name):
    for found in [n for n in sys.modules if n.startswith(f"specedit_kernels.hosts.{name}")]:
        del sys.modules[found]


# options


def test_a_requests_options_go_before_the_servers(monkeypatch):
    monkeypatch.setenv(_serving.OPTIONS, '{"quality": "fast", "threshold": 0.3, "mask_mode": "add"}')
    config, call = _serving.options_of({"threshold": 0.5, "region": [0, 0, 8, 8], "stages": [2, 3, 0]})
    assert (config.quality, config.threshold, config.stages) == ("fast", 0.5, (2, 3, 0))
    assert call == {"mask_mode": "add", "region": [0, 0, 8, 8]}
    monkeypatch.delenv(_serving.OPTIONS)
    assert _serving.options_of(None) == (SpecEditConfig(), {})
    assert _serving.options_of('{"preset": 6}')[0].preset == 6


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"treshold": 1}, ValueError, r"specedit: unknown option 'treshold'; expected preserve, feather"),
        ("{", ValueError, r"specedit: expected a JSON object, got '\{'"),
        ("[1]", TypeError, r"specedit: expected an object with options, got list"),
        ({"quality": "good"}, ValueError, "quality: expected one of"),
        ({"region": [1, 2]}, ValueError, "region: expected"),
    ],
)
def test_wrong_options_are_named(given, error, message):
    with pytest.raises(error, match=message):
        _serving.options_of(given)


def test_wrong_options_of_the_server_are_named(monkeypatch):
    monkeypatch.setenv(_serving.OPTIONS, '{"steps": 3}')
    with pytest.raises(ValueError, match="SPECEDIT_OPTIONS: unknown option 'steps'"):
        _serving.options_of({})


# vLLM-Omni


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The shipped tiny editor under the name of a Qwen-Image-Edit-Plus."""
    if not ASSETS.is_dir():
        pytest.skip("the tiny editors are in a clone alone")
    folder = tmp_path_factory.mktemp("serving") / "tiny-plus"
    shutil.copytree(ASSETS / "tiny_qwen_image_edit", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "QwenImageEditPlusPipeline"}))
    return folder


@pytest.fixture(scope="module")
def editor(checkpoint):
    pipe = SpecEditQwenImageEditPlusPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def omni(monkeypatch):
    """hosts.vllm_omni.pipeline on the recorded interface, its pictures 128 x 128 pixels."""
    host.install_vllm_omni(monkeypatch)
    small_qwen(monkeypatch)
    yield importlib.import_module("specedit_kernels.hosts.vllm_omni.pipeline")
    forget("vllm_omni")


def picture():
    return Image.open(ASSETS / "example.png").convert("RGB").resize((SIDE, SIDE))


def prompt(**data):
    return {"prompt": "color the turtle purple", "multi_modal_data": {"image": [picture()], **data}}


def test_the_plugin_does_nothing_unless_it_is_asked_for(monkeypatch):
    registered = host.install_vllm_omni(monkeypatch)
    from specedit_kernels.hosts import vllm_omni

    for value in (None, "", "0"):
        monkeypatch.delenv(vllm_omni.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(vllm_omni.VARIABLE, value)
        vllm_omni.register()
    assert registered == []
    monkeypatch.setenv(vllm_omni.VARIABLE, "yes")
    with pytest.raises(ValueError, match="SPECEDIT_VLLM_OMNI: expected '0' or '1', got 'yes'"):
        vllm_omni.register()
    forget("vllm_omni")


def test_the_plugin_registers_what_the_module_has(monkeypatch, omni):
    registered = host.install_vllm_omni(monkeypatch)
    from specedit_kernels.hosts import vllm_omni

    monkeypatch.setenv(vllm_omni.VARIABLE, "1")
    vllm_omni.register()
    [((architecture, module, kind), functions)] = registered
    assert architecture == "QwenImageEditPlusPipeline"
    found = importlib.import_module(module)
    assert getattr(found, kind) is omni.SpecEditOmniPipeline
    assert all(callable(getattr(found, name)) for name in functions.values())
    assert set(functions) == {"pre_process_func_name", "post_process_func_name"}


def test_the_plugin_is_an_entry_point():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."vllm.general_plugins"]\nspecedit = "specedit_kernels.hosts.vllm_omni:register"' in text
    )


@pytest.mark.slow
def test_without_vllm_the_plugin_can_be_called():
    """In a process of its own: it is called in each of vLLM's, and may import nothing there that takes time."""
    code = (
        "import sys; from specedit_kernels.hosts.vllm_omni import register; register();"
        "print([n for n in ('diffusers', 'transformers', 'vllm', 'vllm_omni') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert ran.stdout.strip() == "[]"


@pytest.mark.slow
def test_weights_come_by_the_checkpoints_names(omni, checkpoint, editor):
    served = omni.SpecEditOmniPipeline(od_config=host.vllm_omni_config(checkpoint))
    host.load(served)
    theirs, ours = served.transformer.state_dict(), editor.transformer.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    with pytest.raises(ValueError, match="not initialized from checkpoint: {'transformer.proj_out.bias'}"):
        host.load(served, dropped=["transformer.proj_out.bias"])
    with pytest.raises(ValueError, match="transformer.other"):
        host.load(served, added=["transformer.other"])


@pytest.mark.slow
def test_requests_to_vllm_omni(omni, checkpoint, editor):
    config = host.vllm_omni_config(checkpoint)
    served = host.load(omni.SpecEditOmniPipeline(od_config=config))
    before, after = omni.pre_process_func(config), omni.post_process_func(config)

    def ask(prompt, **params):
        request = host.vllm_omni_request(prompt, generator=generator(), **params)
        before(request.requests[0])
        with torch.inference_mode():  # as the host calls it
            return served.forward(request)

    def pictures(output):
        return after(output.output)["payload"]["image"]

    def ours(config, **options):
        options = dict(prompt="color the turtle purple", image=[picture()], generator=generator()) | options
        return editor(specedit=config, **options).images

    auto = dict(height_not_provided=True, width_not_provided=True)
    # the picture's own size; options of the request
    found = ask(prompt(), extra_args={"specedit": {"preset": 4, "threshold": 0.3, "relative": 0.0}}, **auto)
    expected = ours(SpecEditConfig(preset=4, threshold=0.3, relative=0.0), output_size="source")
    assert same(pictures(found), expected) and not same(expected, [picture()])
    assert {"specedit.encode", "specedit.coarse", "specedit.decode"} <= set(found.stage_durations)
    # a size, a mask, steps, several results
    found = ask(
        prompt(mask_image=mask()), height=SIDE, width=SIDE, num_inference_steps=4, num_outputs_per_prompt=2,
        extra_args={"specedit": {"finish": "locked"}},
    )  # fmt: skip
    expected = ours(
        SpecEditConfig(finish="locked"), mask_image=mask(), height=SIDE, width=SIDE, num_inference_steps=4,
        num_images_per_prompt=2,
    )  # fmt: skip
    assert same(pictures(found), expected)
    # guidance: the host's default scale, with a negative prompt alone
    negative = {**prompt(), "negative_prompt": " "}
    found = ask(negative, extra_args={"specedit": {"preset": 4}}, **auto)
    expected = ours(SpecEditConfig(preset=4), negative_prompt=" ", true_cfg_scale=4.0, output_size="source")
    assert same(pictures(found), expected)
    # the host's first request: two steps are asked for, and not taken
    assert ask(prompt(), dummy=True, height=64, width=64, num_inference_steps=2).output


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("runner", ["eager", "graph"])
def test_vllm_omni_on_a_gpu(omni, checkpoint, monkeypatch, runner):
    device = torch.device("cuda")
    monkeypatch.setattr(omni, "get_local_device", lambda: device)
    with device:  # as the host's loader makes it
        config = host.vllm_omni_config(checkpoint, dtype=torch.bfloat16)
        served = host.load(omni.SpecEditOmniPipeline(od_config=config))
    pipe = SpecEditQwenImageEditPlusPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    options = {"preset": 4, "runner": runner}
    for seed in range(3):  # the first captures, the others replay
        given = dict(height=SIDE, width=SIDE, generator=torch.Generator(device).manual_seed(seed))
        request = host.vllm_omni_request(prompt(mask_image=mask()), extra_args={"specedit": options}, **given)
        with torch.inference_mode():
            found = served.forward(request)
        expected = pipe(
            prompt="color the turtle purple", image=[picture()], mask_image=mask(), specedit=SpecEditConfig(**options),
            **given | {"generator": torch.Generator(device).manual_seed(seed)},
        )  # fmt: skip
        assert served.editor._specedit_stats.runner == runner
        print(runner, seed, {name: round(1000 * s, 1) for name, s in found.stage_durations.items()}, "ms")
        difference = np.abs(np.asarray(found.output["payload"]["image"][0], int) - np.asarray(expected.images[0], int))
        assert difference.mean() < 0.5, difference.mean()  # rotary tables are made on the device here, on the CPU there
    served.release_captured_graphs()


def test_what_vllm_omni_is_refused(omni, checkpoint):
    for settings, name in [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: SpecEdit serves with 1 alone, got 2"),
        ({"cfg_parallel_size": 2}, "cfg_parallel_size"),
        ({"enable_cpu_offload": True}, "enable_cpu_offload"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"cache_backend": "tea_cache"}, "cache_backend"),
    ]:
        with pytest.raises(ValueError, match=name):
            omni.SpecEditOmniPipeline(od_config=host.vllm_omni_config(checkpoint, **settings))
    before = omni.pre_process_func(None)
    for request, message in [
        (host.vllm_omni_request("text alone"), "image: expected a picture"),
        (host.vllm_omni_request({"prompt": "x", "multi_modal_data": {"image": []}}), "image: expected at least one"),
        (host.vllm_omni_request(prompt(), extra_args={"specedit": {"presets": 4}}), "unknown option 'presets'"),
    ]:
        with pytest.raises(ValueError, match=message):
            before(request.requests[0])
    # forward looks at these before it uses a model
    unmade = types.SimpleNamespace(editor=None)
    forward = omni.SpecEditOmniPipeline.forward
    with pytest.raises(ValueError, match="lora_request: LoRA is not served here"):
        forward(unmade, host.vllm_omni_request(prompt(), lora_request=object()))
    with pytest.raises(ValueError, match="output_type: expected 'pil', got 'latent'"):
        forward(unmade, host.vllm_omni_request(prompt(), output_type="latent"))


# SGLang


@pytest.fixture
def sgl(monkeypatch):
    """hosts.sglang on the recorded interface: (what it registered, its module pipeline)."""
    registered = host.install_sglang(monkeypatch)
    small_qwen(monkeypatch)
    importlib.import_module("specedit_kernels.hosts.sglang")
    yield registered, sys.modules["specedit_kernels.hosts.sglang.pipeline"]
    forget("sglang")


def parts():
    return tiny_qwen(plus=True)


def encode(pictures, text):
    """Of a stand-in's text encoder: embeddings that depend on the text and on how many pictures there are."""
    assert all(shown.size == (32, 32) for shown in pictures)
    found = qwen_text(length=10 + len(pictures), seed=len(text))
    return found["prompt_embeds"], found["prompt_embeds_mask"].bool()


def serve(module, **settings):
    """(the host's pipeline over a tiny model, its arguments)."""
    plain = parts()
    args = host.sglang_args(module.SpecEditPipelineConfig(), **settings)
    modules = {"transformer": plain.transformer, "vae": plain.vae, "scheduler": plain.scheduler, "text_encoder": encode,
               "processor": None, "tokenizer": None}  # fmt: skip
    return module.SpecEditPipeline("", args, modules), args


def test_sglang_gets_a_pipeline_with_its_configs(sgl):
    [((kind,), named)] = sgl[0]
    module = sgl[1]
    assert kind is module.SpecEditPipeline and kind.pipeline_name == "QwenImageEditPlusPipeline"
    assert named["sampling_param_cls"] is module.SpecEditSamplingParams and named["overwrite"] is True
    assert named["pipeline_config_cls"] is module.SpecEditPipelineConfig
    [detects] = named["model_detectors"]
    assert detects("qwenimageeditpluspipeline") and not detects("qwenimageeditpipeline")
    # a field of the JSON request has to be one of the class
    fields = {field.name for field in dataclasses.fields(module.SpecEditSamplingParams)}
    assert module.SpecEditSamplingParams.image_request_extra_fields() == {"specedit"} <= fields


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_requests_to_sglang(sgl, guided, monkeypatch):
    _, module = sgl
    pipeline, args = serve(module)
    pipe = SpecEditQwenImageEditPlusPipeline(**parts().components)
    pipe.set_progress_bar_config(disable=True)
    scale = 2.5 if guided else 1.0

    def ask(explicit=(), **fields):
        params = dict(prompt="make the cat blue", guidance_scale=scale, specedit={"preset": 4, "metric": "latent"})
        params |= {k: fields.pop(k) for k in [k for k in fields if k in ("specedit", *explicit)]}
        count = params.get("num_outputs_per_prompt", 1)
        fields = dict(condition_image=[tiny_image()], generator=[generator() for _ in range(count)]) | fields
        batch = host.Req(module.SpecEditSamplingParams(**params), explicit=explicit, **fields)
        return pipeline.forward(batch, args)

    def ours(config, pictures=1, **options):
        shown = [tiny_image(32, 32)] * pictures
        texts = dict(zip(("prompt_embeds", "prompt_embeds_mask"), encode(shown, "make the cat blue")))
        if guided:
            negative = encode(shown, " ")
            texts |= dict(zip(("negative_prompt_embeds", "negative_prompt_embeds_mask"), negative))
        options = dict(image=[tiny_image()], generator=[generator()]) | options
        return pipe(**texts, specedit=config, true_cfg_scale=scale, **options).images

    config = SpecEditConfig(preset=4, metric="latent")
    found = ask()
    assert same(found.output, ours(config, output_size="source"))
    assert all(frame.dtype == np.uint8 and frame.shape == (SIDE, SIDE, 3) for frame in found.output)
    assert {"specedit.encode", "specedit.decode"} <= set(found.metrics.stages)
    # what is explicit is taken: a size, steps; several results, two pictures
    given = dict(height=64, width=SIDE, num_inference_steps=6)
    two = [tiny_image(), tiny_image(seed=1)]
    found = ask((*given, "num_outputs_per_prompt"), **given, num_outputs_per_prompt=2, condition_image=two)
    each = [generator(), generator()]
    expected = ours(config, 2, image=two, **given, num_images_per_prompt=2, generator=each)
    assert same(found.output, expected) and found.output[0].shape == (64, SIDE, 3)
    # the server's options, where the request has none; the warm-up, which asks for one step
    monkeypatch.setenv(_serving.OPTIONS, '{"preset": 6, "metric": "latent"}')
    assert same(ask(specedit=None).output, ours(SpecEditConfig(preset=6, metric="latent"), output_size="source"))
    assert len(ask(("num_inference_steps",), num_inference_steps=1, is_warmup=True).output) == 1


def test_sglang_loads_diffusers_classes(sgl, tmp_path):
    _, module = sgl
    plain = parts()
    plain.save_pretrained(tmp_path)
    args = host.sglang_args(module.SpecEditPipelineConfig(vae_precision="bf16"))
    made = module.SpecEditPipeline(tmp_path, args, {"text_encoder": encode, "processor": None, "tokenizer": None})
    loaded = made.get_module("transformer").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in plain.transformer.state_dict().items())
    assert made.get_module("vae").dtype == torch.bfloat16 and made.get_module("transformer").dtype == torch.float32
    names = [type(stage).__name__ for stage in made.stages]
    assert names == ["SpecEditInputStage", "ImageEncodingStage", "SpecEditStage"]
    uses = [use.component_name for use in made.stages[-1].component_uses(args)]
    assert uses == ["transformer", "vae"]


def test_what_sglang_is_refused(sgl, monkeypatch):
    _, module = sgl
    for settings, name in [
        ({"tp_size": 2}, "tp_size: SpecEdit serves with 1 alone, got 2"),
        ({"sp_degree": 2}, "sp_degree"),
        ({"enable_cfg_parallel": True}, "enable_cfg_parallel"),
        ({"lora_path": "a.safetensors"}, "lora_path"),
        ({"disagg_role": host.RoleType.ENCODER}, "disagg_role"),
    ]:
        with pytest.raises(ValueError, match=name):
            serve(module, **settings)
    pipeline, args = serve(module)
    for fields, message in [
        (dict(condition_image=None), "image: expected a picture to edit, got none"),
        (dict(params=dict(prompt=["one", "two"])), "prompt: expected one a request, got 2"),
    ]:
        params = module.SpecEditSamplingParams(**dict(prompt="x", guidance_scale=1.0) | fields.pop("params", {}))
        batch = host.Req(params, **dict(condition_image=[tiny_image()]) | fields)
        with pytest.raises(ValueError, match=message):
            pipeline.forward(batch, args)
    monkeypatch.setenv(_serving.OPTIONS, '{"preset": 7}')
    with pytest.raises(ValueError, match="preset: expected one of"):
        serve(module)


# the real hosts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm_omni", "sglang"])
def test_the_real_host(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = REPOSITORY / "bench" / "hosts" / "serving" / f"check_{name}.py"
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, cwd=script.parent)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert ran.stdout.count(": ok") >= 6
