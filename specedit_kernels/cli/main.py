# SPDX-License-Identifier: Apache-2.0
"""The command's arguments, exit codes and last words.

A mistake of the user's ends in one line on stderr and exit code 2, Ctrl-C in one line and 130.
"""

from __future__ import annotations

import argparse
import math
import sys

from .._command import INTERRUPTED, unwatch
from ..images.boxes import Box
from ..images.files import ImageFileError, reason, shown
from .text import UserError, one_line, say

PRESETS = (30, 18, 11, 9, 8, 6, 4)
DRAFTS = ("coarse", "half", "quarter", "full_step")
QUALITIES = ("fast", "balanced", "best", "paper")
DEVICE = "a torch device (default: cuda where there is one, else cpu)"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)

    def _print_message(self, message, file=None):
        if message:
            say(message.removesuffix("\n"), file)


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


def _edit(arguments: argparse.Namespace) -> int:
    from . import batch, edit

    return batch.run(arguments) if batch.is_many(arguments.image) else edit.run(arguments)


def _mask(arguments: argparse.Namespace) -> int:
    from . import mask

    return mask.run(arguments)


def _ui(arguments: argparse.Namespace) -> int:
    from . import ui

    return ui.run(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from . import bench

    return bench.run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run(arguments)


class _Version(argparse.Action):
    def __call__(self, parser, *rest):
        from .. import __version__

        say(f"specedit {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="specedit", description="Edit pictures; compute at full resolution only where they change.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    defaults = argparse.ArgumentDefaultsHelpFormatter

    p = commands.add_parser("edit", help="edit a picture by an instruction", formatter_class=defaults)
    p.add_argument(
        "image",
        metavar="IMAGE",
        help="the source picture; or a folder of pictures; or a list, .csv (with a first line of names) or .jsonl, of "
        "image, instruction and, where wanted, output, seed and mask",
    )
    p.add_argument("instruction", nargs="?", default=None, help="what to change; of a list, where a line has none")
    p.add_argument(
        "-o", "--output", default=None, help="the edited picture (default: edited.png), or the folder of many"
    )
    p.add_argument("--mask-output", default=None, help="the mask over the source (default: mask.png beside the output)")
    p.add_argument(
        "--mask", default=None, help="a picture, white where to edit, in place of the draft; transparent is not white"
    )
    p.add_argument(
        "--box",
        action="append",
        type=Box.parse,
        default=[],
        metavar="X0,Y0,X1,Y1",
        help="a rectangle to edit, in place of the draft, in pixels or, with %%, in per cent; may be repeated, joins "
        "--mask",
    )
    p.add_argument(
        "--mask-mode",
        choices=("replace", "limit", "add"),
        default="replace",
        help="--mask and --box in place of the draft's region; or the draft looks too, and they limit its region or "
        "are added to it",
    )
    p.add_argument(
        "--preview", action="store_true", help="look for the region alone, and write --mask-output; nothing is edited"
    )
    p.add_argument(
        "--model",
        default=None,
        help="a FLUX.1-Kontext or Qwen-Image-Edit folder, or a shipped one's name: tiny_kontext (the default), "
        "tiny_qwen_image_edit",
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
        help="flash: FlashEdit, one step; --quality, --preset, --draft and --finish are SpecEdit's",
    )
    p.add_argument(
        "--source-prompt",
        default=None,
        metavar="TEXT",
        help="with --method flash: the source's caption, for a model that makes pictures from captions (FLUX.1)",
    )
    p.add_argument(
        "--quality",
        choices=QUALITIES,
        default="balanced",
        help="sets the steps, --finish and how often keys and values are recomputed; paper: SpecEdit as published",
    )
    p.add_argument(
        "--preset",
        type=int,
        choices=PRESETS,
        default=None,
        help="even steps of the scheduler, so many in all, in place of the quality's own",
    )
    p.add_argument("--steps", type=int, default=None, help="scale the stages to another number of steps")
    p.add_argument("--draft", choices=DRAFTS, default=None, help="what finds the edit (default: the quality's)")
    p.add_argument(
        "--finish", choices=("full", "locked"), default=None, help="tokens of the last steps (default: the quality's)"
    )
    p.add_argument(
        "--preserve",
        choices=("none", "pixels"),
        default="pixels",
        help="what is kept outside the edit; none, the model's own there, has --output-size working",
    )
    p.add_argument(
        "--runner",
        choices=("auto", "eager", "fused", "graph", "compile"),
        default="auto",
        help="how the transformer's steps run",
    )
    p.add_argument(
        "--output-size",
        choices=("source", "working"),
        default="source",
        help="source: the edit is put into the picture at its own size; working: the model's, as it comes",
    )
    p.add_argument(
        "--detail",
        choices=("working", "native"),
        default="working",
        help="native: a second pass over the region at the picture's own resolution",
    )
    p.add_argument(
        "--threshold", type=_number, default=None, help="score over which a token is edited (flash: times the mean)"
    )
    p.add_argument("--seed", type=_seed, default=0, help="seed of the noise")
    p.add_argument("--device", default=None, help=DEVICE)
    p.add_argument("--traceback", action="store_true", help="where an error of the run came from, not one line")
    p.set_defaults(run=_edit)

    p = commands.add_parser("mask", help="show which tokens differ between two pictures", formatter_class=defaults)
    p.add_argument("source", metavar="SOURCE", help="the source picture")
    p.add_argument("edited", metavar="EDITED", help="the edited picture, of any size: it is brought onto the source")
    p.add_argument("-o", "--output", default="heat.png", help="the heat map over the source")
    p.add_argument(
        "--vae", default=None, help="a VAE folder, a pipeline folder or a shipped model's name (default: tiny_kontext)"
    )
    p.add_argument("--metric", choices=("decoder", "latent"), default="decoder", help="what is compared")
    p.add_argument(
        "--no-align",
        dest="align",
        action="store_false",
        help="resize the edited picture to the source's size, and leave a shift, a zoom and a colour cast in it",
    )
    p.add_argument("--threshold", type=_number, default=None, help="score over which a token is changed")
    p.add_argument("--device", default=None, help=DEVICE)
    p.add_argument("--traceback", action="store_true", help="where an error of the run came from, not one line")
    p.set_defaults(run=_mask)

    p = commands.add_parser("ui", help="a page to try an edit, on this machine", formatter_class=defaults)
    p.add_argument("--model", default=None, help="as of edit")
    p.add_argument("--device", default=None, help=DEVICE)
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at; another one shows the page to others")
    p.add_argument("--port", type=int, default=7860, help="the port to listen at")
    p.set_defaults(run=_ui)

    p = commands.add_parser(
        "bench", help="the qualities beside the stock pipeline, on a model's own weights", formatter_class=defaults
    )
    p.add_argument("--model", default=None, help="as of edit")
    p.add_argument(
        "--pictures",
        metavar="DIR",
        default=None,
        help="a folder of pictures with a list of instructions (.jsonl, .json, .csv; GEdit-Bench's fields too), or "
        "with NAME.txt beside each (default: seven that are shipped)",
    )
    p.add_argument("--language", default="en", help="of a list that has instructions in several")
    p.add_argument(
        "-o", "--output", default=None, metavar="DIR", help="for the results; what is finished in it is kept (default: "
        "bench-NAME of the model)",
    )  # fmt: skip
    p.add_argument("--minutes", type=_number, default=10.0, help="for all of it; 0: the report of what is finished")
    p.add_argument("--steps", type=int, default=None, help="of the stock pipeline (default: its own)")
    p.add_argument(
        "--preset", type=int, choices=PRESETS, action="append", default=[], help="a further row; may be repeated"
    )
    p.add_argument("--no-compile", dest="compile", action="store_false", help="without the rows of torch.compile")
    p.add_argument("--true-cfg-scale", type=_number, default=None, help="as of edit")
    p.add_argument("--seed", type=_seed, default=0, help="seed of the noise, of every edit")
    p.add_argument("--device", default=None, help=DEVICE)
    p.set_defaults(run=_bench)

    p = commands.add_parser("doctor", help="print which backend serves each op here, and why")
    p.add_argument(
        "--plan",
        metavar="QxK",
        default=None,
        help="the work tiles that the CUDA attention makes of Q queries and K keys, such as 922x8704",
    )
    p.add_argument(
        "--model",
        metavar="FOLDER",
        default=None,
        help="which runner this model's edits take here, and why no faster one (the model is loaded)",
    )
    p.set_defaults(run=_doctor)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C."""
    try:
        unwatch()
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except (UserError, ImageFileError) as error:
        say(f"specedit: {one_line(str(error))}", sys.stderr)
        return 2
    except OSError as error:
        # a folder without rights, a disk that is gone: wherever a file was asked for
        if isinstance(error, BrokenPipeError) or error.filename is None:
            raise
        say(f"specedit: {shown(error.filename)}: {one_line(reason(error))}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("specedit: interrupted", sys.stderr)
        return INTERRUPTED
