# SPDX-License-Identifier: Apache-2.0
"""Edits with known answers: a picture, an instruction, the edited picture and the exact mask of what changed.

A scene is a photograph or a procedural texture with one to three objects on it. `sample` draws the parameters of a
batch of edits on the CPU from a seed; `Renderer` draws the pixels of the same edits at any size on any device. What a
new object looks like is open: its rotation, size, flip and hue are random, its place too where the instruction names
none, and so are the flakes of snow. So the target is one sample of many right answers, except where `unique` is set.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from text import COLORS, GLOBALS, NAMES, PLACES, caption, phrase

DATA = Path(__file__).parent / "data"
TOKEN = 16  # pixels a side that one token of the editor covers
SLOTS = 4  # three objects of the scene and one to come
LOCAL_TASKS = ("replace", "remove", "recolor", "add", "add_open")
TASKS = (*LOCAL_TASKS, *GLOBALS)
TASK_SHARES = dict(zip(TASKS, (0.30, 0.13, 0.16, 0.14, 0.13, 0.03, 0.02, 0.02, 0.02, 0.05)))
KINDS = ("local", "small", "ambiguous", "global")
UNIQUE = ("remove", "recolor", "night", "warm", "cold", "green")  # one right answer

PLACE_CENTERS = torch.tensor([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73), (0.5, 0.5)])  # x, y
PLACE_JITTER = 0.04
NEW_SIZES = (0.28, 0.45)  # of the frame, for an object without a predecessor
SMALL_SIZES = (0.15, 0.21)
SCALE_RANGE = (0.75, 1.25)  # a new object against the one that it replaces
ROTATION = 0.6  # radians, either way
HUE = 0.6  # radians of the YIQ colour circle, either way
COLOR_VALUES = torch.tensor(
    [
        (0.95, 0.10, 0.10),
        (1.0, 0.85, 0.05),
        (0.10, 0.75, 0.15),
        (0.10, 0.35, 1.0),
        (0.60, 0.15, 0.85),
        (0.62, 0.62, 0.62),
    ]
)
LUMA = torch.tensor([0.299, 0.587, 0.114])
GRAY = 0.12  # how far a colour is from its own gray at least, to be called anything else
# Light's factor per channel, and what is added.
GLOBAL_FACTORS = {
    "night": (0.22, 0.28, 0.48),
    "warm": (1.15, 0.85, 0.45),
    "cold": (0.50, 0.85, 1.20),
    "green": (0.55, 1.10, 0.55),
    "snow": (0.80, 0.82, 0.86),
}
GLOBAL_OFFSETS = {"night": 0.0, "warm": 0.05, "cold": 0.05, "green": 0.0, "snow": 0.14}
SNOW_BANK = 32
CHANGED = 0.02  # a pixel has changed if a channel differs by more, of [0, 1]
TOKEN_SHARE = 0.02  # a token has changed if a larger share of its pixels has


def _uniform(generator, shape, low, high):
    return torch.rand(shape, generator=generator) * (high - low) + low


def hue_matrix(angle):
    """[n] radians -> [n, 3, 3]: a rotation about the luma axis in YIQ."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq


def color_matrix(color):
    """[n] indices into COLORS -> [n, 3, 4] on (r, g, b, alpha), premultiplied: the colour at the object's own luma."""
    value = COLOR_VALUES[color]  # [n, 3]
    return torch.cat([value[:, :, None] * LUMA * 0.8, value[:, :, None] * 0.3], dim=2)


@dataclass
class Edits:
    """The parameters of n edits, all on the CPU. Positions and sizes are fractions of the frame, angles radians."""

    task: torch.Tensor  # [n] index into TASKS
    kind: torch.Tensor  # [n] index into KINDS
    slot: torch.Tensor  # [n] the edited slot
    subject: torch.Tensor  # [n] object index: A, or -1
    new: torch.Tensor  # [n] object index: B, or -1
    color: torch.Tensor  # [n] or -1
    place: torch.Tensor  # [n] or -1
    variant: torch.Tensor  # [n] which phrasing
    object: torch.Tensor  # [n, SLOTS] object index or -1
    x: torch.Tensor  # [n, SLOTS]
    y: torch.Tensor
    size: torch.Tensor
    rotation: torch.Tensor
    flip: torch.Tensor  # [n, SLOTS] bool
    matrix: torch.Tensor  # [n, SLOTS, 3, 4]
    after: torch.Tensor  # [n] object index in the edited slot afterwards, or -1
    after_pose: torch.Tensor  # [n, 4]: x, y, size, rotation
    after_flip: torch.Tensor  # [n] bool
    after_matrix: torch.Tensor  # [n, 3, 4]
    region: torch.Tensor  # [n, 3]: x, y, radius of a disc that holds every right answer's new object; radius 0: none
    photo: torch.Tensor  # [n] index, or -1 for a texture
    crop: torch.Tensor  # [n, 4]: scale, x, y of the centre in [-1, 1] units of what is free, flip +-1
    gradient: torch.Tensor  # [n, 7]: two colours, angle
    noise: torch.Tensor  # [n, 3, 5, 5]
    stripes: torch.Tensor  # [n, 5]: frequency (0: none), angle, amplitudes of r, g, b
    snow: torch.Tensor  # [n, 3]: index, shift x, shift y

    def __len__(self):
        return len(self.task)

    def __getitem__(self, index):
        return Edits(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def cat(parts):
        return Edits(**{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])})

    def phrases(self):
        """The n instructions."""

        def name(i):
            return NAMES[i] if i >= 0 else None

        rows = zip(*(v.tolist() for v in (self.task, self.variant, self.subject, self.new, self.color, self.place)))
        return [
            phrase(
                TASKS[task],
                variant,
                a=name(a),
                b=name(b),
                c=COLORS[c] if c >= 0 else None,
                p=PLACES[p] if p >= 0 else None,
            )
            for task, variant, a, b, c, p in rows
        ]

    def instructions(self):
        """The n instructions, each as the one text of its edit."""
        return [(text,) for text in self.phrases()]

    def captions(self):
        """n pairs: what the source shows, and what the target of a local edit does.

        Each object by its name, its colour where a recolouring gave it one, and the nearest place; a texture by the
        nearest hue, a photograph by none."""
        place = torch.stack([self.x, self.y], 2)[:, :, None].sub(PLACE_CENTERS).norm(dim=3).argmin(2)
        after_place = self.after_pose[:, None, :2].sub(PLACE_CENTERS).norm(dim=2).argmin(1)
        mean = (self.gradient[:, :3] + self.gradient[:, 3:6]) / 2
        tint, tints = (x - x.mean(-1, keepdim=True) for x in (mean, COLOR_VALUES))
        hue = F.cosine_similarity(tint[:, None], tints, dim=2).argmax(1)
        background = torch.where(tint.norm(dim=1) < GRAY, COLORS.index("gray"), hue)
        background = torch.where(self.photo < 0, background, -1)
        rows = (background, self.object, place, self.slot, self.after, after_place, self.color)
        found = []
        for ground, objects, places, slot, after, spot, color in zip(*(x.tolist() for x in rows)):
            ground = COLORS[ground] if ground >= 0 else None
            before = [(o, -1, p) for o, p in zip(objects, places)]
            behind = [*before[:slot], (after, color, spot), *before[slot + 1 :]]
            found.append(
                tuple(
                    caption(
                        ground, [(NAMES[o], COLORS[c] if c >= 0 else None, PLACES[p]) for o, c, p in each if o >= 0]
                    )
                    for each in (before, behind)
                )
            )
        return found

    def unique(self):
        """[n] bool: one right answer."""
        table = torch.tensor([task in UNIQUE for task in TASKS])
        return table[self.task]


@lru_cache(maxsize=2)
def photo_files(held_out):
    return json.loads((DATA / "photos.json").read_text())["held_out" if held_out else "train"]


def sample(n, generator, held_out=False, tasks=None, small=None, every_pairing=False):
    """n edits. tasks: [n] indices into TASKS (default: drawn by TASK_SHARES); small: bool, the edited object is small
    (default: one in five is). held_out: only pairings (replaced and new object, object and colour, object removed
    or added and another one of the scene) and photographs that training never sees; else never those.
    every_pairing: any pairing, with the photographs of training: what the judge learns from."""
    g = generator
    total = len(NAMES)
    if tasks is None:
        tasks = torch.multinomial(torch.tensor(list(TASK_SHARES.values())), n, replacement=True, generator=g)
    is_ = {name: tasks == TASKS.index(name) for name in TASKS}
    adding = is_["add"] | is_["add_open"]
    whole = tasks >= len(LOCAL_TASKS)
    small_edit = torch.rand(n, generator=g) < 0.2 if small is None else torch.full((n,), bool(small))

    # Objects: slot 0 is the subject of an edit; b = a + d, where the multiples of ten are held out.
    first = torch.randint(total, (n,), generator=g)
    tens = torch.randint(1, total // 10, (n,), generator=g) * 10
    others = torch.randint(0, total // 10, (n,), generator=g) * 10 + torch.randint(1, 10, (n,), generator=g)
    apart = torch.where(torch.rand(n, generator=g) < 0.1, tens, others) if every_pairing else others
    partner = (first + (tens if held_out else apart)) % total
    third = torch.randint(total, (n,), generator=g)
    for _ in range(total):  # distinct objects, so that a name is unambiguous
        clash = (third == first) | (third == partner)
        if not clash.any():
            break
        third = torch.where(clash, (third + 1) % total, third)
    count = torch.multinomial(torch.tensor([0.35, 0.4, 0.25]), n, replacement=True, generator=g) + 1
    # Something to stay behind, so that a pairing is held out.
    count = torch.where(is_["remove"], count.clamp(min=2), count)
    objects = torch.full((n, SLOTS), -1)
    objects[:, 0] = first
    second = torch.where(is_["remove"], partner, third)
    last = torch.where(is_["remove"], third, torch.full_like(third, -1))
    objects[:, 1] = torch.where(count >= 2, second, -1)
    fourth = (third + torch.randint(1, total, (n,), generator=g)) % total
    distinct = (fourth != first) & (fourth != partner) & (fourth != third)
    objects[:, 2] = torch.where((count == 3) & distinct, torch.where(is_["remove"], last, fourth), -1)
    slot = torch.where(adding, 3, 0)

    limits = torch.tensor([(0.30, 0.50), (0.28, 0.45), (0.25, 0.36)])[(objects >= 0).sum(1) - 1]  # [n, 2]
    size = limits[:, :1] + torch.rand((n, SLOTS), generator=g) * (limits[:, 1:] - limits[:, :1])
    tiny = _uniform(g, (n, SLOTS), *SMALL_SIZES)
    chance = torch.rand((n, SLOTS), generator=g) < 0.2
    chance[:, 0] = small_edit & ~adding & ~whole
    size = torch.where(chance, tiny, size)
    new_size = torch.where(small_edit, _uniform(g, (n,), *SMALL_SIZES), _uniform(g, (n,), *NEW_SIZES))

    # Places: each object takes the freest of 16 tries, a named place counts as taken from the start.
    place = torch.where(is_["add"], torch.randint(len(PLACES), (n,), generator=g), -1)
    taken_x, taken_y, taken_r = [PLACE_CENTERS[place, 0]], [PLACE_CENTERS[place, 1]], [new_size * is_["add"] / 2]
    xs, ys = [], []

    def settle(sides, present):
        free = 1 - sides * 0.95
        tx = 0.5 + _uniform(g, (n, 16), -0.5, 0.5) * free[:, None]
        ty = 0.5 + _uniform(g, (n, 16), -0.5, 0.5) * free[:, None]
        gap = torch.full((n, 16), 9.0)
        for ox, oy, radius in zip(taken_x, taken_y, taken_r):
            distance = torch.hypot(tx - ox[:, None], ty - oy[:, None]) - (radius + sides / 2)[:, None]
            gap = torch.where(radius[:, None] > 0, torch.minimum(gap, distance), gap)
        # Any try without overlap is as good as another: else objects would flee to the corners.
        pick = gap.clamp(max=0.0).argmax(1, keepdim=True)
        x, y = tx.gather(1, pick)[:, 0], ty.gather(1, pick)[:, 0]
        taken_x.append(x)
        taken_y.append(y)
        taken_r.append(sides * present / 2)
        return x, y

    for k in range(3):
        x, y = settle(size[:, k], objects[:, k] >= 0)
        xs.append(x)
        ys.append(y)
    x, y = settle(new_size, is_["add_open"])
    xs.append(x)
    ys.append(y)
    x, y = torch.stack(xs, 1), torch.stack(ys, 1)

    rotation = _uniform(g, (n, SLOTS), -ROTATION, ROTATION)
    flip = torch.rand((n, SLOTS), generator=g) < 0.5
    matrix = torch.zeros(n, SLOTS, 3, 4)
    matrix[..., :3] = hue_matrix(_uniform(g, (n * SLOTS,), -HUE, HUE)).view(n, SLOTS, 3, 3)

    # What stands in the edited slot afterwards.
    color = torch.where(is_["recolor"], 0, -1)
    own = first % len(COLORS)  # the held-out colour of an object
    shift = torch.randint(0 if every_pairing else 1, len(COLORS), (n,), generator=g)
    color = torch.where(color >= 0, own if held_out else (own + shift) % len(COLORS), color)
    after = torch.where(is_["remove"], -1, torch.where(is_["replace"] | adding, partner, first))
    scale = _uniform(g, (n,), *SCALE_RANGE)
    new_rotation = _uniform(g, (n,), -ROTATION, ROTATION)
    jitter = _uniform(g, (n, 2), -PLACE_JITTER, PLACE_JITTER)
    pose = torch.stack([x[:, 0], y[:, 0], size[:, 0], rotation[:, 0]], 1)
    replaced = torch.stack([x[:, 0] + jitter[:, 0], y[:, 0] + jitter[:, 1], size[:, 0] * scale, new_rotation], 1)
    placed = torch.cat([PLACE_CENTERS[place] + jitter, new_size[:, None], new_rotation[:, None]], 1)
    free = torch.stack([x[:, 3], y[:, 3], new_size, new_rotation], 1)
    after_pose = torch.where(is_["replace"][:, None], replaced, pose)
    after_pose = torch.where(is_["add"][:, None], placed, after_pose)
    after_pose = torch.where(is_["add_open"][:, None], free, after_pose)
    fresh = is_["replace"] | adding
    after_flip = torch.where(fresh, torch.rand(n, generator=g) < 0.5, flip[:, 0])
    new_matrix = torch.zeros(n, 3, 4)
    new_matrix[..., :3] = hue_matrix(_uniform(g, (n,), -HUE, HUE))
    after_matrix = torch.where(fresh[:, None, None], new_matrix, matrix[:, 0])
    after_matrix = torch.where(is_["recolor"][:, None, None], color_matrix(color.clamp(min=0)), after_matrix)

    # 0.55 of the cell's side holds the sprites in any rotation but for a few corners.
    reach = torch.where(is_["replace"], size[:, 0] * SCALE_RANGE[1], torch.full((n,), NEW_SIZES[1]) * is_["add"])
    around = torch.where(is_["add"][:, None], PLACE_CENTERS[place], torch.stack([x[:, 0], y[:, 0]], 1))
    radius = (reach * 0.55 + PLACE_JITTER) * (reach > 0)
    region = torch.cat([around, radius[:, None]], 1)

    kind = torch.zeros(n, dtype=torch.long)
    kind[small_edit] = KINDS.index("small")
    kind[is_["add_open"]] = KINDS.index("ambiguous")
    kind[whole] = KINDS.index("global")

    photos = len(photo_files(held_out))
    photo_share = 1.0 if held_out else 0.6
    photo = torch.where(torch.rand(n, generator=g) < photo_share, torch.randint(photos, (n,), generator=g), -1)
    crop = torch.cat(
        [_uniform(g, (n, 1), 0.6, 1.0), _uniform(g, (n, 2), -1, 1), torch.randint(2, (n, 1), generator=g) * 2.0 - 1], 1
    )
    gradient = torch.cat([torch.rand((n, 6), generator=g), _uniform(g, (n, 1), 0, 2 * math.pi)], 1)
    noise = torch.randn((n, 3, 5, 5), generator=g) * _uniform(g, (n, 1, 1, 1), 0.0, 0.12)
    stripes = torch.cat(
        [
            _uniform(g, (n, 1), 3, 20) * (torch.rand((n, 1), generator=g) < 0.35),
            _uniform(g, (n, 1), 0, math.pi),
            _uniform(g, (n, 3), -0.15, 0.15),
        ],
        1,
    )
    snow = torch.cat([torch.randint(SNOW_BANK, (n, 1), generator=g).float(), _uniform(g, (n, 2), -1, 1)], 1)
    none = torch.full((n,), -1)
    return Edits(
        task=tasks,
        kind=kind,
        slot=slot,
        subject=torch.where(adding | whole, none, first),
        new=torch.where(fresh, partner, none),
        color=color,
        place=place,
        variant=torch.randint(3, (n,), generator=g),
        object=objects,
        x=x,
        y=y,
        size=size,
        rotation=rotation,
        flip=flip,
        matrix=matrix,
        after=after,
        after_pose=after_pose,
        after_flip=after_flip,
        after_matrix=after_matrix,
        region=region,
        photo=photo,
        crop=crop,
        gradient=gradient,
        noise=noise,
        stripes=stripes,
        snow=snow,
    )


@dataclass
class Rendered:
    """Pixels of n edits, [0, 1]; masks are exact."""

    source: torch.Tensor  # [n, 3, H, H]
    target: torch.Tensor  # [n, 3, H, H]
    mask: torch.Tensor  # [n, H, H] bool: pixels that differ
    tokens: torch.Tensor  # [n, H/16, H/16] bool: tokens that differ
    weight: torch.Tensor  # [n, H/16, H/16] loss weights, a function of source and instruction alone


def _pyramid(bank, levels):
    out = [bank]
    for _ in range(levels - 1):
        out.append(F.avg_pool2d(out[-1], 2))
    return out


class Renderer:
    """Draws edits. One bank of sprites, photographs and flakes on `device`, at three resolutions each."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        spec = json.loads((DATA / "sprites.json").read_text())
        atlas = np.asarray(Image.open(DATA / "sprites.png").convert("RGBA"), dtype=np.float32) / 255
        cell, columns = spec["cell"], spec["columns"]
        sprites = np.stack(
            [atlas[i // columns * cell :, i % columns * cell :][:cell, :cell] for i in range(len(spec["names"]))]
        )
        sprites[..., :3] *= sprites[..., 3:]  # premultiplied, so that scaling does not bleed the background in
        self.sprites = _pyramid(torch.from_numpy(sprites).permute(0, 3, 1, 2).contiguous().to(self.device), 3)
        self.photos = {}
        for held_out in (False, True):
            files = [Image.open(DATA / "photos" / name).convert("RGB") for name in photo_files(held_out)]
            stack = torch.from_numpy(np.stack([np.asarray(f) for f in files])).permute(0, 3, 1, 2)
            levels = _pyramid(stack.float().to(self.device) / 255, 3)
            self.photos[held_out] = [level.half() if self.device.type == "cuda" else level for level in levels]
        g = torch.Generator().manual_seed(7)
        large = (torch.rand(SNOW_BANK, 1, 48, 48, generator=g) > 0.97).float()
        fine = (torch.rand(SNOW_BANK, 1, 96, 96, generator=g) > 0.98).float()
        flakes = sum(F.interpolate(layer, size=(512, 512), mode="bicubic") for layer in (large, fine))
        self.snow = _pyramid(((flakes - 0.25) * 2).clamp(0, 1).to(self.device), 3)
        local = len(LOCAL_TASKS)
        self.factor = torch.tensor([(1.0, 1.0, 1.0)] * local + [GLOBAL_FACTORS[t] for t in GLOBALS]).to(self.device)
        self.offset = torch.tensor([0.0] * local + [GLOBAL_OFFSETS[t] for t in GLOBALS]).to(self.device)

    @staticmethod
    def _level(size):
        """Which level of a pyramid suits a frame of `size` pixels."""
        return 0 if size >= 512 else 1 if size >= 256 else 2

    def _layers(self, objects, x, y, size, rotation, flip, matrix, frame):
        """[m] objects -> premultiplied [m, 4, frame, frame]."""
        bank = self.sprites[self._level(frame)]
        cos, sin = rotation.cos() / size, rotation.sin() / size
        mirror = torch.where(flip, -1.0, 1.0)
        cx, cy = 2 * x - 1, 2 * y - 1
        theta = torch.stack(
            [mirror * cos, mirror * sin, -mirror * (cos * cx + sin * cy), -sin, cos, sin * cx - cos * cy], -1
        ).view(-1, 2, 3)
        grid = F.affine_grid(theta, (len(objects), 4, frame, frame), align_corners=False)
        drawn = F.grid_sample(bank[objects.clamp(min=0)], grid, align_corners=False)
        drawn = drawn * (objects >= 0).view(-1, 1, 1, 1)
        rgb = torch.einsum("mij,mjhw->mihw", matrix, drawn)
        alpha = drawn[:, 3:]
        return torch.cat([torch.minimum(rgb.clamp(min=0), alpha), alpha], 1)

    def _background(self, e, frame, held_out):
        n = len(e)
        axis = (torch.arange(frame, device=self.device) + 0.5) / frame * 2 - 1
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        angle = e.gradient[:, 6].view(-1, 1, 1)
        ramp = (0.5 + 0.35 * (angle.cos() * u + angle.sin() * v)).clamp(0, 1)[:, None]
        first, second = e.gradient[:, :3].view(n, 3, 1, 1), e.gradient[:, 3:6].view(n, 3, 1, 1)
        texture = first * (1 - ramp) + second * ramp
        texture = texture + F.interpolate(e.noise, size=(frame, frame), mode="bicubic", align_corners=False)
        turn = e.stripes[:, 1].view(-1, 1, 1)
        wave = ((turn.cos() * u + turn.sin() * v) * e.stripes[:, 0].view(-1, 1, 1) * math.pi).sin()[:, None]
        texture = texture + wave * 2.5 * e.stripes[:, 2:].view(n, 3, 1, 1) * (e.stripes[:, :1].view(n, 1, 1, 1) > 0)
        scale = e.crop[:, 0]
        free = 1 - scale
        zero = torch.zeros_like(scale)
        theta = torch.stack(
            [scale * e.crop[:, 3], zero, free * e.crop[:, 1], zero, scale, free * e.crop[:, 2]], -1
        ).view(-1, 2, 3)
        bank = self.photos[held_out][self._level(frame)]
        grid = F.affine_grid(theta, (n, 3, frame, frame), align_corners=False)
        photo = F.grid_sample(bank[e.photo.clamp(min=0)].float(), grid, align_corners=False, padding_mode="border")
        return torch.where((e.photo >= 0).view(-1, 1, 1, 1), photo, texture).clamp(0, 1)

    @torch.no_grad()
    def __call__(self, edits, size, held_out=False):
        """Rendered; `size` is the side in pixels, a multiple of 16. held_out: of which photographs `edits` speaks."""
        # Decided on the CPU: to ask the device would wait for all that it has still to do.
        any_global = bool((edits.task >= len(LOCAL_TASKS)).any())
        e = Edits(**{name: value.to(self.device, non_blocking=True) for name, value in vars(edits).items()})
        n = len(e)

        def column(before, after):
            return torch.cat([before, after[:, None]], 1).flatten(0, 1)

        pose = e.after_pose
        layers = self._layers(
            column(e.object, e.after),
            column(e.x, pose[:, 0]),
            column(e.y, pose[:, 1]),
            column(e.size, pose[:, 2]),
            column(e.rotation, pose[:, 3]),
            column(e.flip, e.after_flip),
            column(e.matrix, e.after_matrix),
            size,
        ).view(n, SLOTS + 1, 4, size, size)
        source = self._background(e, size, held_out)
        target = source
        for k in range(SLOTS):
            layer = layers[:, k]
            edited = torch.where((e.slot == k).view(-1, 1, 1, 1), layers[:, SLOTS], layer)
            source = source * (1 - layer[:, 3:]) + layer[:, :3]
            target = target * (1 - edited[:, 3:]) + edited[:, :3]
        if any_global:
            target = self._globals(e, source, target, size)
        target = target.clamp(0, 1)
        mask = (source - target).abs().amax(1) > CHANGED
        tokens = F.avg_pool2d(mask[:, None].float(), TOKEN)[:, 0] > TOKEN_SHARE
        return Rendered(source, target, mask, tokens, self._weight(e, layers[:, 0, 3], size))

    def _globals(self, e, source, target, size):
        whole = e.task >= len(LOCAL_TASKS)
        lit = source * self.factor[e.task].view(-1, 3, 1, 1) + self.offset[e.task].view(-1, 1, 1, 1)
        theta = torch.zeros(len(e), 2, 3, device=self.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1
        theta[:, :, 2] = e.snow[:, 1:]
        grid = F.affine_grid(theta, (len(e), 1, size, size), align_corners=False)
        flakes = F.grid_sample(
            self.snow[self._level(size)][e.snow[:, 0].long()], grid, align_corners=False, padding_mode="reflection"
        )
        flakes = flakes * (e.task == TASKS.index("snow")).view(-1, 1, 1, 1) * 0.95
        lit = lit.clamp(0, 1) * (1 - flakes) + flakes
        return torch.where(whole.view(-1, 1, 1, 1), lit, target)

    def _weight(self, e, subject_alpha, size):
        """1 + 3 where the edit may reach. It must not depend on the random target, or the weights would teach the
        model that something stands wherever it may; so open places and global edits weigh 2 all over."""
        cells = size // TOKEN
        axis = (torch.arange(cells, device=self.device) + 0.5) / cells
        distance = torch.hypot(
            axis[None, None, :] - e.region[:, 0].view(-1, 1, 1), axis[None, :, None] - e.region[:, 1].view(-1, 1, 1)
        )
        disc = distance < (e.region[:, 2] + 0.5 / cells).view(-1, 1, 1)
        disc &= (e.region[:, 2] > 0).view(-1, 1, 1)
        own = F.avg_pool2d(subject_alpha[:, None], TOKEN)[:, 0] > TOKEN_SHARE
        reach = disc | (own & (e.subject >= 0).view(-1, 1, 1))
        open_place = (e.task >= TASKS.index("add_open")).view(-1, 1, 1)
        return torch.where(open_place, torch.full_like(distance, 2.0), 1.0 + 3.0 * reach)


EVALUATION_COUNTS = {"local": 200, "small": 60, "ambiguous": 60, "global": 40}
EVALUATION_SEED = 20_240_229


def evaluation_set(counts=None, seed=EVALUATION_SEED):
    """The held-out edits: `counts` of each kind, in the order of KINDS, the same for ever.

    local: large objects, a place that is known (replace, remove, recolour, add at a named place, in equal parts);
    small: the same four with objects of .15 to .21 of the frame; ambiguous: add without a place; global: the five
    global edits in equal parts. Edits whose answer could hardly be seen are drawn again: a recolouring that changes
    the object by less than .15 on average, a subject covered by more than a tenth by another object's circle.
    """
    counts = dict(EVALUATION_COUNTS if counts is None else counts)
    unknown = set(counts) - set(KINDS)
    if unknown:
        raise ValueError(f"counts: expected keys of {KINDS}, got {sorted(unknown)}")
    named = ("replace", "remove", "recolor", "add")
    tasks_of = {"local": named, "small": named, "ambiguous": ("add_open",), "global": GLOBALS}
    renderer = Renderer("cpu")
    parts = []
    for kind in KINDS:
        wanted = counts.get(kind, 0)
        generator = torch.Generator().manual_seed(seed + KINDS.index(kind))
        names = tasks_of[kind]
        for k, task in enumerate(names):
            share = wanted // len(names) + (k < wanted % len(names))
            if share == 0:
                continue
            pool = share * 4 + 16
            edits = sample(
                pool, generator, held_out=True, tasks=torch.full((pool,), TASKS.index(task)), small=kind == "small"
            )
            keep = _visible(edits, renderer)
            if int(keep.sum()) < share:
                raise RuntimeError(f"{int(keep.sum())} of {pool} drawn {task} edits are visible, {share} are wanted")
            parts.append(edits[keep.nonzero()[:share, 0]])
    return Edits.cat(parts)


def _visible(edits, renderer):
    """[n] bool, judged on 64-pixel renderings."""
    keep = []
    for part in torch.arange(len(edits)).split(64):
        chunk = edits[part]
        rendered = renderer(chunk, 64, held_out=True)
        changed = (rendered.source - rendered.target).abs().mean(1)
        strength = (changed * rendered.mask).sum((1, 2)) / rendered.mask.sum((1, 2)).clamp(min=1)
        keep.append((strength > torch.where(chunk.task == TASKS.index("recolor"), 0.15, 0.05)) & ~_crowded(chunk))
    return torch.cat(keep)


def _crowded(e):
    """[n] bool: the edited object's circle overlaps another object's by a tenth of its radius or more."""
    subject = e.slot == 0
    before = torch.stack([e.x[:, 0], e.y[:, 0], e.size[:, 0]], 1)
    after = e.after_pose[:, :3]
    crowded = torch.zeros(len(e), dtype=torch.bool)
    for pose, present in ((before, subject), (after, e.after >= 0)):
        for k in range(1, 3):
            gap = torch.hypot(pose[:, 0] - e.x[:, k], pose[:, 1] - e.y[:, k]) - (pose[:, 2] + e.size[:, k]) / 2
            crowded |= present & (e.object[:, k] >= 0) & (gap < -0.05 * pose[:, 2])
        gap = torch.hypot(pose[:, 0] - e.x[:, 0], pose[:, 1] - e.y[:, 0]) - (pose[:, 2] + e.size[:, 0]) / 2
        crowded |= ~subject & present & (gap < -0.05 * pose[:, 2])
    return crowded & (e.task < len(LOCAL_TASKS))
