# SPDX-License-Identifier: Apache-2.0
"""Model folders: which is meant, what it holds, whether it was loaded whole."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..images.files import reason, shown
from . import ranks
from .text import UserError

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED_MODEL = ASSETS / "tiny_kontext"
RESOLUTIONS, LENGTHS = (16, 16384), (1, 4096)


def model_folder(text: str | os.PathLike | None, option: str = "--model") -> Path:
    """The folder that a path names; where there is none, the shipped model of that name, if there is one.

    None is the shipped FLUX model. UserError where there is no folder.
    """
    folder = SHIPPED_MODEL if text is None else Path(text)
    try:
        if text is not None and not folder.exists() and folder.name == str(text) and (ASSETS / text).is_dir():
            folder = ASSETS / text
        found = folder.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(folder)}: cannot be read ({reason(error)})") from None
    if not found and text is None:
        raise UserError(f"{option}: this installation has no checkpoint in it; give the folder of one")
    if not found:
        raise UserError(f"{shown(folder)}: no such model folder")
    return folder


def model_class(folder: Path) -> str:
    """The supported diffusers class that model_index.json of a pipeline folder names, or UserError."""
    name = shown(folder)
    index = folder / "model_index.json"
    try:
        if not index.is_file():
            raise UserError(f"{name}: unsupported model folder: it has no model_index.json")
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"].removeprefix("SpecEdit")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise UserError(f"{name}: unsupported model folder: model_index.json cannot be read") from None
    quiet()
    from ..engine import registry

    if registry.model_of(kind) is None:
        names = [kind for kinds in registry.supported_models().values() for kind in kinds]
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UserError(f"{name}: unsupported model folder: a {kind}; expected {expected}")
    return kind


def takes_several_pictures(name: str) -> bool:
    """Whether a pipeline class takes further reference pictures."""
    from ..engine import registry

    model = registry.model_of(name)
    return model is not None and name in model.several_pictures


def model_settings(folder: Path, name: str, true_cfg_scale: float | None = None) -> dict[str, Any]:
    """Call options for a pipeline class: the command's, and those a model folder asks for in its specedit.json.

    {"resolution": R}: pictures of R * R pixels in area, in the source's ratio, not FLUX.1-Kontext's preferred sizes.
    {"max_sequence_length": T}: text tokens. {"true_cfg_scale": S}: guidance against an empty negative prompt, none at
    1. A folder without the file has its model's own rules: 1024 * 1024 pixels, guidance 4 for Qwen-Image-Edit and none
    for FLUX.1-Kontext.
    """
    from ..engine import registry

    path = folder / "specedit.json"
    content: Any = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{shown(path)}: cannot be read ({reason(error)})") from None
        if not isinstance(content, dict):
            raise UserError(f"{shown(path)}: expected an object, got a {type(content).__name__}")
    settings: dict[str, Any] = {}
    for key, (low, high) in (("resolution", RESOLUTIONS), ("max_sequence_length", LENGTHS)):
        if key in content:
            value = content[key]
            if not _is_number(value) or value != value // 1 or not low <= value <= high:
                raise UserError(f"{shown(path)}: {key}: expected a whole number from {low} to {high}, got {value!r}")
            settings[key] = int(value)
    scale = content.get("true_cfg_scale")
    if scale is not None and not (_is_number(scale) and 0 <= scale <= 1000):
        raise UserError(f"{shown(path)}: true_cfg_scale: expected a number from 0 to 1000, got {scale!r}")
    scale = true_cfg_scale if true_cfg_scale is not None else scale
    model = registry.model_of(name)
    assert model is not None  # pipeline_class has found it
    options = model.command(settings, None if scale is None else float(scale))
    if "max_sequence_length" in settings:
        options["max_sequence_length"] = settings["max_sequence_length"]
    return options


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def device_of(name: str | None) -> tuple[Any, Any]:
    """(device, dtype of the weights on it) for --device, or UserError; the backends that are forced must serve it."""
    import torch

    from .. import ops

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        if device == torch.device("cuda") and ranks.several():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.empty(0, device=device).device  # with an index, which set_device wants
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what has a device of its own accord is to have this one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {reason(error)}") from None
    try:
        for op in ops.names():
            ops.backend_of(op, device)
    except (RuntimeError, ValueError) as error:  # SPECEDIT_BACKEND asks for what cannot be
        raise UserError(str(error)) from None
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def quiet() -> None:
    """Keep the libraries' loading notes off the screen, from their import on: what matters in them is checked."""
    import logging
    import warnings

    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    # diffusers 0.42 asks for `dtype`, which earlier ones do not take; all before 1.0 take `torch_dtype`
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def loading(what: str, folder: Path):
    """Whatever a library raises within is a UserError of the folder's."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        # the libraries raise many kinds for a bad folder; the user needs the folder and the first line
        raise UserError(f"{shown(folder)}: {what} cannot be loaded: {reason(error)}") from None


def load_pipeline(kind: Any, folder: Path, device: Any, dtype: Any) -> Any:
    """A pipeline of a class from a folder on a device; UserError where any part of it is absent or damaged."""
    with loading("the model", folder):
        return kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)


def load_codec(folder: Path, device: Any, dtype: Any) -> Any:
    """The codec of a pipeline's folder, a VAE's, or one with a tiny autoencoder's two files of weights.

    UserError where it is of no known kind, absent or damaged.
    """
    from ..engine import registry
    from ..engine.checkpoint import check_module
    from ..engine.tiny_autoencoder import TinyCodec

    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
    with loading("the VAE", folder):
        if subfolder is None and not (folder / "config.json").is_file():
            paths = TinyCodec.files(folder)
            if paths is None:
                expected = "a folder with a VAE's config.json, a pipeline folder with vae/"
                expected += ", or one with NAME_encoder.pth and NAME_decoder.pth"
                raise UserError(f"{shown(folder)}: expected {expected}")
            return TinyCodec.load(paths, device, dtype)
        codecs = registry.codecs()
        kinds: dict[str, Any] = {kind.__name__: kind for kind in codecs}
        place = folder / (subfolder or "")
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        kind = kinds.get(config.get("_class_name", "AutoencoderKL"))
        if kind is None:
            raise ValueError(f"a {config['_class_name']}; expected {' or '.join(kinds)}")
        vae = kind.from_pretrained(place, torch_dtype=dtype, local_files_only=True)
        _whole(folder, check_module(vae, place))
        return codecs[kind](vae.to(device))


def _whole(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{shown(folder)}: the model cannot be loaded: {problems[0]}{more}")
