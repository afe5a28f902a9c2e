# SPDX-License-Identifier: Apache-2.0
"""The command: `specedit edit`, `specedit mask`, `specedit doctor`.

A mistake of the user's ends in one line on stderr and exit code 2. Output files appear whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
SHIPPED_MODEL = ASSETS / "tiny_kontext"
# pipeline classes by the name in model_index.json; each has a SpecEdit class of its name with SpecEdit before it
SUPPORTED = ("FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")
SEVERAL_PICTURES = "QwenImageEditPlusPipeline"
PRESETS = (30, 18, 11, 9, 8, 4)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_SCORED_AREA = 1024**2


class UserError(Exception):
    """A mistake of the user's; its text is the one line that is shown."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def read_image(path: str | os.PathLike, behind: str = "white"):
    """An RGB picture from a file, upright by its EXIF note, on a colour where it is transparent.

    16-bit greys come down to 8 bits. UserError says what is wrong.
    """
    import numpy as np
    import PIL.Image
    import PIL.ImageOps

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        image = PIL.Image.open(path)
    except PIL.UnidentifiedImageError:
        raise UserError(f"{path}: not a picture in a known format") from None
    except PIL.Image.DecompressionBombError:
        raise UserError(f"{path}: the picture is too large") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    with image:
        try:
            image.load()
            image = PIL.ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise UserError(f"{path}: the picture is damaged or truncated ({error})") from None
        if image.mode == "F":
            raise UserError(f"{path}: expected 8 or 16 bits a channel, got floating-point ones")
        if image.mode.startswith("I"):
            # convert() would clip them at 255
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, behind), rgba)
        return image.convert("RGB")


def check_output(path: str | os.PathLike, inputs: list[str | os.PathLike]) -> Path:
    """A path, none of the inputs, that a picture can be written to, or UserError; asked before the work, not after."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: expected a file name that ends in one of {', '.join(IMAGE_SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: cannot be written to")
    for given in inputs:
        if path.exists() and Path(given).exists() and path.samefile(given):
            raise UserError(f"{path}: is an input, and would be written over; name another output")
    return path


def write_image(image, path: Path) -> None:
    """Write a picture whole or not at all: to a file beside it first, then renamed."""
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format=_format(path))
        # mkstemp makes files private; a picture gets the rights that the user's umask gives
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _format(path: Path) -> str:
    import PIL.Image

    return PIL.Image.registered_extensions()[path.suffix.lower()]


def model_folder(text: str | os.PathLike) -> Path:
    """The folder that a path names; where there is none, the shipped model of that name, if there is one."""
    folder, shipped = Path(text), ASSETS / text
    return shipped if not folder.exists() and folder.name == str(text) and shipped.is_dir() else folder


def model_class(folder: Path) -> str:
    """The diffusers class, one of SUPPORTED, that model_index.json of a pipeline folder names, or UserError."""
    if not folder.is_dir():
        hint = ""
        if folder == SHIPPED_MODEL:
            hint = " (this installation has no checkpoint in it; give one with --model)"
        raise UserError(f"{folder}: no such model folder{hint}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder}: unsupported model folder: it has no model_index.json")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        name = content["_class_name"].removeprefix("SpecEdit")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{folder}: unsupported model folder: model_index.json cannot be read") from None
    if name not in SUPPORTED:
        expected = f"{', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}"
        raise UserError(f"{folder}: unsupported model folder: a {name}; expected {expected}")
    return name


def model_settings(folder: Path, name: str, true_cfg_scale: float | None = None) -> dict:
    """Call options for a pipeline class: the command's, and those a model folder asks for in its specedit.json.

    {"resolution": R}: pictures of R * R pixels in area, in the source's ratio, not FLUX.1-Kontext's preferred sizes.
    {"max_sequence_length": T}: text tokens. {"true_cfg_scale": S}: guidance against an empty negative prompt, none at
    1. A folder without the file has its model's own rules: 1024 * 1024 pixels, guidance 4 for Qwen-Image-Edit and none
    for FLUX.1-Kontext.
    """
    flux = name == "FluxKontextPipeline"
    path = folder / "specedit.json"
    options = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if "resolution" in content:
                options["max_area"] = int(content["resolution"]) ** 2
                if flux:
                    options["_auto_resize"] = False
            if "max_sequence_length" in content:
                options["max_sequence_length"] = int(content["max_sequence_length"])
            if "true_cfg_scale" in content and true_cfg_scale is None:
                true_cfg_scale = float(content["true_cfg_scale"])
        except (ValueError, TypeError, OSError):
            raise UserError(f"{path}: expected an object with whole numbers") from None
    scale = true_cfg_scale if true_cfg_scale is not None else (1.0 if flux else 4.0)
    options["true_cfg_scale"] = scale
    if scale > 1:
        options["negative_prompt"] = "" if flux else " "
    return options


def _device(name: str | None):
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    from . import ops

    try:
        for op in ops.names():
            ops.backend_of(op, device)
    except (RuntimeError, ValueError) as error:  # SPECEDIT_BACKEND asks for what cannot be
        raise UserError(str(error)) from None
    return device, dtype


def _quiet() -> None:
    """Keep the libraries' loading notes off the screen; what our own logger says, the summary says."""
    import logging
    import warnings

    import diffusers
    import transformers

    # diffusers 0.42 asks for `dtype`, which earlier ones do not take; all before 1.0 take `torch_dtype`
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
    logging.getLogger("specedit_kernels").setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _load(what: str, folder: Path, load):
    try:
        return load()
    except Exception as error:
        # the libraries raise many kinds for a bad folder; the user needs the folder and the first line
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: {what} cannot be loaded: {first}") from None


def edit(arguments) -> None:
    """`specedit edit`: run the pipeline, write the picture and the mask over the source, print a summary."""
    inputs = [arguments.image, *filter(None, [arguments.mask]), *arguments.reference]
    out = check_output(arguments.output, inputs)
    mask_out = check_output(arguments.mask_output or out.with_name("mask.png"), inputs)
    if mask_out == out:
        raise UserError(f"{out}: the edited picture and the mask overlay have one name; give --mask-output")
    if not arguments.instruction.strip():
        raise UserError("instruction: expected a text, got an empty one")
    image = read_image(arguments.image)
    user_mask = None if arguments.mask is None else read_image(arguments.mask, behind="black")
    references = [read_image(path) for path in arguments.reference]
    folder = model_folder(arguments.model)
    name = model_class(folder)
    if references and name != SEVERAL_PICTURES:
        raise UserError(f"--reference: {folder} is a {name}, which takes one picture")
    settings = model_settings(folder, name, arguments.true_cfg_scale)
    flash = arguments.method == "flash"
    if flash:
        # its second branch is the source's, no guidance
        settings = {k: v for k, v in settings.items() if k not in ("true_cfg_scale", "negative_prompt")}
    device, dtype = _device(arguments.device)

    _quiet()
    import torch

    import specedit_kernels

    from .engine.config import SpecEditConfig
    from .engine.stages import threshold_scale
    from .flash_edit import FlashEditConfig

    options = dict(preserve=None if arguments.preserve == "none" else arguments.preserve)
    try:
        if flash:
            if arguments.threshold is not None:
                options["mask_ratio"] = arguments.threshold
            config = FlashEditConfig(**options)
        else:
            config = SpecEditConfig(
                preset=arguments.preset,
                draft=arguments.draft,
                finish=arguments.finish,
                threshold=arguments.threshold,
                **options,
            )
        config.step_counts(arguments.steps)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    pipe = _load(
        "the model",
        folder,
        lambda: (
            getattr(specedit_kernels, f"{'FlashEdit' if flash else 'SpecEdit'}{name}")
            .from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
            .to(device)
        ),
    )
    if references:
        # the picture that is edited sets the size, not the last one
        settings["height"], settings["width"] = pipe.size_of(image, settings.get("max_area"))
    pipe.set_progress_bar_config(leave=False, disable=not sys.stderr.isatty())
    try:
        result = pipe(
            image=[image, *references] if references else image,
            prompt=arguments.instruction,
            mask_image=user_mask,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(arguments.seed),
            specedit=config,
            **settings,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"--device {device}: {str(error).split('. ')[0]}") from None
    edited = result.images[0]
    import PIL.Image

    source = image.resize(edited.size, PIL.Image.LANCZOS)
    overlay = region_overlay(source, result.mask[0].cpu())
    write_image(edited, out)
    write_image(overlay, mask_out)
    threshold = result.stats.threshold
    if threshold is not None and not flash:
        scale = threshold_scale(result.scores.flatten(1), config.resolved_relative())
        threshold *= float(scale[0])
    print(edit_summary(arguments, config, result.stats, edited.size, result.mask[0], threshold, out, mask_out, pipe))


def region_overlay(source, mask):
    """The source with the edit region tinted and its border drawn. mask: bool [rows, columns]."""
    import numpy as np
    import PIL.Image

    height, width = source.height // mask.shape[0], source.width // mask.shape[1]
    region = mask.numpy().repeat(height, 0).repeat(width, 1)
    array = np.asarray(source, np.float32)
    tint = np.array([255, 40, 60], np.float32)
    out = np.where(region[..., None], 0.6 * array + 0.4 * tint, 0.55 * array)
    edge = np.zeros_like(region)
    padded = np.pad(region, 2)
    for rows, columns in ((0, 2), (4, 2), (2, 0), (2, 4)):
        edge |= region & ~padded[rows : rows + region.shape[0], columns : columns + region.shape[1]]
    out[edge] = (255, 230, 0)
    return PIL.Image.fromarray(out.round().astype(np.uint8))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _flops(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.2f} {unit}FLOP"
    return f"{value:.0f} FLOP"


def edit_summary(arguments, config, stats, size, mask, threshold, out: Path, mask_out: Path, pipe) -> str:
    """What an edit did, on one screen. threshold: of its scores, or None."""
    from .engine.output import group_steps

    device, many = pipe.device, pipe.STEPS_OF_PLAIN
    fine = mask.numel()
    steps = "  ".join(f"{count} x {stage} {tokens:.0f}" for stage, tokens, count in group_steps(stats))
    plain_step = stats.plain_step_flops
    lines = [
        f'"{arguments.instruction}"  {size[0]} x {size[1]}, seed {arguments.seed}, {device}',
        f"edited      {out}",
        f"mask        {mask_out}: {int(mask.sum())} of {fine} tokens in the edit region, {_share(stats.edited[0])}",
    ]
    if threshold is not None:
        lines.append(f"draft       {config.draft}, scores over {threshold:.3g} are edited, grown by {config.dilation}")
    if arguments.method == "flash":
        noise = "white"
        if stats.inverted:
            noise = "of the source" + (", white in the edit region" if config.region_noise == "white" else "")
        elif stats.fallback is None:
            noise += ": the model folder has no one-step weights (cosi/)"
        words = "" if stats.key_tokens is None else f"; {int(stats.key_tokens[0].sum())} key text tokens"
        lines.append(f"noise       {noise}{words}")
    if stats.fallback == "dense":
        lines.append("note        nearly everything changes: all tokens were computed at full resolution")
    if stats.fallback == "source":
        lines.append("note        nothing changes: the source is returned")
    apart = f" and {stats.draft_nfe} of the draft" if stats.draft_nfe else ""
    same = _share(stats.flops / stats.plain_flops) if stats.nfe else "n/a"
    lines += [
        f"steps       {stats.nfe}{apart}; image tokens: {steps} (plain: {stats.plain_tokens})",
        f"transformer {_flops(stats.flops)}: {same} of a plain run with {stats.nfe} steps, "
        f"{_share(stats.flops / (plain_step * many))} of one with {many} steps",
        "seconds     " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stats.seconds.items()),
        f"attention   {stats.backend or 'no mixed-resolution step'}" + (f" ({_why(device)})" if stats.backend else ""),
    ]
    return "\n".join(lines)


def _why(device) -> str:
    from . import ops

    return ops.backend_of("mixed_res_attn", device)[1] or "the fastest here"


def mask(arguments) -> None:
    """`specedit mask`: score an edited picture against its source, draw the heat map, print the shares."""
    out = check_output(arguments.output, [arguments.source, arguments.edited])
    source = read_image(arguments.source)
    edited = read_image(arguments.edited)
    folder = model_folder(arguments.vae) if arguments.vae else SHIPPED_MODEL
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
    if subfolder is None and not (folder / "config.json").is_file():
        if not arguments.vae:
            model_class(folder)
        raise UserError(f"{folder}: expected a folder with a VAE's config.json, or a pipeline folder with vae/")
    device, dtype = _device(arguments.device)
    _quiet()
    import numpy as np
    import PIL.Image
    import torch

    from . import ops
    from .engine import registry
    from .engine.config import THRESHOLDS
    from .engine.stages import discrepancy

    def load():
        codecs = registry.codecs()
        kinds = {kind.__name__: kind for kind in codecs}
        config = json.loads((folder / (subfolder or "") / "config.json").read_text(encoding="utf-8"))
        kind = kinds.get(config.get("_class_name", "AutoencoderKL"))
        if kind is None:
            raise ValueError(f"a {config['_class_name']}; expected {' or '.join(kinds)}")
        vae = kind.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype, local_files_only=True)
        return codecs[kind](vae.to(device))

    codec = _load("the VAE", folder, load)
    token = codec.token
    width, height = _scored_size(source.size, token)
    pair = [p.resize((width, height), PIL.Image.LANCZOS) for p in (source, edited)]
    grid = (height // token, width // token)
    with torch.no_grad():
        latents = []
        for picture in pair:
            pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            latents.append(codec.encode(pixels.to(device, dtype)))
        scores = discrepancy(codec, None, arguments.metric, latents[1], latents[0], grid)
        threshold = arguments.threshold
        if threshold is None:
            threshold = THRESHOLDS[arguments.metric, "matched", "full_step"]
        _, _, count = ops.select_tokens(scores, grid, threshold, 0, 0)
        _, _, grown = ops.select_tokens(scores, grid, threshold, 1, 0)
    scores = scores[0].float().cpu().reshape(grid)
    write_image(heat_map(pair[0], scores, threshold), out)
    total = scores.numel()
    note = "" if source.size == edited.size else f"; {arguments.edited} was {edited.width} x {edited.height}"
    print(
        f"compared    {width} x {height} pixels, {grid[0]} x {grid[1]} tokens of {token} pixels{note}\n"
        f"score       {arguments.metric}, 0 to 4: mean {scores.mean():.4f}, median {scores.median():.4f}, "
        f"largest {scores.max():.4f}\n"
        f"changed     {int(count)} of {total} tokens over {threshold:g}: {_share(int(count) / total)}; "
        f"grown by one token {_share(int(grown) / total)}\n"
        f"heat map    {out}"
    )


def _scored_size(size: tuple[int, int], token: int) -> tuple[int, int]:
    """The source's size in whole tokens, at most a megapixel."""
    scale = min(1.0, (MAX_SCORED_AREA / (size[0] * size[1])) ** 0.5)
    width, height = (max(int(side * scale) // token, 1) * token for side in size)
    return width, height


def heat_map(source, scores, threshold: float):
    """Scores, fp32 [rows, columns], over the greyed source: a tint below the threshold, red to yellow above it."""
    import numpy as np
    import PIL.Image

    base = np.asarray(source.convert("L").convert("RGB"), np.float32)
    height, width = source.height // scores.shape[0], source.width // scores.shape[1]
    level = scores.numpy().repeat(height, 0).repeat(width, 1)[..., None]
    # log scale between a tenth of the threshold and the largest score: scores span decades
    low, high = threshold / 10, max(float(scores.max()), threshold * 2)
    heat = np.clip(np.log(np.maximum(level, 1e-9) / low) / np.log(high / low), 0, 1) if low > 0 else level / high
    colour = np.concatenate(
        [255 * np.minimum(2 * heat, 1), 255 * np.maximum(2 * heat - 1, 0), 60 * (1 - heat)], axis=-1
    )
    weight = np.where(level > threshold, 0.65, 0.35 * heat)
    return PIL.Image.fromarray(((1 - weight) * base + weight * colour).round().astype(np.uint8))


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise ValueError
    return value


def doctor(arguments) -> None:
    """`specedit doctor`: which backend serves each op here, and why."""
    from . import doctor as report

    report.main()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="specedit", description="Edit pictures; compute at full resolution only where they change.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    defaults = argparse.ArgumentDefaultsHelpFormatter

    p = commands.add_parser("edit", help="edit a picture by an instruction", formatter_class=defaults)
    p.add_argument("image", metavar="IMAGE", help="the source picture")
    p.add_argument("instruction", help="what to change")
    p.add_argument("-o", "--output", default="edited.png", help="the edited picture")
    p.add_argument("--mask-output", default=None, help="the mask over the source (default: mask.png beside the output)")
    p.add_argument("--mask", default=None, help="a picture, white where to edit, in place of the draft")
    p.add_argument(
        "--model",
        default=str(SHIPPED_MODEL),
        help="a FLUX.1-Kontext or Qwen-Image-Edit folder, or a shipped one's name: tiny_kontext, tiny_qwen_image_edit",
    )
    p.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="IMAGE",
        help="a further picture for the model to see (Qwen-Image-Edit-2509 and -2511); may be repeated",
    )
    p.add_argument(
        "--true-cfg-scale",
        type=_number,
        default=None,
        help="guidance against an empty negative prompt, none at 1 (default: the model's own)",
    )
    p.add_argument(
        "--method",
        choices=("specedit", "flash"),
        default="specedit",
        help="flash: FlashEdit, one step; --preset, --draft and --finish are SpecEdit's",
    )
    p.add_argument("--preset", type=int, choices=PRESETS, default=9, help="steps of the main trajectory")
    p.add_argument("--steps", type=int, default=None, help="scale the preset's stages to another number of steps")
    p.add_argument("--draft", choices=("coarse", "quarter", "full_step"), default="coarse", help="what finds the edit")
    p.add_argument("--finish", choices=("full", "locked"), default="full", help="tokens of the last steps")
    p.add_argument("--preserve", choices=("none", "pixels"), default="pixels", help="what is kept outside the edit")
    p.add_argument(
        "--threshold", type=_number, default=None, help="score over which a token is edited (flash: times the mean)"
    )
    p.add_argument("--seed", type=_seed, default=0, help="seed of the noise")
    p.add_argument("--device", default=None, help="a torch device (default: cuda where there is one, else cpu)")
    p.set_defaults(run=edit)

    p = commands.add_parser("mask", help="show which tokens differ between two pictures", formatter_class=defaults)
    p.add_argument("source", metavar="SOURCE", help="the source picture")
    p.add_argument("edited", metavar="EDITED", help="the edited picture; resized to the source's size")
    p.add_argument("-o", "--output", default="heat.png", help="the heat map over the source")
    p.add_argument(
        "--vae", default=None, help="a VAE folder, a pipeline folder or a shipped model's name (default: tiny_kontext)"
    )
    p.add_argument("--metric", choices=("decoder", "latent"), default="decoder", help="what is compared")
    p.add_argument("--threshold", type=_number, default=None, help="score over which a token is changed")
    p.add_argument("--device", default=None, help="a torch device (default: cuda where there is one, else cpu)")
    p.set_defaults(run=mask)

    p = commands.add_parser("doctor", help="print which backend serves each op here, and why")
    p.set_defaults(run=doctor)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 after a mistake of the user's."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        print(f"specedit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
