# SPDX-License-Identifier: Apache-2.0
"""What the table, the calibration and the contact sheet share: the editor, the edits, one batched run, its figures."""

import copy
import datetime
import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from export import build_pipeline
from families import Flux, Klein, Qwen, TextFlux, family_in, family_of
from judge import WEIGHTS, Judge, found_boxes, judge_edits
from models import as_pictures
from PIL import Image
from runtime import replace_file
from sampler import decode_latents, encode_images
from scenes import EVALUATION_COUNTS, EVALUATION_SEED, KINDS, TASKS, TOKEN, Edits, Renderer, evaluation_set
from table_measures import (
    area_under_curve,
    changed_tokens,
    grow,
    largest_difference,
    masked_psnr,
    recall_precision,
    sharpness,
    to_pixels,
)

from specedit_kernels import (
    SpecEditConfig,
    SpecEditFlux2KleinPipeline,
    SpecEditFluxKontextPipeline,
    SpecEditFluxPipeline,
    SpecEditQwenImageEditPipeline,
    edit_alpha,
)
from specedit_kernels.sampling.flops import transformer_flops

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "specedit_kernels" / "assets" / "tiny_kontext"
CALIBRATION_SEED = EVALUATION_SEED + 1000  # the table's edits stay unseen
ADDS_OBJECT = ("replace", "recolor", "add", "add_open")  # where sharpness has an object to look at


class Batched:
    """Encodes a batch of sources at once though each picture has its own generator: the mode needs none."""

    def _encode_vae_image(self, image, generator):
        return super()._encode_vae_image(image, None)


class BatchedPipeline(Batched, SpecEditFluxKontextPipeline):
    pass


class BatchedQwenPipeline(Batched, SpecEditQwenImageEditPipeline):
    pass


class BatchedKleinPipeline(SpecEditFlux2KleinPipeline):
    """Edits a list of pictures of one size, a prompt each. The stock pipeline shows them all to every prompt."""

    EDITED = None

    def _size(self, call):
        return call.height, call.width

    def _pictures(self, call, device):
        pixels = self.image_processor.preprocess(call.image, call.height, call.width).to(device)
        return pixels, [pixels]


BATCHED = {
    Flux: BatchedPipeline,
    Qwen: BatchedQwenPipeline,
    Klein: BatchedKleinPipeline,
    TextFlux: SpecEditFluxPipeline,
}
RANDOM = {"random": Flux, "random-qwen": Qwen, "random-klein": Klein, "random-text-flux": TextFlux}


def model_family(model):
    """The family of --model: a folder, or one of RANDOM."""
    if str(model) in RANDOM:
        return RANDOM[str(model)]
    if not (Path(model) / "model_index.json").is_file():
        raise SystemExit(f"--model: expected a folder that a pipeline loads from, or one of {[*RANDOM]}, got {model}")
    return family_in(model)


def load_pipeline(model, device, dtype):
    """A folder, or one of RANDOM: a tiny model's structure with random weights, to try the scripts."""
    family = model_family(model)
    if str(model) in RANDOM:
        torch.manual_seed(0)
        weights = {name: make().state_dict() for name, (_, make) in family.parts.items()}
        pipe = build_pipeline(family, family.make_vae().eval(), weights, dtype)
    else:
        pipe = family.pipeline.from_pretrained(model, torch_dtype=dtype)
    pipe = BATCHED[family](**pipe.components, **family.arguments).to(device)
    as_pictures(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_judge(path, device):
    if str(path) == "none":
        return None
    if not Path(path).is_file():
        raise SystemExit(f"--judge: expected the judge's weights, or 'none' to leave `right` out, got {path}")
    return Judge.load(path).to(device)


@dataclass
class EditSet:
    """Rendered edits. edits and seeds are on the CPU.

    source, target: uint8 [n, 3, H, W]; mask: bool [n, H, W]; tokens: bool [n, H/16, H/16], those that differ; reach:
    the tokens where the edit may go at all; seeds: each edit's noise.
    reference: bool like tokens, what a mask is held against; None until it is known.
    """

    edits: Edits
    seeds: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor
    reach: torch.Tensor
    reference: torch.Tensor | None = None

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, rows):
        there = rows.to(self.source.device)
        return EditSet(
            self.edits[rows],
            self.seeds[rows],
            *(
                None if x is None else x[there]
                for x in (self.source, self.target, self.mask, self.tokens, self.reach, self.reference)
            ),
        )

    def pictures(self):
        """(source, target), fp32 in [0, 1]."""
        return self.source.float() / 255, self.target.float() / 255


def make_set(device, size=512, limit=None, counts=None, seed=EVALUATION_SEED):
    """The held-out edits of one seed, rendered. limit: so many of them, evenly spaced; an edit keeps its seed.

    They come sorted by how much they change, because a batch is as long as its longest mixed sequence.
    """
    counts = dict(EVALUATION_COUNTS if counts is None else counts)
    edits = evaluation_set(counts, seed)
    chosen = torch.arange(len(edits))
    if limit is not None and limit < len(edits):
        chosen = torch.linspace(0, len(edits) - 1, limit).round().long().unique()
    renderer = Renderer(device)
    parts = []
    for part in chosen.split(32):
        drawn = renderer(edits[part], size, held_out=True)
        source, target = ((x * 255).round().to(torch.uint8) for x in (drawn.source, drawn.target))
        open_place = (edits.task[part] == TASKS.index("add_open")).to(device)
        unique = edits.unique()[part].to(device)
        # What one instruction leaves open: the weights' region; nothing where there is one answer or no known place.
        reach = (drawn.weight > 1) & ~(unique | open_place).view(-1, 1, 1) | drawn.tokens
        parts.append((source, target, drawn.mask, drawn.tokens, reach))
    whole = EditSet(edits[chosen], chosen, *(torch.cat(x) for x in zip(*parts)))
    return whole[whole.tokens.flatten(1).sum(1).cpu().argsort(stable=True)]


@dataclass(frozen=True)
class Row:
    """One row of the table: a name and how its pictures are made.

    steps: plain steps. config: a SpecEdit run; oracle: with the reference mask, grown by a token, as the user's mask.
    still: "source" or "vae(target)", no model. text_length: that FLUX's prompts are padded to, in place of the
    runner's. lora: with the runner's LoRA, where it has one.
    """

    name: str
    steps: int = 0
    config: SpecEditConfig | None = None
    oracle: bool = False
    still: str = ""
    text_length: int | None = None
    lora: bool = False


@dataclass
class Result:
    """n pictures [n, 3, H, W] in [0, 1] and how they came about.

    mask: bool [n, rows, columns] or None; scores: fp32 like it, or None; active: share of the tokens computed
    fine in mixed steps; fallbacks: None, "dense" or "source" each. flops: of each edit. runner: what ran the steps."""

    images: torch.Tensor
    flops: list
    nfe: int = 0
    draft_nfe: int = 0
    mask: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    active: list | None = None
    fallbacks: list | None = None
    feather: int = 0
    runner: str = "eager"


class Runner:
    """Runs rows on parts of a set with one editor. true_cfg_scale: over 1, guidance away from an empty prompt. lora: a
    file that rows which ask for it run with."""

    def __init__(self, pipe, text_length=512, true_cfg_scale=1.0, lora=None):
        self.pipe, self.text_length, self.true_cfg_scale = pipe, text_length, true_cfg_scale
        self.lora = lora
        if lora is not None:
            pipe.load_lora_weights(str(lora))
            self.adapt(False)
        self.device, self.dtype = pipe.transformer.device, pipe.transformer.dtype
        self.family = family_of(pipe)

    def adapt(self, lora):
        """Have the pipeline's calls with the LoRA or without."""
        if self.lora is not None:
            (self.pipe.enable_lora if lora else self.pipe.disable_lora)()
        elif lora:
            raise ValueError("lora: expected a file for a row that runs with one, got none")

    def options(self, part):
        """The call's arguments that every row shares; the same noise for an edit in every row."""
        size = part.source.shape[-1]
        options = dict(
            prompt=part.edits.phrases(),
            height=size,
            width=size,
            max_area=size * size,
            output_type="pt",
            generator=[torch.Generator().manual_seed(int(seed)) for seed in part.seeds],
        )
        if self.true_cfg_scale > 1 and self.family is Klein:
            raise ValueError("true_cfg_scale: expected 1, klein's editor has no guidance")
        if self.true_cfg_scale > 1:
            options |= dict(true_cfg_scale=self.true_cfg_scale, negative_prompt=[" "] * len(part))
        if self.family is not Qwen:
            options["max_sequence_length"] = self.text_length
        if self.family is TextFlux:  # made from the target's caption
            options["prompt"] = [after for _, after in part.edits.captions()]
            return options | dict(image=part.pictures()[0])
        if self.family is Flux:
            return options | dict(image=part.pictures()[0], _auto_resize=False)
        return options | dict(image=[Image.fromarray(x) for x in part.source.permute(0, 2, 3, 1).cpu().numpy()])

    def plain(self, steps, part):
        """Pictures of the diffusers pipeline in so many steps."""
        options = self.options(part)
        if self.family is TextFlux:  # nobody shows it the source
            for name in ("image", "max_area"):
                del options[name]
        if issubclass(self.family, Flux):
            return self.pipe(num_inference_steps=steps, specedit=False, **options).images
        # Qwen's own call shows the model a megapixel whatever it is given, klein's shows every picture to every prompt;
        # this is the same to the last bit, at a size and with a picture for each.
        whole = torch.ones(part.source.shape[-2:])
        config = SpecEditConfig(quality="paper", runner="eager", stages=(0, 0, steps))
        return self.pipe(specedit=config, mask_image=whole, **options).images

    def step_flops(self, image_tokens, keys=None, passes=2, lock_text=False):
        """Useful FLOPs of one step for one edit, guidance included; the arguments are a StepRecord's."""
        config = self.pipe.transformer.config
        queries = image_tokens + (0 if lock_text else self.text_length)
        keys = self.text_length + (image_tokens if keys is None else keys)
        blocks = config.num_layers + config.get("num_single_layers", 0)
        dim, passes = config.num_attention_heads * config.attention_head_dim, passes if self.true_cfg_scale > 1 else 1
        # the gated MLP has three matrices of mlp_ratio d^2
        more = round((6 * config.mlp_ratio - 16) * dim * dim) * queries * blocks if self.family is Klein else 0
        return passes * (transformer_flops(queries, keys, dim, blocks) + more)

    def vae(self, images):
        """Pictures through the VAE and back."""
        return decode_latents(self.pipe.vae, encode_images(self.pipe.vae, images))

    @torch.no_grad()
    def run(self, row, part):
        """A Result. Where memory runs out, the part is cut in two."""
        if row.text_length is not None:
            other = copy.copy(self)
            other.text_length = row.text_length
            return other.run(replace(row, text_length=None), part)
        self.adapt(row.lora)
        try:
            return self._run(row, part)
        except torch.cuda.OutOfMemoryError:
            if len(part) == 1:
                raise
        torch.cuda.empty_cache()
        halves = [self.run(row, part[rows]) for rows in torch.arange(len(part)).split((len(part) + 1) // 2)]
        first, second = halves

        def joined(name):
            a, b = getattr(first, name), getattr(second, name)
            return None if a is None else torch.cat([a, b]) if isinstance(a, torch.Tensor) else [*a, *b]

        return replace(
            first, **{name: joined(name) for name in ("images", "flops", "mask", "scores", "active", "fallbacks")}
        )

    def _run(self, row, part):
        n, tokens = len(part), part.tokens.shape[1] * part.tokens.shape[2]
        source, target = part.pictures()
        if row.still:
            return Result(source if row.still == "source" else self.vae(target), [0] * n)
        if row.config is None:
            shown = tokens * (2 if self.family.sees_source else 1)
            return Result(self.plain(row.steps, part).float(), [row.steps * self.step_flops(shown)] * n, row.steps)
        mask_image = grow(part.reference, 1).float() if row.oracle else None
        out = self.pipe(specedit=row.config, mask_image=mask_image, **self.options(part))
        stats = out.stats
        flops = [
            sum(self.step_flops(step.tokens[i], step.keys[i], step.passes, step.lock_text) for step in stats.steps)
            for i in range(n)
        ]
        return Result(
            out.images.float(),
            flops,
            stats.nfe,
            stats.draft_nfe,
            out.mask,
            out.scores,
            stats.active,
            stats.fallbacks,
            row.config.feather,
            stats.runner,
        )


def set_reference(part, runner, output):
    """Reference masks of a part, given the pictures of its plain reference run with the same noise.

    The true mask where an edit has one right answer. Else the new object's pose or place is the noise's choice, and the
    true mask is one sample of many: what the plain run changed, against the source as the VAE gives it back.
    """
    own = changed_tokens(runner.vae(part.pictures()[0]), output)
    unique = part.edits.unique().to(own.device).view(-1, 1, 1)
    return torch.where(unique, part.tokens, own), own


def relative_sharpness(edits, source, target, images, around):
    """[n]: gradient energy of an output where it changed, within tokens `around`, over the true target's where that
    changed: an object's edges, each picture's own, as poses differ. nan where there is no object or no change."""
    mine, theirs = to_pixels(changed_tokens(source, images) & around), to_pixels(changed_tokens(source, target))
    sharp = sharpness(images, mine) / sharpness(target, theirs).clamp(min=1e-8)
    with_object = torch.isin(edits.task, torch.tensor([TASKS.index(t) for t in ADDS_OBJECT])).to(images.device)
    return sharp.masked_fill(~(with_object & mine.flatten(1).any(1)), torch.nan)


@torch.no_grad()
def measure(part, result, judge, own=None):
    """Figures of each edit: a dict of lists of n. own: bool like tokens, what the plain reference run changed."""
    source, target = part.pictures()
    images, edits, n = result.images, part.edits, len(part)
    unique = edits.unique()
    open_place = edits.task == TASKS.index("add_open")
    there = images.device
    figures = {"flops": result.flops}
    if judge is not None:
        figures["right"] = judge_edits(judge, edits, source, images).float()

    known = unique.to(there)
    inside, outside = masked_psnr(images, target, part.mask), masked_psnr(images, target, ~part.mask)
    figures["psnr_in"] = inside.masked_fill(~known, torch.nan)
    figures["psnr_out"] = outside.masked_fill(~known, torch.nan)
    figures["psnr_in_one_of_many"] = inside

    boxes, _ = found_boxes(source, images)
    axis = (torch.arange(part.tokens.shape[1], device=there) + 0.5) / part.tokens.shape[1]
    near = (axis[None, None] - boxes[:, :2, None]).abs() <= boxes[:, 2, None, None] / 2  # [n, (x, y), tokens]
    box = near[:, 1, :, None] & near[:, 0, None, :]
    place = part.reach | (box & open_place.to(there).view(-1, 1, 1))
    around = grow(place, 1)
    far = ~to_pixels(around)
    figures["drift"] = masked_psnr(images, source, far)
    figures["drift_max"] = largest_difference(images, source, far)

    figures["sharpness"] = relative_sharpness(edits, source, target, images, around)

    if result.mask is not None:
        mask = result.mask
        kept = edit_alpha(mask.flatten(1), tuple(mask.shape[1:]), TOKEN, result.feather)[:, 0] == 0
        figures["kept_max"] = largest_difference(images, source, kept)
        figures["active"] = result.active
        figures["selected"] = mask.flatten(1).float().mean(1)
        figures["dense"] = [float(f == "dense") for f in result.fallbacks]
        figures["returned_source"] = [float(f == "source") for f in result.fallbacks]
        for suffix, reference in (("", part.reference), ("_true", part.tokens), ("_own", own)):
            if reference is None:
                continue
            recall, precision = recall_precision(mask, reference)
            figures["recall" + suffix] = recall
            figures["missed" + suffix] = (recall < 0.5).float().masked_fill(recall.isnan(), torch.nan)
            if not suffix:
                figures["precision"] = precision
        if result.scores is not None and part.reference is not None:
            figures["auc"] = area_under_curve(result.scores, part.reference)
    assert all(len(values) == n for values in figures.values())
    return {name: torch.as_tensor(values, dtype=torch.float64).cpu() for name, values in figures.items()}


def fingerprint(model):
    """Eight hex digits of the editor's weights."""
    if str(model) in RANDOM:
        return str(model)
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).rglob("*.safetensors") if p.parent.name != "cosi"):  # FlashEdit's
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def setting(args, device):
    """Where, when and with what a run was made."""
    commit = os.environ.get("SPECEDIT_COMMIT")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "versions": {n: installed(n) for n in ("torch", "triton", "diffusers", "transformers", "specedit-kernels")},
        "python": platform.python_version(),
        "dtype": args.dtype,
        "model": fingerprint(args.model),
        "size": args.size,
        "text_length": args.text_length,
        "batch": args.batch,
        "true_cfg_scale": args.true_cfg_scale,
    }


def setting_text(place):
    """What `setting` gave, as one phrase of a report."""
    return (
        f"{place['size']} px, true_cfg_scale {place['true_cfg_scale']:g}, editor {place['model']},"
        f" commit {place['commit'][:10]}, {place['date']}, {place['device']}, {place['dtype']}, "
        + ", ".join(f"{k} {v}" for k, v in place["versions"].items() if v)
    )


def add_arguments(parser, out):
    """Options that the scripts share."""
    parser.add_argument("--model", default=str(SHIPPED), help=f"folder of an editor, or one of {[*RANDOM]}")
    parser.add_argument("--judge", default=str(WEIGHTS), help="the judge's weights, or 'none'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--limit", type=int, help="so many edits, evenly spaced over the set")
    parser.add_argument("--batch", type=int, help="edits in one call")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures, a multiple of 64")
    parser.add_argument(
        "--text-length", type=int, help="length that prompts are padded to (default 512; Qwen's are not)"
    )
    parser.add_argument("--true-cfg-scale", type=float, default=1.0, help="over 1: guidance, an empty negative prompt")


def add_lora(parser):
    """The option for weights that are distilled, or otherwise changed."""
    parser.add_argument("--lora", type=Path, metavar="FILE", help="that load_lora_weights takes, distil.py's say")


def add_thresholds(parser):
    """The option for an editor that SpecEditConfig's own thresholds were not measured on."""
    parser.add_argument(
        "--thresholds",
        type=lambda path: json.loads(Path(path).read_text())["recommended"],
        help="calibrate.py's thresholds.json, in place of the config's own",
    )


def _with_threshold(rows, threshold_of):
    """The rows with the threshold that threshold_of gives for their config, which follows the picture as before."""

    def changed(config):
        return replace(config, threshold=threshold_of(config), relative=config.resolved_relative())

    return [row if row.config is None else replace(row, config=changed(row.config)) for row in rows]


def with_thresholds(rows, recommended):
    """The rows with the thresholds that calibrate.py recommends for a metric, reference and draft."""
    table = {(p["metric"], p["reference"], p["draft"]): p["threshold"] for p in recommended}
    return _with_threshold(rows, lambda c: table.get((c.metric, c.reference, c.resolved().draft), c.threshold))


def with_own_thresholds(rows, pipe, true_cfg_scale):
    """The rows as `pipe` runs them: with the thresholds that its model has in place of the config's."""
    own = family_of(pipe).thresholds
    guided = true_cfg_scale > 1

    def threshold(config):
        used = config.resolved(guided)
        return used.resolved_threshold(own, used.guidance_of_draft(used.step_counts()[0], guided))

    return _with_threshold(rows, threshold)


def prepare(args):
    """The device; settles the defaults that depend on it."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    logging.getLogger("specedit_kernels").setLevel(logging.ERROR)  # a fallback is a figure here
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.batch = args.batch or (60 if cuda else 4)
    args.text_length = args.text_length or model_family(args.model).default_length
    if args.size % 64:
        raise SystemExit(f"--size: expected a multiple of 64, got {args.size}")
    if cuda:
        torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    return device


def stopwatch():
    """A print that leads with the seconds since now."""
    started = time.perf_counter()
    return lambda text: print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)


def cell(value, decimals):
    return "–" if value is None or value != value else f"{value:.{decimals}f}"


def markdown_table(head, lines):
    """Markdown, its columns aligned: the first to the left, the others to the right."""
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    return "\n".join(text)


def write_text(path, text):
    """In one step: a reader sees the former file or the new one."""
    replace_file(path, lambda p: Path(p).write_text(text))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def jsonable(value):
    """nan and infinities as None, tensors as lists, at five significant digits."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        return jsonable(value.tolist())
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) != float("inf") and value == value else None
    return value


def edit_columns(edits, seeds):
    """What each edit is, for the records: lists by column."""
    return {
        "seed": seeds.tolist(),
        "kind": [KINDS[k] for k in edits.kind.tolist()],
        "task": [TASKS[t] for t in edits.task.tolist()],
        "unique": edits.unique().tolist(),
        "instruction": edits.phrases(),
    }
