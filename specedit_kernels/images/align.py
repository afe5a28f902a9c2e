# SPDX-License-Identifier: Apache-2.0
"""Drift: placement and colours of an editor's output against its source, estimated outside the edit, and its undoing.

Editors give back pictures that are moved, zoomed or recoloured by a little, and of another size. `estimate_drift` finds
a scale and a shift of each axis and a gain and an offset of each colour; `align` brings the output back.

Phase correlation of the whole picture at a few zooms, then of blocks with a consensus among them (blocks of the edit
do not agree with the rest), then least squares on all pixels that agree, at rising resolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .resample import resample

BASE_SIDE = 1024  # the longer side, up to twice that, at which a large picture is compared
COARSE_SIDE = 256  # at most that at which zooms are tried
ZOOMS = (0.94, 0.97, 1.0, 1.03, 1.06)
ASPECT_TOLERANCE = 0.002
LARGEST_ZOOM = 0.12  # further from a placement than that is no drift
BLOCK = 32
TEXTURE = 0.006  # RMS contrast of a block, of 1, under which it says nothing
NEAR = 0.75  # pixels of a level: blocks that depart less from the fit agree with it
LEAST_AGREEING = 0.3  # share of the blocks with texture
LEAST_BLOCKS = 6
MANY_PIXELS = 2**19  # of a level: with more, blocks side by side are enough to tell which pixels agree
COLOUR_SAMPLES = 8192
LEAST_GAIN = 0.05  # share of the difference that an alignment has to take away to be one
SMALLEST_MOVE = 0.2  # pixels, of the coarser picture, at its corners: less is none
SMALLEST_COLOUR = 0.006  # of 1, at black or white: less is none


@dataclass(frozen=True)
class Drift:
    """Placement of an edited picture on its source, and its colours.

    source_size, edited_size: (width, height) in pixels. scale: (x, y), the size of what is seen, over what a plain
    resize of the edited picture to the source's size gives. shift: (x, y), how far the picture's middle moved in that
    resize, in pixels of the source. gain, offset: of each channel; edited = gain * source + offset, in [0, 1].
    inliers: share of the blocks with texture that agree. residual: their RMS distance from the fit, in pixels of the
    source. found: whether enough of them agree; if not, scale, shift, gain and offset are those of no drift.
    """

    source_size: tuple[int, int]
    edited_size: tuple[int, int]
    shift: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    inliers: float = 0.0
    residual: float = 0.0
    found: bool = False

    @property
    def moved(self) -> bool:
        """Whether the edited picture is placed otherwise than by a plain resize."""
        return self.shift != (0.0, 0.0) or self.scale != (1.0, 1.0)

    @property
    def recoloured(self) -> bool:
        return any(g != 1.0 for g in self.gain) or any(o != 0.0 for o in self.offset)

    @property
    def same_aspect(self) -> bool:
        """Whether the two sizes have one aspect within .2 %, or within the rounding to whole pixels."""
        return _same_aspect(self.source_size, self.edited_size)

    def placement(self) -> tuple[Sequence[float], Sequence[float]]:
        """(scale, shift), (x, y) each: the point p of the source is at p * scale + shift of the edited picture."""
        pairs = list(zip(self.source_size, self.edited_size, self.scale, self.shift))
        scale = tuple(e / s * k for s, e, k, _ in pairs)
        shift = tuple(e / 2 + e / s * (d - k * s / 2) for s, e, k, d in pairs)
        return scale, shift

    def describe(self) -> str:
        """What was found, in one line."""
        (ws, hs), (we, he) = self.source_size, self.edited_size
        parts = []
        stretched = True
        if self.source_size != self.edited_size:
            parts.append(f"{we} x {he} for {ws} x {hs}")
            if not self.same_aspect:
                other = abs(we * hs / (he * ws) - 1)
                (ax, ay), (bx, by) = self.placement()
                stretched = not self.found or abs(ax / ay - 1) > other / 2
                how = "stretched"
                if not stretched:
                    cut, padded = (any(sign * (k - 1) > 0.004 for k in self.scale) for sign in (1, -1))
                    how = "cut and padded" if cut and padded else ("cropped" if cut else "with a border")
                    how += f", the source from ({bx:.1f}, {by:.1f}) to ({ax * ws + bx:.1f}, {ay * hs + by:.1f}) of it"
                parts[0] += f", of another aspect ({100 * other:.1f} %): {how}"
        if not self.found:
            parts.append(
                f"no drift could be estimated: {100 * self.inliers:.0f} % of the picture agree with one placement"
            )
            return "; ".join(parts)
        if self.moved and stretched:
            dx, dy = self.shift
            kx, ky = (100 * (k - 1) for k in self.scale)
            zoom = f"{kx:+.2f} %" if abs(kx - ky) < 0.05 else f"{kx:+.2f} % wide, {ky:+.2f} % high"
            parts.append(f"moved {dx:+.1f} px right, {dy:+.1f} px down, zoomed {zoom}")
        if self.recoloured:
            gains = ", ".join(f"{g:.3f}" for g in self.gain)
            offsets = ", ".join(f"{o:+.3f}" for o in self.offset)
            parts.append(f"colours x ({gains}) + ({offsets})")
        if not self.moved and not self.recoloured:
            parts.append("no drift")
        parts.append(f"{100 * self.inliers:.0f} % of the picture agree within {self.residual:.2f} px")
        return "; ".join(parts)

    __str__ = describe


def _same_aspect(source: tuple[int, int], edited: tuple[int, int]) -> bool:
    (ws, hs), (we, he) = source, edited
    off = abs(math.log(we * hs / (he * ws)))
    # a side rounded to whole pixels is off by up to half a pixel
    return off <= max(ASPECT_TOLERANCE, 0.5 / min(we, he) + 0.5 / max(we, he))


def _check(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(array).__name__}")
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"{name}: expected [height, width, 3], got {list(array.shape)}")
    if array.dtype not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name}: expected uint8, uint16 or floats in [0, 1], got {array.dtype}")
    return array


def _unit(array: np.ndarray) -> np.ndarray:
    """fp32 in [0, 1]; what is not finite becomes 0."""
    if np.issubdtype(array.dtype, np.floating):
        return np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)


def _reduced(array: np.ndarray, factor: int) -> Tensor:
    """Means of factor x factor pixels, fp32 [3, h, w]; a rest at the right and at the bottom is left out."""
    rows, columns = max(array.shape[0] // factor, 1), max(array.shape[1] // factor, 1)
    out = torch.empty(3, rows, columns)
    step = max(2**22 // (array.shape[1] * factor), 1)
    for r in range(0, rows, step):
        n = min(step, rows - r)
        # sides under the factor stay whole
        part = _unit(array[r * factor : (r + n) * factor, : columns * factor])
        part = part.reshape(n, part.shape[0] // n, columns, part.shape[1] // columns, 3)
        out[:, r : r + n] = torch.from_numpy(part.mean(axis=(1, 3))).permute(2, 0, 1)
    return out


class _Pyramid:
    """A picture at falling resolutions. planes[k]: luminance, fp32 [1, h, w]; factors[k]: pixels of the picture on one
    of its own. colour: fp32 [3, h, w] of the first."""

    def __init__(self, array: np.ndarray, device: torch.device | str = "cpu"):
        self.size = array.shape[1], array.shape[0]
        factor = max(max(self.size) // BASE_SIDE, 1)
        self.colour = _reduced(array, factor).to(device)
        weights = self.colour.new_tensor([0.299, 0.587, 0.114])
        self.planes = [torch.tensordot(weights, self.colour, 1)[None]]
        self.factors = [factor]
        while min(self.planes[-1].shape[-2:]) >= 2 * BLOCK and max(self.planes[-1].shape[-2:]) > COARSE_SIDE:
            self.planes.append(F.avg_pool2d(self.planes[-1], 2))
            self.factors.append(2 * self.factors[-1])

    def __len__(self) -> int:
        return len(self.planes)


# Of one axis each: source point p is at p * scale + shift of the edited picture; (x, y).
@dataclass(frozen=True)
class _Map:
    scale: Sequence[float]
    shift: Sequence[float]

    def then(self, first: Sequence[float], slope: Sequence[float]) -> _Map:
        """The map of points that go to p + first + slope * p before."""
        return _Map(
            tuple(a * (1 + m) for a, m in zip(self.scale, slope)),
            tuple(b + a * t for a, b, t in zip(self.scale, self.shift, first)),
        )

    def distance(self, other: _Map, size: tuple[int, int]) -> float:
        """How far the two put the corners of a source of that size apart, in pixels of the edited picture."""
        ends = [
            max(abs(b1 - b2), abs(s * (a1 - a2) + b1 - b2))
            for a1, b1, a2, b2, s in zip(self.scale, self.shift, other.scale, other.shift, size)
        ]
        return math.hypot(*ends)


def _plain(source: tuple[int, int], edited: tuple[int, int]) -> _Map:
    return _Map(tuple(e / s for s, e in zip(source, edited)), (0.0, 0.0))


def _placements(source: tuple[int, int], edited: tuple[int, int]) -> list[_Map]:
    """Where an editor may have put the source: stretched, fitted in, cut to fill, or at its own resolution."""
    if _same_aspect(source, edited):
        return [_plain(source, edited)]
    ratios = [e / s for s, e in zip(source, edited)]
    uniform = {min(ratios), max(ratios), 1.0}
    middle = [_Map((k, k), tuple((e - k * s) / 2 for s, e in zip(source, edited))) for k in sorted(uniform)]
    return [_plain(source, edited), *middle]


def _warp(edited: _Pyramid, to: _Map, factor: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(luminance [1, h, w] of the edited picture on the source's grid reduced by `factor`, bool [h, w] where it lies
    on the edited picture). size: (w, h) of that grid."""
    wanted = min(to.scale) * factor
    k = min(range(len(edited)), key=lambda j: abs(math.log(wanted / edited.factors[j])))
    of = edited.factors[k]
    scale, shift = [a * factor / of for a in to.scale], [b / of for b in to.shift]
    width, height = size
    plane = edited.planes[k]
    inside = [(torch.arange(n, device=plane.device) + 0.5) * a + b for n, a, b in zip(size, scale, shift)]
    covered = [(p >= 0) & (p <= n) for p, n in zip(inside, (plane.shape[2], plane.shape[1]))]
    return resample(plane, (0, height, 0, width), scale, shift), covered[1][:, None] & covered[0]


def _smooth(x: Tensor, reach: int) -> Tensor:
    """Means over cells of about reach x reach pixels, brought up linearly. [C, h, w]."""
    h, w = x.shape[-2:]
    cells = F.adaptive_avg_pool2d(x[None], (max(h // reach, 1), max(w // reach, 1)))
    return F.interpolate(cells, size=(h, w), mode="bilinear")[0]


def _detail(x: Tensor) -> Tensor:
    """What is neither the finest grain (JPEG's, an autoencoder's) nor shading. [1, h, w]."""
    y = F.pad(x, (2, 2, 2, 2), mode="replicate")
    for axis in (1, 2):  # by sums: a convolution of one channel takes a CPU three times as long
        a, b, c, d, e = (y.narrow(axis, i, y.shape[axis] - 4) for i in range(5))
        y = (a + e).add_(b + d, alpha=4).add_(c, alpha=6).div_(16)
    return y - _smooth(y, 8)


def _correlate(source: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
    """Phase correlation of pictures [n, h, w], zero towards their borders.

    Returns (displacement [n, 2] as (x, y), with edited(p + displacement) = source(p); peak [n], 1 for equal ones).
    """
    h, w = source.shape[-2:]
    a, b = torch.fft.rfft2(source), torch.fft.rfft2(edited)
    cross = a.conj() * b
    size = cross.abs()
    # rows and columns of little power say nothing of a shift; fine ones little
    fy, fx = torch.fft.fftfreq(h, device=size.device)[:, None], torch.fft.rfftfreq(w, device=size.device)
    low = torch.exp(-(fx**2 + fy**2) / (2 * 0.2**2))
    floor = 0.1 * size.mean(dim=(-2, -1), keepdim=True) + 1e-12
    phase = cross / (size + floor) * low
    surface = torch.fft.irfft2(phase, s=(h, w))
    unit = torch.fft.irfft2((low + 0j), s=(h, w))[0, 0]
    n = len(surface)
    # shifts of up to half the picture, of which a quarter can be seen through the window
    reach_y, reach_x = h // 4, w // 4
    near = torch.roll(surface, (reach_y, reach_x), (-2, -1))[:, : 2 * reach_y + 1, : 2 * reach_x + 1]
    peak, at = near.reshape(n, -1).max(dim=1)
    row, column = at // near.shape[2], at % near.shape[2]
    padded, every = F.pad(near, (1, 1, 1, 1)), torch.arange(n, device=size.device)
    middle = padded[every, row + 1, column + 1]

    def vertex(before: Tensor, after: Tensor) -> Tensor:
        bend = before - 2 * middle + after
        return (0.5 * (before - after) / bend.clamp(max=-1e-12)).clamp(-0.5, 0.5)

    dx = column - reach_x + vertex(padded[every, row + 1, column], padded[every, row + 1, column + 2])
    dy = row - reach_y + vertex(padded[every, row, column + 1], padded[every, row + 2, column + 1])
    return torch.stack([dx, dy], dim=1), peak / unit


def _window(h: int, w: int, flat: float, device: torch.device) -> Tensor:
    """1 in the middle, to 0 at the borders; flat: share of a side that is 1."""

    def line(n: int) -> Tensor:
        edge = (torch.arange(n, device=device) + 0.5) / n
        edge = torch.minimum(edge, 1 - edge) * 2 / (1 - flat)
        return torch.sin(edge.clamp(max=1) * math.pi / 2) ** 2

    return line(h)[:, None] * line(w)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one level. at: their middles, [n, 2]; move: displacements, [n, 2]; both (x, y), pixels of the source.
    peak: [n], of the correlation. reach: half a block's side, pixels of the source. On the host."""

    at: Tensor
    move: Tensor
    peak: Tensor
    factor: int
    reach: float

    def __len__(self) -> int:
        return len(self.at)


def _blocks(source: Tensor, usable: Tensor, edited: _Pyramid, to: _Map, factor: int, apart: bool = False) -> _Blocks:
    """Displacements of the blocks with texture. source: `_detail` of the level, [1, h, w]; usable: bool [h, w]. apart:
    side by side; else each covers half of the next."""
    h, w = source.shape[-2:]
    size = min(BLOCK, h, w)
    warped, covered = _warp(edited, to, factor, (w, h))
    warped = _detail(warped)
    step = size if apart else size // 2
    pairs = torch.cat([source, warped, (usable & covered).float()[None]])
    cut = pairs.unfold(1, size, step).unfold(2, size, step)
    rows, columns = cut.shape[1:3]
    cut = cut.reshape(3, rows * columns, size, size)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    at = (torch.stack([x.flatten(), y.flatten()], dim=1) * step + size / 2) * factor
    keep = (cut[0].square().mean(dim=(1, 2)).sqrt() > TEXTURE) & (cut[2].mean(dim=(1, 2)) > 0.75)
    at = at[keep.cpu()]
    if not len(at):  # MKL transforms no empty batch
        return _Blocks(at, at, at[:, 0], factor, size / 2 * factor)
    source, warped = cut[0, keep], cut[1, keep]
    window = _window(size, size, 0.2, keep.device)
    move, peak = _correlate(source * window, warped * window)
    return _Blocks(at, move.cpu() * factor, peak.cpu(), factor, size / 2 * factor)


def _within(at: Tensor, reach: float, factor: int, like: Tensor) -> Tensor:
    """bool [h, w] of a level, as `like`: pixels of blocks whose middles are at [n, 2], pixels of the source."""
    h, w = like.shape
    # corners of each block; sums over rows and columns fill it
    corners = torch.zeros(h + 1, w + 1, dtype=torch.int32)
    (x0, x1), (y0, y1) = (
        [((at[:, axis] + way * reach) / factor).round().long().clamp(0, side) for way in (-1, 1)]
        for axis, side in enumerate((w, h))
    )
    for y, x, sign in ((y0, x0, 1), (y1, x1, 1), (y0, x1, -1), (y1, x0, -1)):
        corners.index_put_((y, x), torch.full((len(at),), sign, dtype=torch.int32), accumulate=True)
    return (corners.cumsum(0).cumsum(1)[:h, :w] > 0).to(like.device)


def _consensus(blocks: _Blocks, size: tuple[int, int], near: float) -> tuple[Tensor, tuple, tuple]:
    """The shift and zoom that most blocks agree with: (bool [n], first (x, y), slope (x, y)) for `_Map.then`.

    near: distance, in pixels of the level, up to which a block agrees.
    """
    n = len(blocks)
    none = torch.zeros(n, dtype=torch.bool), (0.0, 0.0), (0.0, 0.0)
    if n < LEAST_BLOCKS:
        return none
    near = near * blocks.factor
    at, move = blocks.at.double(), blocks.move.double()
    generator = torch.Generator().manual_seed(0)
    i, j = torch.randint(n, (2, 600), generator=generator)
    apart = at[i] - at[j]
    span = at.max(dim=0).values - at.min(dim=0).values
    # too near to each other for a zoom: a shift alone
    slope = torch.where(apart.abs() > 0.15 * span.clamp(min=1), (move[i] - move[j]) / apart, 0.0)
    slope = slope.clamp(-LARGEST_ZOOM, LARGEST_ZOOM)
    first = (move[i] + move[j]) / 2 - slope * (at[i] + at[j]) / 2
    off = (first[:, None] + slope[:, None] * at - move).square().sum(dim=-1).sqrt()
    # not their number: of two groups the one that agrees more closely
    best = int((1 - (off / near).square()).clamp(min=0).sum(dim=1).argmax())
    inside = off[best] < near
    weight = (1 - (off[best] / near).square()).clamp(min=0)
    for _ in range(3):
        if int(inside.sum()) < LEAST_BLOCKS:
            return none
        share = (weight / weight.sum())[:, None]
        middle, mean = (share * at).sum(dim=0), (share * move).sum(dim=0)
        x, y = at - middle, move - mean
        spread = (share * x.square()).sum(dim=0)
        steep = torch.where(spread > 0, (share * x * y).sum(dim=0) / spread.clamp(min=1e-9), 0.0)
        steep = steep.clamp(-LARGEST_ZOOM, LARGEST_ZOOM)
        start = mean - steep * middle
        off = (start + steep * at - move).square().sum(dim=1).sqrt()
        inside, weight = off < near, (1 - (off / near).square()).clamp(min=0).square()
    return inside, tuple(start.tolist()), tuple(steep.tolist())


def _refine(source: Tensor, usable: Tensor, edited: _Pyramid, to: _Map, factor: int, iterations: int) -> _Map:
    """Gauss-Newton on the pixels: the map that makes the warped picture equal to the source where they can be equal.

    Where the difference is more than the texture and a misplacement of half a pixel explain, a pixel counts little.
    source: `_detail` of the level, [1, h, w]; usable: bool [h, w].
    """
    h, w = source.shape[-2:]
    x, y = (torch.arange(n, dtype=torch.float32, device=source.device) / n - 0.5 for n in (w, h))
    y = y[:, None]
    for _ in range(iterations):
        warped, covered = _warp(edited, to, factor, (w, h))
        warped = _detail(warped)
        ok = (usable & covered).float()
        mean = (source + warped)[0] / 2
        gx, gy = torch.zeros_like(mean), torch.zeros_like(mean)
        gx[:, 1:-1] = (mean[:, 2:] - mean[:, :-2]) / 2
        gy[1:-1] = (mean[2:] - mean[:-2]) / 2
        off = (source - warped)[0]
        energy = torch.stack([off.square(), gx.square() + gy.square()])
        energy = _smooth(energy, 8)
        weight = ok / (1 + energy[0] / (0.25 * energy[1] + 1e-5)).square()
        rows = torch.stack([gx, gx * x, gy, gy * y, warped[0]]).reshape(5, -1)
        weighted = rows * weight.reshape(-1)
        both = (weighted @ torch.cat([rows, off.reshape(1, -1)]).T).double().cpu()
        normal, right = both[:, :5], both[:, 5]
        ridge = torch.diag(normal.diagonal() * 1e-6 + 1e-9)
        tx, mx, ty, my, _ = torch.linalg.solve(normal + ridge, right).tolist()
        limit = [max(-2.0, min(2.0, t)) for t in (tx, ty)]
        slope = [max(-0.02, min(0.02, m / n)) for m, n in ((mx, w), (my, h))]
        # of the level's middle, in its pixels -> of the picture's corner, in its own
        first = [(t - m * n / 2) * factor for t, m, n in zip(limit, slope, (w, h))]
        update = to.then(first, slope)
        done = update.distance(to, (w * factor, h * factor)) < 0.01 * factor * max(to.scale)
        to = update
        if done:
            break
    return to


def _coarse(source: Tensor, usable: Tensor, edited: _Pyramid, factor: int, plain: list[_Map]) -> list[_Map]:
    """Placements and zooms with the best shift of each, the likeliest first."""
    h, w = source.shape[-2:]
    window = _window(h, w, 0.5, source.device)
    middle = (w * factor / 2, h * factor / 2)
    found = []
    for start in plain:
        for zoom in ZOOMS:
            m = zoom - 1
            to = start.then([-m * c for c in middle], (m, m))
            warped, covered = _warp(edited, to, factor, (w, h))
            both = window * (usable & covered)
            move, peak = _correlate(source * both, _detail(warped) * both)
            found.append((float(peak), to.then((move[0] * factor).tolist(), (0.0, 0.0))))
            found.append((float(peak) / 2, to))
    found.sort(key=lambda pair: -pair[0])
    return [to for _, to in found]


def estimate_drift(
    source: np.ndarray, edited: np.ndarray, exclude: np.ndarray | None = None, device: torch.device | str = "cpu"
) -> Drift:
    """The drift of an edited picture against its source, estimated from the pixels that the edit left alone.

    source, edited: [height, width, 3], uint8, uint16, or floats in [0, 1]; their sizes may differ, and their aspects
    (a crop or a border is found where the content is not zoomed by more than 6 % against a fit to either side).
    exclude: bool [any height, any width] over the whole source, true where it is known to be edited. device: where it
    is computed.

    ValueError or TypeError for other shapes and kinds. Nothing is refused for its content: see `Drift.found`.
    """
    source, edited = _check("source", source), _check("edited", edited)
    if exclude is not None:
        exclude = np.asarray(exclude)
        if exclude.ndim != 2 or exclude.dtype != bool or 0 in exclude.shape:
            raise ValueError(f"exclude: expected bool [height, width], got {exclude.dtype} {list(exclude.shape)}")
    sizes = (source.shape[1], source.shape[0]), (edited.shape[1], edited.shape[0])
    nothing = Drift(*sizes)
    if sizes[0] == sizes[1] and np.array_equal(source, edited):
        return replace(nothing, inliers=1.0, found=True)
    if min(*sizes[0], *sizes[1]) < BLOCK:
        return nothing
    with torch.no_grad():
        return _estimate(_Pyramid(source, device), _Pyramid(edited, device), exclude, nothing)


def _usable(exclude: Tensor | None, like: Tensor) -> Tensor:
    """bool [h, w] of a plane [.., h, w]. exclude: [1, 1, any, any], over 0 where it is to be left out."""
    if exclude is None:
        return torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device)
    return F.adaptive_max_pool2d(exclude, like.shape[-2:])[0, 0] == 0


def _estimate(source: _Pyramid, edited: _Pyramid, exclude: np.ndarray | None, nothing: Drift) -> Drift:
    size = source.size
    details = [_detail(p) for p in source.planes]
    covered = None if exclude is None else torch.from_numpy(exclude).to(source.colour.device).float()[None, None]
    usable = [_usable(covered, p) for p in source.planes]
    last = len(source) - 1
    plain = _placements(size, edited.size)
    best: tuple[int, _Map] | None = None
    for to in _coarse(details[last], usable[last], edited, source.factors[last], plain)[:4]:
        blocks = _blocks(details[last], usable[last], edited, to, source.factors[last])
        inside, first, slope = _consensus(blocks, size, 1.5)
        score = int(inside.sum())
        if best is None or score > best[0]:
            best = score, to.then(first, slope)
    assert best is not None  # there is always a placement
    to = best[1]
    middle = max(last - 1, 0)
    blocks = _blocks(details[middle], usable[middle], edited, to, source.factors[middle])
    inside, first, slope = _consensus(blocks, size, NEAR / 2)
    if int(inside.sum()) < LEAST_BLOCKS:
        return nothing
    to = to.then(first, slope)
    voters = usable
    for level in range(middle, -1, -1):
        to = _refine(details[level], voters[level], edited, to, source.factors[level], 3 if level else 2)
        # what an editor moved by itself has no vote from here on: it pulls the fit by up to some pixels
        many = details[level].numel() > MANY_PIXELS
        blocks = _blocks(details[level], usable[level], edited, to, source.factors[level], many)
        near = blocks.move.square().sum(dim=1).sqrt() < NEAR / 2 * blocks.factor
        if int(near.sum()) >= max(LEAST_AGREEING * len(blocks), LEAST_BLOCKS):
            voters = [u & _within(blocks.at[near], blocks.reach, f, u) for u, f in zip(usable, source.factors)]
    to = _refine(details[0], voters[0], edited, to, source.factors[0], 2)
    blocks = _blocks(details[middle], usable[middle], edited, to, source.factors[middle])
    off = blocks.move.square().sum(dim=1).sqrt()
    agree = off < NEAR * blocks.factor
    share = float(agree.float().mean()) if len(blocks) else 0.0
    if share < LEAST_AGREEING or int(agree.sum()) < LEAST_BLOCKS:
        return replace(nothing, inliers=share)
    residual = float(off[agree].square().mean().sqrt())
    place = _told(to, size, edited.size)
    if not place or not _better(details[0], usable[0], edited, to, _plain(size, edited.size), source.factors[0]):
        place, to = {}, _plain(size, edited.size)
    gain, offset = _colours(source, edited, to, usable[last], blocks.at[agree])
    return replace(nothing, inliers=share, residual=residual, found=True, gain=gain, offset=offset, **place)


def _better(source: Tensor, usable: Tensor, edited: _Pyramid, to: _Map, plain: _Map, factor: int) -> bool:
    """Whether the picture's edges come nearer to the source's, on the half of them where each map does best.

    source: `_detail` of the level, [1, h, w]; usable: bool [h, w].
    """
    h, w = source.shape[-2:]
    edges = usable & (source[0].abs() > 2 * TEXTURE)
    left = []
    for one in (to, plain):
        warped, covered = _warp(edited, one, factor, (w, h))
        off = (source - _detail(warped))[0][edges & covered].abs().sort().values
        left.append(float(off[: len(off) // 2].mean()) if len(off) else math.inf)
    return left[0] < (1 - LEAST_GAIN) * left[1]


def _colours(source: _Pyramid, edited: _Pyramid, to: _Map, usable: Tensor, seen: Tensor) -> tuple[tuple, tuple]:
    """(gain, offset) of the three channels where they matter, by least squares with Tukey's weights.

    usable: bool [h, w], of the coarsest level. seen: middles of blocks that agree, [n, 2], pixels of the source; the
    first estimate is theirs, for a wall that was painted over has no texture to say so.
    """
    h, w = usable.shape
    factor = source.factors[-1]
    times = factor // source.factors[0]
    reduced = F.avg_pool2d(source.colour[:, : h * times, : w * times], times)
    scale = [a * factor / edited.factors[0] for a in to.scale]
    shift = [b / edited.factors[0] for b in to.shift]
    warped = resample(edited.colour, (0, h, 0, w), scale, shift)
    _, covered = _warp(edited, to, factor, (w, h))
    # the rest is little, and reads a number in each turn
    reduced, warped, ok = reduced.cpu(), warped.cpu(), (usable & covered).cpu()
    first = torch.zeros_like(ok)
    reach = BLOCK // 2
    for x, y in (seen / factor).round().long().tolist():
        first[max(y - reach // 2, 0) : y + reach // 2, max(x - reach // 2, 0) : x + reach // 2] = True
    if int((ok & first).sum()) < 4 * BLOCK:
        return (1.0,) * 3, (0.0,) * 3
    # some thousand pixels are enough
    ok &= torch.arange(h * w).view(h, w) % max(int(ok.sum()) // COLOUR_SAMPLES, 1) == 0
    a, b = reduced[:, ok].double(), warped[:, ok].double()
    line = torch.stack([torch.ones(3), (b - a)[:, first[ok]].median(dim=1).values]).double()
    for _ in range(12):
        fitted = line[0][:, None] * a + line[1][:, None]
        off = b - fitted.clamp(0, 1)
        spread = 1.4826 * off[:, first[ok]].abs().median(dim=1, keepdim=True).values.clamp(min=0.002)
        weight = (1 - (off / (4.7 * spread)).square()).clamp(min=0).square().amin(dim=0)
        if float(weight.mean()) < LEAST_AGREEING:
            return (1.0,) * 3, (0.0,) * 3
        # clipped black and white pixels are on no line
        weight = weight * ((fitted > -0.002) & (fitted < 1.002)).all(dim=0)
        total = weight.sum().clamp(min=1e-9)
        mean_a, mean_b = (a * weight).sum(1, keepdim=True) / total, (b * weight).sum(1, keepdim=True) / total
        x, y = a - mean_a, b - mean_b
        # a picture of one grey says nothing of a gain: as if some pixels elsewhere said there is none
        prior = 0.001 * total
        gain = ((weight * x * y).sum(1) + prior) / ((weight * x * x).sum(1) + prior)
        line = torch.stack([gain, mean_b[:, 0] - gain * mean_a[:, 0]])
    effect = torch.stack([line[1], line.sum(dim=0) - 1]).abs().amax()
    before = (b - a).abs().mean(dim=0).sort().values[: a.shape[1] // 2].mean()
    after = (b - line[0][:, None] * a - line[1][:, None]).abs().mean(dim=0).sort().values[: a.shape[1] // 2].mean()
    if float(effect) < SMALLEST_COLOUR or after > (1 - LEAST_GAIN) * before:
        return (1.0,) * 3, (0.0,) * 3
    return tuple(line[0].tolist()), tuple(line[1].tolist())


def _told(to: _Map, source: tuple[int, int], edited: tuple[int, int]) -> dict:
    """shift and scale of a Drift; those of no drift where it cannot be distinguished from none."""
    plain = _plain(source, edited)
    coarser = max(1.0, *plain.scale)
    if to.distance(plain, source) < SMALLEST_MOVE * coarser:
        return {}
    scale = tuple(a / p for a, p in zip(to.scale, plain.scale))
    shift = tuple((b + a * s / 2 - e / 2) / p for a, b, p, s, e in zip(to.scale, to.shift, plain.scale, source, edited))
    return {"scale": scale, "shift": shift}


def align(edited: np.ndarray, drift: Drift, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An edited picture brought onto its source: (fp32 [h, w, 3] in [0, 1], bool [h, w] where it has been seen).

    edited: what `estimate_drift` saw, [height, width, 3]. size: (w, h) that is wanted, the source's or one that stands
    for the whole source. Lanczos resampling; the values of what was not seen are those of the border.

    Where there is no drift and the size is the picture's own, its values come back as they are.
    """
    edited = _check("edited", edited)
    if (edited.shape[1], edited.shape[0]) != drift.edited_size:
        raise ValueError(f"edited: expected {list(drift.edited_size[::-1])} pixels, got {list(edited.shape[:2])}")
    width, height = size
    values = _unit(edited)
    scale, shift = drift.placement()
    scale = [a * s / n for a, s, n in zip(scale, drift.source_size, size)]
    seen = np.ones((height, width), bool)
    if drift.moved or drift.edited_size != (width, height):
        planes = torch.from_numpy(values).permute(2, 0, 1).contiguous()
        planes = resample(planes, (0, height, 0, width), scale, shift)
        values = np.ascontiguousarray(planes.clamp_(0, 1).permute(1, 2, 0).numpy())
    if drift.moved:
        x, y = ((np.arange(n) + 0.5) * a + b for n, a, b in zip(size, scale, shift))
        # the border pixel's own half was seen
        seen = ((y >= 0) & (y <= edited.shape[0]))[:, None] & ((x >= 0) & (x <= edited.shape[1]))
    if drift.recoloured:
        values = (values - np.asarray(drift.offset, np.float32)) / np.asarray(drift.gain, np.float32)
        values = values.clip(0, 1).astype(np.float32)
    return values, seen
