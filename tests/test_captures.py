# SPDX-License-Identifier: Apache-2.0
"""From the second edit of a size on steps are replayed, whatever quality and model. A graph is stood for by the
function that was captured first, which writes and reads where its buffers lay then."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from combinations import pairwise
from test_runner import stubbed  # noqa: F401
from tiny_models import TINY, tiny_image

import specedit_kernels
from specedit_kernels import SpecEditConfig
from specedit_kernels.engine import pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 384  # pixels: 576 fine tokens; the mixed sequence of half of them is longer than the coarse one
FULL = "FluxKontextPipeline", "QwenImageEditPipeline", "Flux2KleinPipeline"
CASES = [
    pytest.param(name, quality, guided, marks=[] if quality == "balanced" and guided else pytest.mark.slow)
    for name, quality, guided in pairwise(FULL, ("fast", "balanced", "best"), (False, True))
]  # fmt: skip


def columns(share):
    mask = torch.zeros(SIDE, SIDE)
    mask[:, : round(share * SIDE / 32) * 32] = 1
    return mask


def editor(name, guided, monkeypatch):
    """edit(mask or None, **config) by a pipeline that keeps its runner."""
    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", []))
    plain, call = TINY[name](monkeypatch)
    given = call(guided) | dict(height=SIDE, width=SIDE, output_type="latent")
    image = tiny_image(SIDE, SIDE)
    given["image"] = [image, *given["image"][1:]] if isinstance(given["image"], list) else image
    pipe = getattr(specedit_kernels, f"SpecEdit{name}").from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    if "max_area" in pipe._own_arguments() or "max_area" in given or name.startswith("Qwen"):
        given["max_area"] = SIDE**2

    def edit(mask, **config):
        config = SpecEditConfig(**dict(runner="graph", max_active=1.0) | config)
        return pipe(**given, mask_image=mask, generator=torch.Generator().manual_seed(1), specedit=config)

    return edit


@pytest.mark.parametrize(("name", "quality", "guided"), CASES)
def test_from_the_second_edit_on_nothing_is_captured(name, quality, guided, stubbed, monkeypatch, poison):  # noqa: F811
    edit = editor(name, guided, monkeypatch)
    half, most = columns(0.5), columns(0.75)
    found = [edit(mask, quality=quality) for mask in (half, half, most, half, most)]
    captures = [out.stats.captures for out in found]
    assert captures[0] > captures[2] > 0 and captures[1] == captures[3] == captures[4] == 0, captures
    coarse = [out.stats.steps[0].stage for out in found]
    assert coarse == ["mixed" if quality == "fast" and not guided else "coarse"] * 5
    for out, mask, first in zip(found, (half, half, most, half, most), (0, 0, 2, 0, 2)):
        assert torch.equal(out.images, found[first].images)
        if out is found[first]:
            assert torch.equal(edit(mask, quality=quality, runner="fused").images, out.images)


@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_a_found_region(quality, stubbed, monkeypatch):  # noqa: F811
    """One that is a little larger, in a sequence of as many slots, has the same graphs."""
    edit = editor("FluxKontextPipeline", False, monkeypatch)
    options = dict(quality=quality, relative=0.0, dilation=0)
    scores = edit(None, **options, threshold=4.0).scores
    blocks = F.max_pool2d(scores, 2).flatten().sort(descending=True).values
    counts = (74, 74, 76, 110, 74)
    found = [edit(None, **options, threshold=float(blocks[n - 1 : n + 1].mean())) for n in counts]
    captures = [out.stats.captures for out in found]
    assert [round(out.stats.edited[0] * len(blocks)) for out in found] == list(counts)
    assert captures[3] > 0 and captures[1] == captures[2] == captures[4] == 0, captures


def test_settings_in_turn(stubbed, monkeypatch):  # noqa: F811
    """Other qualities, dtypes of what is kept and drafts of one branch leave the graphs of the former ones."""
    edit, half = editor("QwenImageEditPipeline", True, monkeypatch), columns(0.5)
    settings = (dict(quality="balanced"), dict(quality="balanced", kv_cache_dtype="fp8"),
                dict(quality="balanced", draft_guidance=False), dict(quality="fast"))  # fmt: skip
    first = [edit(half, **options) for options in settings]
    again = [edit(half, **options) for options in settings]
    assert all(out.stats.captures for out in first[:3]) and not any(out.stats.captures for out in again)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again))
