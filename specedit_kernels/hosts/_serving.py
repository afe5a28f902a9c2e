# SPDX-License-Identifier: Apache-2.0
"""What the hosts that serve edits share: a request's options, and one edit by the drop-in pipeline over the parts that
a host loads. No host is imported here."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
from torch import Tensor

from ..engine.config import SpecEditConfig
from ..engine.output import SpecEditPipelineOutput
from ..images.boxes import boxes_of
from ..models.qwen_image_edit import SpecEditQwenImageEditPlusPipeline

# The server's own options: JSON of the names that a request may give.
OPTIONS = "SPECEDIT_OPTIONS"
CALL = ("region", "mask_mode")
FIELDS = tuple(field.name for field in dataclasses.fields(SpecEditConfig) if field.init)
# A host's first request warms the model up: a quarter is edited, so mixed steps run whatever a draft finds.
WARM_UP = {"region": "25%,25%,75%,75%", "mask_mode": "replace"}


def _mapping(name: str, given: Any) -> dict[str, Any]:
    """Options of one place as a dict: a mapping, JSON text of one, or None. Errors begin with the place's name."""
    if given is None or given == "":
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: expected a JSON object, got {given!r} ({error})") from None
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected an object with options, got {type(given).__name__}")
    unknown = sorted(set(given) - set(FIELDS) - set(CALL))
    if unknown:
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; expected {', '.join((*FIELDS, *CALL))}")
    return dict(given)


def options_of(given: Any = None) -> tuple[SpecEditConfig, dict[str, Any]]:
    """(the config of a request, its region and mask_mode where they are given).

    given: the request's `specedit`, a mapping, JSON text or None; its options go before the server's, which are JSON in
    the environment variable SPECEDIT_OPTIONS. Names: the fields of SpecEditConfig, `region` and `mask_mode` of a call.
    """
    found = _mapping(OPTIONS, os.environ.get(OPTIONS)) | _mapping("specedit", given)
    call = {name: found.pop(name) for name in CALL if name in found}
    if isinstance(found.get("stages"), list):
        found["stages"] = tuple(found["stages"])
    if call.get("region") is not None:
        boxes_of(call["region"])  # a wrong one is refused before the request waits for its turn
    return SpecEditConfig(**found), call


def edit(
    pipe: SpecEditQwenImageEditPlusPipeline,
    pictures: Sequence[PIL.Image.Image],
    texts: Mapping[str, Any],
    *,
    given: Any = None,
    mask: PIL.Image.Image | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    true_cfg_scale: float = 1.0,
    count: int = 1,
    generator: Any = None,
    latents: Tensor | None = None,
) -> SpecEditPipelineOutput:
    """One request: `count` edits of the first picture, as PIL pictures.

    texts: `prompt` and `negative_prompt`, or their embeddings and masks, by the names of the pipeline's call. given:
    `options_of`'s. size: (height, width) of the results; None: each comes back at the source's own size, equal to it
    outside the edit. steps: None for those of the options. generator: one, or as many as results.
    """
    config, call = options_of(given)
    if size is None:
        shape: dict[str, Any] = {"output_size": "source"}
    else:
        pictures = [picture.convert("RGB") for picture in pictures]
        shape = {"height": size[0], "width": size[1]}
    return pipe(
        image=list(pictures), **texts, **shape, **call, specedit=config, mask_image=mask, num_inference_steps=steps,
        true_cfg_scale=true_cfg_scale, num_images_per_prompt=count, generator=generator, latents=latents,
    )  # fmt: skip


def pictures_of(given: Any) -> list[PIL.Image.Image]:
    """The pictures of a request: PIL ones or paths, one or a list. Errors name the argument."""
    found = []
    for picture in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(picture, (str, os.PathLike)):
            picture = PIL.Image.open(picture)
        if not isinstance(picture, PIL.Image.Image):
            raise TypeError(f"image: expected PIL pictures or paths, got {type(picture).__name__}")
        found.append(picture)
    if not found:
        raise ValueError("image: expected at least one picture, got an empty list")
    return found


def refuse(wanted: Mapping[str, tuple[Any, Any]]) -> None:
    """ValueError for the first setting of a host that edits are not served with: name -> (what it is, what it may be).

    A value that stands for "not set" (None) is taken.
    """
    for name, (value, allowed) in wanted.items():
        if value is not None and value != allowed:
            raise ValueError(f"{name}: SpecEdit serves with {allowed!r} alone, got {value!r}")
