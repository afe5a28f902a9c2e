# SPDX-License-Identifier: Apache-2.0
"""The layout for Hugging Face's `kernels`, loaded beside the package that is being tested."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import specedit_kernels

SCRIPT = Path(__file__).resolve().parents[1] / "integrations" / "hf_kernels" / "layout.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the layout is made from a clone")


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def layout():
    return load("hf_kernels_layout", SCRIPT)


@pytest.fixture(scope="module")
def folder(layout, tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels") / "specedit-kernels"
    namespace = layout.layout(out)
    assert layout.layout(out) == namespace  # again, over the first
    return out


@pytest.fixture(scope="module", params=["import", "get_local_kernel", "get_kernel"])
def kernel(request, folder):
    """The universal variant: imported as `kernels` imports it, and by `kernels` itself where that is installed."""
    variant = folder / "build" / "torch-universal"
    if request.param == "import":
        yield load(json.loads((variant / "metadata.json").read_text())["id"], variant / "__init__.py")
        return
    kernels = pytest.importorskip("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        if request.param == "get_local_kernel":
            yield kernels.get_local_kernel(folder)
        else:
            patch.setenv("LOCAL_KERNELS", f"someone/specedit-kernels={folder}")
            yield kernels.get_kernel("someone/specedit-kernels", version=1)


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_it_serves_beside_the_package(kernel, choice, monkeypatch, random, device):
    ours = specedit_kernels.ops
    assert kernel.NAMESPACE.startswith("_specedit_") and ours.NAMESPACE == "specedit"
    assert kernel.ops.mixed_res_attn is not torch.ops.specedit.mixed_res_attn
    assert set(kernel.names()) == set(ours.names())
    monkeypatch.setenv("SPECEDIT_BACKEND", choice)
    q, k, v = (random(1, n, 2, 64, device=device) for n in (5, 9, 9))
    bias = random(1, 9, device=device)
    found, expected = kernel.mixed_res_attn(q, k, v, key_bias=bias), ours.mixed_res_attn(q, k, v, key_bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    cos, sin = random(1, 5, 32, device=device), random(1, 5, 32, device=device)
    pairs = []
    for module in (kernel, ours):
        outs = [torch.zeros(1, 6, 2, 64, device=device) for _ in range(3)]
        index = torch.tensor([[5, 0, -1, 2, 1]], dtype=torch.int32, device=device)
        module.qk_norm_rope_scatter_(*outs, q, q, q, cos, sin, kv_out_index=index)
        pairs.append(outs)
    assert all(torch.equal(a, b) for a, b in zip(*pairs)) and pairs[0][1].any()
    # each copy's implementations are its own
    backends = sys.modules[f"{kernel.__name__}.ops._backends"]
    assert backends is not sys.modules["specedit_kernels.ops._backends"]
    assert backends._load("mixed_res_attn", choice).__module__.startswith(kernel.__name__)


def test_compiles_fullgraph(kernel, random):
    q = random(1, 4, 2, 64)
    compiled = torch.compile(lambda q: kernel.ops.mixed_res_attn(q, q, q)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(q), kernel.mixed_res_attn(q, q, q)[0])


def test_sources_for_kernel_builder(layout, folder):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    build = tomllib.loads((folder / "build.toml").read_text())
    listed = build["kernel"]["specedit_kernels"]["src"]
    assert all((folder / name).is_file() for name in listed) and "csrc/registration.cpp" in listed
    assert build["general"]["version"] == layout.VERSION and build["torch"]["stable-abi"]["cuda"] == "2.10"
    assert layout.variant_of("128").startswith("torch-stable-abi210-cu128-")


def test_other_sources_have_another_namespace(layout):
    python, csrc = layout.sources(), layout.extension_sources()
    assert layout.namespace_of(python, csrc) != layout.namespace_of(python | {"_words.py": b""}, csrc)


def test_it_overwrites_no_other_folder(layout, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a new or empty folder, or one with a layout of before"):
        layout.layout(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_variant(layout, tmp_path, random):
    """The extension of the layout's namespace, built and loaded beside the installed one."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the extension is for compute capability 9.0")
    namespace = layout.layout(tmp_path / "k", cuda=True)
    [variant] = (tmp_path / "k" / "build").glob("torch-stable-abi*")
    kernel = load(json.loads((variant / "metadata.json").read_text())["id"], variant / "__init__.py")
    assert kernel.NAMESPACE == namespace and kernel.backend_of("mixed_res_attn")[0] == "cuda"
    q = random(1, 64, 2, 128, dtype=torch.bfloat16, device="cuda")
    theirs, ours = kernel.mixed_res_attn(q, q, q)[0], specedit_kernels.ops.mixed_res_attn(q, q, q)[0]
    assert torch.equal(theirs, kernel.mixed_res_attn(q, q, q)[0])
    # the installed one may be another compiler's: a rounding in the sums apart
    torch.testing.assert_close(theirs, ours, rtol=2**-7, atol=2**-10)
