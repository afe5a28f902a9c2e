# SPDX-License-Identifier: Apache-2.0
"""The judge: is the edit that was asked for the one that was made?

Where an instruction leaves the pose open, a small classifier looks at one crop of the output and names the object in
its middle (60 objects, or none); where there is one right answer, the output must be nearer to it than to every wrong
answer that could be drawn. An edit is right if

* replace, add: the crop at the edit's place shows the new object;
* add without a place: the crop around the largest connected area that differs from the source shows the new object;
* remove: the crop where the object stood shows none; or around its place the picture without it is nearest among that,
  the unedited source and the pictures with any other object in its pose (what is behind the object can only be
  guessed, so the second alone would be too much to ask);
* recolour: there, the object in the asked colour is nearest among that, the unedited source, the object in each other
  colour, no object, and each other object in its pose in the asked colour;
* a global edit: of the unedited source and the five global edits of it, the asked one is nearest in the colours of a
  12 x 12 reduction.

Nearest: by the squared error in RGB at 128 x 128 pixels.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scenes import GLOBAL_FACTORS, GLOBAL_OFFSETS, LOCAL_TASKS, NEW_SIZES, TASKS, Renderer, color_matrix
from text import COLORS, GLOBALS, NAMES
from torch import nn

CROP = 64  # pixels a side that the classifier sees
FRAME = 256  # pictures are reduced to this side before a crop is cut
MARGIN = 1.25  # a crop's side against the object's
NONE = len(NAMES)
WEIGHTS = Path(__file__).parent / "data" / "judge.safetensors"
DIFFERENCE = 0.1  # of [0, 1]: what counts as changed when an object is looked for
CANDIDATE_FRAME = 128  # pixels a side at which answers are compared
CANDIDATES_AT_ONCE = 128  # drawn together
SNOW_COVER = 0.06  # the mean share of the frame under flakes


class Judge(nn.Module):
    """Crops [n, 3, CROP, CROP] in [0, 1] -> object logits [n, 61]."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for out, stride in ((24, 2), (48, 1), (64, 2), (96, 2), (128, 2), (128, 1)):
            layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.object = nn.Linear(width, len(NAMES) + 1)

    def forward(self, crops):
        return self.object(self.body(crops * 2 - 1).mean((2, 3)))

    def save(self, path=WEIGHTS):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        halves = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous().cpu() for k, v in halves.items()}, path)

    @classmethod
    def load(cls, path=WEIGHTS):
        judge = cls()
        judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
        return judge.eval()


def cut(images, boxes):
    """images [n, 3, H, H] in [0, 1]; boxes [n, 3]: x, y of the centre and side, fractions of the frame ->
    [n, 3, CROP, CROP]. Beyond the frame its edge is repeated."""
    if images.shape[-1] != FRAME:
        images = F.interpolate(images.float(), size=(FRAME, FRAME), mode="area")
    boxes = boxes.to(images)
    zero = torch.zeros_like(boxes[:, 2])
    theta = torch.stack([boxes[:, 2], zero, 2 * boxes[:, 0] - 1, zero, boxes[:, 2], 2 * boxes[:, 1] - 1], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), (len(images), 3, CROP, CROP), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def known_boxes(edits):
    """[n, 3]: where the edited object stood, or for `add` the named place at the size of the largest new object."""
    subject = torch.stack([edits.x[:, 0], edits.y[:, 0], edits.size[:, 0] * MARGIN], 1)
    side = torch.full((len(edits),), NEW_SIZES[1])
    small = edits.kind == 1
    side = torch.where(small, torch.full_like(side, 0.28), side)  # a small object, and the jitter of its place
    place = torch.stack([edits.region[:, 0], edits.region[:, 1], side * 1.1], 1)
    return torch.where((edits.task == TASKS.index("add"))[:, None], place, subject)


def found_boxes(source, output, cells=64):
    """[n, 3] and [n] bool: the box of the largest connected area where two pictures differ, and if there is one."""
    difference = (source.float() - output.float()).abs().amax(1, keepdim=True)
    changed = (F.adaptive_avg_pool2d(difference, cells) > DIFFERENCE).float()
    # A cell between two changed ones joins them: thin parts of an object must not fall off.
    joined = F.max_pool2d(changed, 3, 1, 1)
    n = len(source)
    label = torch.arange(1, cells * cells + 1, device=source.device, dtype=torch.float32).view(1, 1, cells, cells)
    label = label * joined
    for _ in range(4 * cells):
        label = F.max_pool2d(label, 3, 1, 1) * joined
    flat = (label * changed).long().view(n, -1)
    counts = torch.zeros(n, cells * cells + 1, device=source.device).scatter_add_(1, flat, changed.view(n, -1))
    counts[:, 0] = 0
    best = counts.argmax(1)
    member = (flat == best[:, None]).view(n, cells, cells) & (best > 0).view(n, 1, 1)
    boxes = torch.full((n, 3), 0.5, device=source.device)
    axis = torch.arange(cells, device=source.device)
    for k, dim in ((0, 1), (1, 2)):  # x over columns, y over rows
        present = member.any(dim)  # [n, cells]
        low = torch.where(present, axis, cells).amin(1)
        high = torch.where(present, axis, -1).amax(1) + 1
        boxes[:, k] = (low + high) / 2 / cells
        boxes[:, 2] = torch.maximum(boxes[:, 2] * (k > 0), (high - low) / cells)
    boxes[:, 2] = (boxes[:, 2] * MARGIN).clamp(min=0.1)
    return boxes, best > 0


def global_candidates(source):
    """[n, 3, H, H] -> [n, 1 + len(GLOBALS), 3, 12, 12]: the source and its global edits, reduced."""
    out = [source]
    for name in GLOBALS:
        factor = source.new_tensor(GLOBAL_FACTORS[name]).view(1, 3, 1, 1)
        edited = (source * factor + GLOBAL_OFFSETS[name]).clamp(0, 1)
        if name == "snow":
            edited = edited * (1 - SNOW_COVER) + SNOW_COVER
        out.append(edited)
    return torch.stack([F.adaptive_avg_pool2d(x.float(), 12) for x in out], 1)


@lru_cache(maxsize=2)
def _renderer(device):
    return Renderer(device)


def answers(edits):
    """Of n edits that remove or recolour: the asked answer and the wrong ones, as edits [n * k], k; the asked one is
    the first of each k. Others may draw the same picture as the asked one."""
    n, total = len(edits), len(NAMES)
    subject, own = edits.subject, edits.matrix[:, 0]
    recolor = edits.task == TASKS.index("recolor")
    asked = torch.where(recolor[:, None, None], color_matrix(edits.color.clamp(min=0)), own)
    every = torch.arange(total).expand(n, total)
    colors = color_matrix(torch.arange(len(COLORS))).expand(n, -1, 3, 4)
    after = torch.cat(
        [
            torch.where(recolor, subject, -1)[:, None],
            torch.where(recolor, -1, subject)[:, None],
            subject[:, None],
            subject[:, None].expand(n, len(COLORS)),
            every,
        ],
        1,
    )
    matrix = torch.cat([asked[:, None], own[:, None], own[:, None], colors, asked[:, None].expand(n, total, 3, 4)], 1)
    k = after.shape[1]
    drawn = edits[torch.arange(n).repeat_interleave(k)]
    return replace(drawn, after=after.flatten(), after_matrix=matrix.flatten(0, 1)), k


def nearest_is_asked(edits, output, held_out):
    """[n] bool: of `answers`, the asked one is nearest to `output` [n, 3, H, H] around the object's place."""
    dev = output.device
    drawn, k = answers(edits)
    frame = CANDIDATE_FRAME
    reduced = F.interpolate(output, size=(frame, frame), mode="area")
    boxes = known_boxes(edits).to(dev)
    axis = (torch.arange(frame, device=dev) + 0.5) / frame
    near = (axis[None, None] - boxes[:, :2, None]).abs() <= boxes[:, 2, None, None] / 2  # [n, (x, y), frame]
    box = (near[:, 1, :, None] & near[:, 0, None, :]).float()
    error = []
    for part in torch.arange(len(drawn)).split(CANDIDATES_AT_ONCE):
        target = _renderer(dev)(drawn[part], frame, held_out=held_out).target
        of = (part // k).to(dev)
        error.append(((target - reduced[of]).square().mean(1) * box[of]).sum((1, 2)))
    error = torch.cat(error).view(-1, k)
    return error[:, 0] <= error.amin(1) * (1 + 1e-5)  # the asked one may be drawn twice, with other rounding


@torch.no_grad()
def judge_edits(judge, edits, source, output, held_out=True):
    """[n] bool on the CPU: which outputs are right. source, output: [n, 3, H, H] in [0, 1]. held_out: of which
    photographs `edits` speaks."""
    dev = next(judge.parameters()).device
    source, output = source.to(dev).float(), output.to(dev).float()
    task, new = edits.task.to(dev), edits.new.to(dev)
    found, any_change = found_boxes(source, output)
    is_open = task == TASKS.index("add_open")
    boxes = torch.where(is_open[:, None], found, known_boxes(edits).to(dev))
    shown = judge(cut(output, boxes)).argmax(1)
    right = (shown == new) & (~is_open | any_change)
    one = torch.isin(edits.task, torch.tensor([TASKS.index("remove"), TASKS.index("recolor")]))
    if one.any():
        rows = one.nonzero()[:, 0]
        nearest = nearest_is_asked(edits[rows], output[rows.to(dev)], held_out)
        removed = (task == TASKS.index("remove")) & (shown == NONE)
        right[rows.to(dev)] = nearest | removed[rows.to(dev)]
    reduced = F.adaptive_avg_pool2d(output, 12)[:, None]
    nearest = (global_candidates(source) - reduced).square().mean((2, 3, 4)).argmin(1) - 1
    right = torch.where(task >= len(LOCAL_TASKS), nearest == task - len(LOCAL_TASKS), right)
    return right.cpu()
