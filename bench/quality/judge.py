# SPDX-License-Identifier: Apache-2.0
"""The judge: is the edit that was asked for the one that was made?

A small classifier looks at one crop of the output and names the object in its middle (60 objects, or none) and the
object's colour (its own, or one of the six that can be asked for). An edit is right if

* replace, add: the crop at the edit's place shows the new object;
* add without a place: the crop around the largest connected area that differs from the source shows the new object;
* remove: the crop where the object stood shows none;
* recolour: the crop shows the same object in the asked colour;
* a global edit: of the unedited source and the five global edits of it, the asked one is nearest in the colours of a
  12 x 12 reduction.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from scenes import GLOBAL_FACTORS, GLOBAL_OFFSETS, LOCAL_TASKS, NEW_SIZES, TASKS
from text import COLORS, GLOBALS, NAMES

CROP = 64  # pixels a side that the classifier sees
FRAME = 256  # pictures are reduced to this side before a crop is cut
MARGIN = 1.25  # a crop's side against the object's
NONE = len(NAMES)
OWN_COLOR = len(COLORS)
WEIGHTS = Path(__file__).parent / "data" / "judge.safetensors"
DIFFERENCE = 0.1  # of [0, 1]: what counts as changed when an object is looked for
SNOW_COVER = 0.06  # the mean share of the frame under flakes


class Judge(nn.Module):
    """Crops [n, 3, CROP, CROP] in [0, 1] -> (object logits [n, 61], colour logits [n, 7])."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for out, stride in ((24, 2), (48, 1), (64, 2), (96, 2), (128, 2), (128, 1)):
            layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.object = nn.Linear(width, len(NAMES) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)

    def forward(self, crops):
        features = self.body(crops * 2 - 1).mean((2, 3))
        return self.object(features), self.color(features)

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
    [n, 3, CROP, CROP]. What lies beyond the frame repeats its edge."""
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
    small = (edits.kind == 1)
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


@torch.no_grad()
def judge_edits(judge, edits, source, output):
    """[n] bool on the CPU: which outputs are right. source, output: [n, 3, H, H] in [0, 1]."""
    dev = next(judge.parameters()).device
    source, output = source.to(dev).float(), output.to(dev).float()
    task, new, subject = edits.task.to(dev), edits.new.to(dev), edits.subject.to(dev)
    found, any_change = found_boxes(source, output)
    is_open = task == TASKS.index("add_open")
    boxes = torch.where(is_open[:, None], found, known_boxes(edits).to(dev))
    objects, colors = (logits.argmax(1) for logits in judge(cut(output, boxes)))
    right = objects == new
    right &= ~is_open | any_change
    right = torch.where(task == TASKS.index("remove"), objects == NONE, right)
    recolored = (objects == subject) & (colors == edits.color.to(dev))
    right = torch.where(task == TASKS.index("recolor"), recolored, right)
    reduced = F.adaptive_avg_pool2d(output, 12)[:, None]
    nearest = (global_candidates(source) - reduced).square().mean((2, 3, 4)).argmin(1) - 1
    right = torch.where(task >= len(LOCAL_TASKS), nearest == task - len(LOCAL_TASKS), right)
    return right.cpu()
