# SPDX-License-Identifier: Apache-2.0
"""Picture files: read with one line about every kind of damage, written whole or not at all, nothing of theirs lost.

`Photo` holds a picture as its file has it: mode, 16 bits a channel, alpha, colour profile, metadata.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# No other reader of Pillow's is asked: one of them, EPS, starts a program.
READ_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF")
WRITTEN = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"
}  # fmt: skip
# tags of TIFF and EXIF, and TIFF's types of values
ORIENTATION, XMP, ICC = 274, 700, 34675
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS = 256, 257, 258, 259, 262, 273
SAMPLES, ROWS, COUNTS, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, EXTRA = 277, 278, 279, 282, 283, 296, 338
BYTE, LONG, UNDEFINED = 1, 4, 7
EXIF_IFD, GPS_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x8769, 0x8825, 0xA002, 0xA003
# Of a TIFF's own tags, those that describe the picture and not the order of its pixels in the file.
TOLD_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298, EXIF_IFD, GPS_IFD)
# orientation -> (transposed first, then flipped up-down, left-right)
TURNS = {
    2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False),
    6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip


class ImageFileError(ValueError):
    """A picture file that cannot be read or written; the text is one line with the file's name."""


def shown(path: str | os.PathLike) -> str:
    """A path as one line of text that any UTF-8 stream takes."""
    text = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _regular(path: Path) -> None:
    """ImageFileError where no regular file is at a path."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise ImageFileError(f"{shown(path)}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{shown(path)}: cannot be read ({reason(error)})") from None
    if not stat.S_ISREG(found.st_mode):
        raise ImageFileError(f"{shown(path)}: not a file")


_SILENT = threading.RLock()


@contextlib.contextmanager
def _libtiff_silent() -> Iterator[None]:
    """Nothing from libtiff on the screen: it writes its errors there by itself, beside the one that Pillow raises."""
    with _SILENT, open(os.devnull, "wb") as nowhere:
        try:
            kept = os.dup(2)
        except OSError:  # no standard error
            yield
            return
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as a PIL picture, not yet decoded. Whatever fails within becomes an ImageFileError."""
    import PIL.Image

    _regular(path)
    PIL.Image.init()
    formats = [name for name in READ_FORMATS if name in PIL.Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open(path, "rb") as file, PIL.Image.open(file, formats=formats) as image:
                with _libtiff_silent() if image.format == "TIFF" else contextlib.nullcontext():
                    yield image
    except ImageFileError:
        raise
    except PIL.UnidentifiedImageError:
        names = ", ".join(name for name in formats if name not in ("MPO", "DIB"))
        raise ImageFileError(f"{shown(path)}: not a picture in a known format ({names})") from None
    except PIL.Image.DecompressionBombError:
        raise ImageFileError(f"{shown(path)}: the picture is too large") from None
    except PermissionError as error:
        raise ImageFileError(f"{shown(path)}: cannot be read ({reason(error)})") from None
    except Exception as error:
        # a damaged file makes Pillow raise nearly any kind there is
        raise ImageFileError(f"{shown(path)}: the picture is damaged or truncated ({reason(error)})") from None


@dataclass(frozen=True)
class Photo:
    """A picture as its file has it, upright.

    array: uint8, uint16 or, from an array, floats in [0, 1]; [H, W] grey, [H, W, 2] grey and alpha, [H, W, 3] RGB,
    [H, W, 4] RGB and alpha (not premultiplied); colours as the profile has them. profile: the ICC profile's bytes or
    None. exif, xmp: bytes or None, orientation reset. dpi: (x, y) or None. notes: what was converted on reading, a line
    each.
    """

    array: np.ndarray
    profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def open(path: str | os.PathLike) -> Photo:
        """Read a file. ImageFileError, one line, for one that is absent, damaged, or no picture of 8 or 16 bits."""
        path = Path(path)
        with _opened(path) as image:
            notes: list[str] = []
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # whose other frames are smaller copies
                notes.append(f"the first of {frames} frames")
            turned = image.format == "TIFF" and _orientation(image) != 1  # by Pillow, as it decodes
            array, profile = _pixels(path, image, notes)
            turn = _orientation(image)  # after the pixels: a PNG is decoded to its end for its EXIF
            return Photo._whole(image, array, profile, turn, turned or turn != 1, notes)

    @staticmethod
    def of(picture: Any, upright: bool = True) -> Photo:
        """A PIL picture of any mode, or an array, with no file behind it.

        An array: uint8, uint16 or floats in [0, 1]; [H, W], or [H, W, 1 to 4]; not copied. upright: turned by the EXIF
        orientation that a PIL picture has. TypeError or ValueError for others.
        """
        if isinstance(picture, np.ndarray):
            if picture.dtype not in (np.uint8, np.uint16) and picture.dtype.kind != "f":
                raise TypeError(f"picture: expected uint8, uint16 or floats in [0, 1], got {picture.dtype}")
            channels = picture.shape[2] if picture.ndim == 3 else 1
            if picture.ndim not in (2, 3) or 0 in picture.shape or channels > 4:
                raise ValueError(f"picture: expected [H, W] or [H, W, 1 to 4], got {list(picture.shape)}")
            return Photo(picture)
        notes: list[str] = []
        image = picture.copy()  # without its file
        array, profile = _pixels(Path("picture"), image, notes)
        turn = _orientation(image) if upright else 1
        return Photo._whole(image, array, profile, turn, turn != 1, notes)

    @staticmethod
    def _whole(
        image: Any, array: np.ndarray, profile: bytes | None, turn: int, turned: bool, notes: list[str]
    ) -> Photo:
        """Of a PIL picture's pixels, with what else it has. turn: what is to be done; turned: whether to say so."""
        if turned:
            notes.append("turned upright by its EXIF orientation")
        array = np.ascontiguousarray(_upright(array, turn))
        exif = _exif(image, array.shape, notes)
        if profile is not None and _Colours(profile, array).broken:
            notes.append("its colour profile does not fit its pixels: kept, not applied")
        return Photo(array, profile, exif, _xmp(image), _dpi(image), tuple(notes))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.array.shape[1], self.array.shape[0]

    @property
    def channels(self) -> int:
        return 1 if self.array.ndim == 2 else self.array.shape[2]

    @property
    def alpha(self) -> np.ndarray | None:
        """[H, W] of the array's type, or None."""
        return self.array[..., -1] if self.channels in (2, 4) else None

    @property
    def levels(self) -> np.ndarray:
        """The picture for a model: uint8 [H, W, 3], sRGB, on white where it is transparent; may be `array` itself."""
        colours = _Colours(self.profile, self.array).to_srgb(_eight(_colour_part(self.array)))
        if self.alpha is not None:
            colours = _on_white(np.dstack([colours, _eight(self.alpha)]))
        return colours

    @property
    def rgb(self) -> Any:
        """`levels` as a PIL picture."""
        import PIL.Image

        return PIL.Image.fromarray(self.levels)

    def from_rgb(self, rgb: np.ndarray) -> np.ndarray:
        """sRGB in this picture's own colours: uint8 or floats in [0, 1], [h, w, 3] -> [h, w] or [h, w, 3].

        The result has the array's type, without alpha. Without a profile floats keep their precision in 16 bits; a
        profile's conversion has 8 bits.
        """
        if rgb.ndim != 3 or rgb.shape[-1] != 3:
            raise ValueError(f"rgb: expected [h, w, 3], got {list(rgb.shape)}")
        if rgb.dtype != np.uint8 and rgb.dtype.kind != "f":
            raise TypeError(f"rgb: expected uint8 or floats in [0, 1], got {rgb.dtype}")
        return _Colours(self.profile, self.array).from_srgb(rgb, self.array.dtype, self.channels < 3)

    def unit(self, rgb: np.ndarray) -> np.ndarray:
        """Floats in [0, 1], sRGB, [h, w, 3] -> the same in this picture's own colours, greys as equal channels."""
        if _Colours(self.profile, self.array).back is None:
            return rgb
        own = self.from_rgb(rgb).astype(np.float32) / _top(self.array.dtype)
        return own if own.ndim == 3 else np.repeat(own[..., None], 3, axis=-1)

    def pil(self) -> Any:
        """The pixels as they are, as a PIL picture with the colour profile; the array where PIL has no such mode."""
        import PIL.Image

        if self.array.dtype.kind == "f" or (self.array.dtype == np.uint16 and self.array.ndim == 3):
            return self.array
        picture = PIL.Image.fromarray(self.array[..., 0] if self.array.shape[2:] == (1,) else self.array)
        if self.profile is not None:
            picture.info["icc_profile"] = self.profile
        return picture

    def with_array(self, array: np.ndarray) -> Photo:
        """This picture with other pixels of the same type and channels, of any size."""
        if array.dtype != self.array.dtype:
            raise TypeError(f"array: expected {self.array.dtype}, got {array.dtype}")
        if array.ndim != self.array.ndim or array.shape[2:] != self.array.shape[2:] or 0 in array.shape:
            raise ValueError(f"array: expected [H, W{', C' * (array.ndim > 2)}] as {list(self.array.shape)}, got "
                             f"{list(array.shape)}")  # fmt: skip
        return replace(self, array=array)

    def with_picture(self, picture: Any) -> Photo:
        """This picture with all its pixels from a PIL RGB picture in sRGB, of any size; alpha is resized to it."""
        import PIL.Image

        array = self.from_rgb(np.asarray(picture))
        if self.alpha is not None:
            alpha = PIL.Image.fromarray(self.alpha.astype(np.float32))
            resized = alpha.resize(picture.size, PIL.Image.Resampling.LANCZOS)
            array = np.dstack([array, _of_kind(np.asarray(resized) / _top(self.array.dtype), self.array.dtype)])
        return replace(self, array=array)

    def save(self, path: str | os.PathLike) -> tuple[str, ...]:
        """Write the file, in the format of its name, whole or not at all. What had to be converted, a line each.

        PNG and TIFF hold every array; lossless WebP 8 bits; BMP 8 bits and no metadata; JPEG 8 bits without alpha, and
        encodes again. ImageFileError where it cannot be written.
        """
        path = Path(path)
        notes: list[str] = []
        encode = _encoder(self, written_format(path), notes)
        write_file(path, encode)
        return tuple(notes)


def written_format(path: str | os.PathLike) -> str:
    """Pillow's name of the format that a file's name asks for, or ImageFileError."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN:
        raise ImageFileError(f"{shown(path)}: expected a file name that ends in one of {', '.join(WRITTEN)}")
    return WRITTEN[suffix]


# reading


def _orientation(image: Any) -> int:
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason not to show the pixels
        return 1
    return turn if turn in TURNS else 1


def _upright(array: np.ndarray, turn: int) -> np.ndarray:
    transposed, up_down, left_right = TURNS.get(turn, (False, False, False))
    if transposed:
        array = array.swapaxes(0, 1)
    return array[:: -1 if up_down else 1, :: -1 if left_right else 1]


def _pixels(path: Path, image: Any, notes: list[str]) -> tuple[np.ndarray, bytes | None]:
    """(array as in Photo, its ICC profile) of an opened picture."""
    profile = image.info.get("icc_profile") or None
    sixteen = _sixteen_bits(path, image)
    if sixteen is not None:
        key = image.info.get("transparency")
        if isinstance(key, tuple) and sixteen.ndim == 3 and sixteen.shape[2] == len(key):
            notes.append("its transparent colour made an alpha channel")
            alpha = np.where((sixteen == np.array(key, np.uint16)).all(-1), 0, 65535).astype(np.uint16)
            sixteen = np.dstack([sixteen, alpha])
        return sixteen, profile
    image.load()
    mode = image.mode
    if mode == "F":
        raise ImageFileError(f"{shown(path)}: expected 8 or 16 bits a channel, got floating-point ones")
    if mode == "I" or mode.startswith("I;"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageFileError(f"{shown(path)}: expected 8 or 16 bits a channel, got 32")
        return values.astype(np.uint16), profile
    if mode in ("CMYK", "LAB"):
        return _converted(path, image, profile, notes), None
    if "transparency" in image.info and mode in ("1", "L", "RGB"):
        notes.append("its transparent colour made an alpha channel")
        image = image.convert("LA" if mode != "RGB" else "RGBA")
    elif mode in ("P", "PA"):
        clear = mode == "PA" or "transparency" in image.info
        notes.append(f"its palette of colours became {'RGB with alpha' if clear else 'RGB'}")
        image = image.convert("RGBA" if clear else "RGB")
    elif mode == "1":
        notes.append("black and white became grey")
        image = image.convert("L")
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        target = {"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
        if mode != "RGBX":
            notes.append(f"its {mode} became {target}")
        image = image.convert(target)
    return np.array(image), profile


def _converted(path: Path, image: Any, profile: bytes | None, notes: list[str]) -> np.ndarray:
    """CMYK or LAB as RGB in sRGB, by the profile where one fits."""
    import PIL.ImageCms

    mode = image.mode
    source = io.BytesIO(profile) if profile else (PIL.ImageCms.createProfile("LAB") if mode == "LAB" else None)
    if source is not None:
        with contextlib.suppress(PIL.ImageCms.PyCMSError, OSError, TypeError, ValueError):
            target = PIL.ImageCms.createProfile("sRGB")
            picture = PIL.ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            notes.append(f"its {mode} became RGB, by {'its colour profile' if profile else 'definition'}")
            return np.array(picture)
    if mode == "LAB":
        raise ImageFileError(f"{shown(path)}: its LAB colours cannot be converted")
    notes.append("its CMYK became RGB without a colour profile: colours are approximate")
    return np.array(image.convert("RGB"))


def _sixteen_bits(path: Path, image: Any) -> np.ndarray | None:
    """Colours, or grey and alpha, of 16 bits a channel; None for any other picture.

    Pillow keeps one byte of each number, but which one is the raw mode's choice: decoded twice, both are had.
    """
    tiles = getattr(image, "tile", None)  # which pictures in memory have not
    raw = _raw_mode(tiles[0]) if tiles else ""
    if raw == "LA;16B":  # four bytes a pixel, as RGBA has
        _set_raw_mode(image, "RGBA")
        image.load()
        pairs = np.asarray(image).astype(np.uint16)
        return np.stack([pairs[..., 0] << 8 | pairs[..., 1], pairs[..., 2] << 8 | pairs[..., 3]], axis=-1)
    base, _, order = raw.partition(";16")
    if base not in ("RGB", "RGBA") or order not in ("B", "L", "N") or image.mode != base:
        return None
    native = "L" if sys.byteorder == "little" else "B"
    other = {"B": "L", "L": "B"}[native if order == "N" else order]
    image.load()
    high = np.asarray(image)
    with _opened(path) as again:
        _set_raw_mode(again, f"{base};16{other}")
        again.load()
        low = np.asarray(again)
    return high.astype(np.uint16) << 8 | low


def _raw_mode(tile: Any) -> str:
    arguments = tile[3]
    found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return found if isinstance(found, str) else ""


def _set_raw_mode(image: Any, raw: str) -> None:
    tiles = []
    for tile in image.tile:
        arguments = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
        tiles.append(tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments))
    image.tile = tiles


def _exif(image: Any, shape: tuple[int, ...], notes: list[str]) -> bytes | None:
    """EXIF without its orientation, its sizes those of the upright picture; a stale thumbnail is left out."""
    import PIL.Image

    try:
        found = image.getexif()
        kept = PIL.Image.Exif()
        kept.endian = found.endian if image.format != "TIFF" else "<"
        for tag, value in found.items():
            if tag != ORIENTATION and (image.format != "TIFF" or tag in TOLD_TAGS):
                kept[tag] = found.get_ifd(tag) if tag in (EXIF_IFD, GPS_IFD) else value
        if not dict(kept):
            return None
        inner = kept.get(EXIF_IFD)
        if isinstance(inner, dict):
            for tag, side in ((EXIF_WIDTH, shape[1]), (EXIF_HEIGHT, shape[0])):
                if tag in inner:
                    inner[tag] = side
        return kept.tobytes()
    except Exception:
        notes.append("its EXIF is damaged and is not kept")
        return None


def _xmp(image: Any) -> bytes | None:
    found = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if found is None and image.format == "TIFF":
        found = image.tag_v2.get(XMP)
    if isinstance(found, str):
        found = found.encode("utf-8", "surrogateescape")
    if not isinstance(found, bytes) or not found:
        return None
    # the two spellings of a property in RDF
    found = re.sub(rb"""(tiff:Orientation\s*=\s*["'])[2-8](["'])""", rb"\g<1>1\2", found)
    return re.sub(rb"(<tiff:Orientation>\s*)[2-8](\s*</tiff:Orientation>)", rb"\g<1>1\2", found)


def _dpi(image: Any) -> tuple[float, float] | None:
    if image.format == "TIFF" and X_RESOLUTION not in image.tag_v2:
        return None  # where Pillow says 1
    found = image.info.get("dpi")
    try:
        x, y = (float(value) for value in found)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None


# colours


def _colour_part(array: np.ndarray) -> np.ndarray:
    """[H, W] grey or [H, W, 3]."""
    if array.ndim == 2:
        return array
    return array[..., 0] if array.shape[2] < 3 else array[..., :3]


def _top(kind: np.dtype) -> int:
    """The value of white."""
    return 1 if kind.kind == "f" else int(np.iinfo(kind).max)


def _of_kind(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Floats in [0, 1], those beyond cut off, as numbers of a kind."""
    values = np.nan_to_num(values).clip(0, 1) * _top(kind)
    return (values if kind.kind == "f" else np.rint(values)).astype(kind)


def _eight(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return _of_kind(array, np.dtype(np.uint8))
    return array if array.dtype == np.uint8 else ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


class _Colours:
    """The way from a picture's own colours to sRGB and back, 8 bits both."""

    def __init__(self, profile: bytes | None, array: np.ndarray):
        import PIL.Image
        import PIL.ImageCms as cms

        self.there = self.back = None
        self.grey = array.ndim == 2 or array.shape[2] < 3
        self.broken = False
        if profile is None:
            return
        try:
            own, srgb = cms.ImageCmsProfile(io.BytesIO(profile)), cms.createProfile("sRGB")
            # greys with a profile of RGB are taken as RGB with three equal channels
            self.mode = "L" if own.profile.xcolor_space.strip() == "GRAY" else "RGB"
            if self.mode == "L" and not self.grey:
                raise cms.PyCMSError("a grey profile of a colour picture")
            intent, flags = cms.Intent.RELATIVE_COLORIMETRIC, cms.Flags.BLACKPOINTCOMPENSATION
            there = cms.buildTransform(own, srgb, self.mode, "RGB", intent, flags)
            back = cms.buildTransform(srgb, own, "RGB", self.mode, intent, flags)
            steps = np.arange(0, 256, 15, dtype=np.uint8)
            lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)
            probe = PIL.Image.fromarray(lattice if self.mode == "RGB" else lattice[..., 0])
            seen = np.asarray(cms.applyTransform(probe, there)).astype(int)
            wanted = lattice if self.mode == "RGB" else np.repeat(lattice[..., :1], 3, axis=-1)
            if abs(seen - wanted).max() > 1:  # else it is sRGB itself
                self.there, self.back = there, back
        except (cms.PyCMSError, OSError, TypeError, ValueError):
            self.broken = True

    def to_srgb(self, colours: np.ndarray) -> np.ndarray:
        """uint8 [H, W] or [H, W, 3] -> uint8 [H, W, 3]."""
        return self._apply(self.there, colours if self.there and self.mode == "L" else self._three(colours))

    def from_srgb(self, rgb: np.ndarray, kind: np.dtype, grey: bool) -> np.ndarray:
        """uint8 or floats [h, w, 3] -> [h, w] or [h, w, 3] of a kind."""
        if self.back is not None:
            if rgb.dtype != np.uint8:
                rgb = np.rint(rgb.clip(0, 1) * 255).astype(np.uint8)
            rgb = self._apply(self.back, rgb)
        if rgb.dtype == np.uint8 and kind == np.uint8 and (rgb.ndim == 2 or not grey):
            return rgb
        values = rgb.astype(np.float64) / 255 if rgb.dtype == np.uint8 else rgb.clip(0, 1)
        if grey and values.ndim == 3:
            values = values @ np.array((0.299, 0.587, 0.114))
        return _of_kind(values, kind)

    @staticmethod
    def _three(colours: np.ndarray) -> np.ndarray:
        return colours if colours.ndim == 3 else np.repeat(colours[..., None], 3, axis=-1)

    @staticmethod
    def _apply(transform: Any, colours: np.ndarray) -> np.ndarray:
        import PIL.Image
        import PIL.ImageCms

        if transform is None:
            return colours
        picture = PIL.Image.fromarray(np.ascontiguousarray(colours))
        return np.asarray(PIL.ImageCms.applyTransform(picture, transform))


# writing


def check_target(path: str | os.PathLike) -> Path:
    """The place where a file of that name is written: its target where it is a symbolic link.

    Tried here, so that nothing fails after the work: ImageFileError for a folder, a device, a file that is read-only, a
    folder that is absent or cannot be written to, a name that the file system does not take.
    """
    name = shown(path)
    try:
        target = Path(os.path.realpath(path))
        found = os.lstat(target) if os.path.lexists(target) else None
        parent = os.stat(target.parent)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageFileError(f"{shown(Path(path).parent)}: no such folder") from None
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{name}: cannot be written ({reason(error)})") from None
    if not stat.S_ISDIR(parent.st_mode):
        raise ImageFileError(f"{shown(target.parent)}: no such folder")
    if found is not None:
        if stat.S_ISDIR(found.st_mode):
            raise ImageFileError(f"{name}: is a folder")
        if stat.S_ISLNK(found.st_mode):
            raise ImageFileError(f"{name}: is a symbolic link to itself")
        if not stat.S_ISREG(found.st_mode):
            raise ImageFileError(f"{name}: is a device, not a file")
        # the owner's choice, which root's rights would pass over
        if not found.st_mode & 0o222 or not os.access(target, os.W_OK):
            raise ImageFileError(f"{name}: is read-only")
    try:
        if found is None:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(target)
        handle, temporary = _beside(target)
        os.close(handle)
        os.unlink(temporary)
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{name}: cannot be written ({reason(error)})") from None
    return target


def _beside(target: Path) -> tuple[int, str]:
    # short: the name itself may have all the bytes that the file system allows
    return tempfile.mkstemp(prefix=".specedit-", dir=target.parent)


def write_file(path: str | os.PathLike, encode: Callable[[BinaryIO], Any]) -> None:
    """A file that `encode` writes, whole or not at all: to one beside it first, then renamed; links are followed."""
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        handle, temporary = _beside(target)
        with os.fdopen(handle, "w+b") as file:
            encode(file)
        try:
            rights = stat.S_IMODE(os.stat(target).st_mode)
        except FileNotFoundError:
            # mkstemp makes files private; a picture gets the rights that the user's umask gives
            mask = os.umask(0)
            os.umask(mask)
            rights = 0o666 & ~mask
        os.chmod(temporary, rights)
        os.replace(temporary, target)
    except Exception as error:
        # encoders raise many kinds, for sizes and modes that a format does not have
        raise ImageFileError(f"{shown(path)}: cannot be written ({reason(error)})") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _encoder(photo: Photo, kind: str, notes: list[str]) -> Callable[[BinaryIO], None]:
    """What writes a photo in a format; adds to `notes` what the format cannot hold."""
    import PIL.Image

    array = photo.array
    if array.dtype.kind == "f":
        notes.append("brought to 16 bits a channel from floating-point numbers")
        array = _of_kind(array, np.dtype(np.uint16))
    if array.dtype == np.uint16 and kind not in ("PNG", "TIFF"):
        notes.append(f"{kind} holds 8 bits a channel: brought down from 16")
        array = _eight(array)
    if kind in ("JPEG", "BMP") and photo.alpha is not None:
        notes.append(f"{kind} holds no alpha: laid on white")
        array = _on_white(array)
    if kind == "JPEG":
        notes.append("JPEG encodes every pixel again; PNG, TIFF and WebP keep the bits")
    if kind == "BMP" and any(x is not None for x in (photo.profile, photo.exif, photo.xmp)):
        notes.append("BMP holds no colour profile and no metadata: left out")
    if (kind == "WEBP" and photo.channels < 3) or (kind == "TIFF" and array.dtype == np.uint16 and photo.channels == 2):
        notes.append(f"{kind} holds no such greys: kept as equal channels")
        alpha = [] if photo.alpha is None else [array[..., 1:]]
        array = np.dstack([array if array.ndim == 2 else array[..., :1]] * 3 + alpha)
    if kind == "TIFF":
        return lambda file: _write_tiff(file, array, photo)
    if array.dtype == np.uint16:
        return lambda file: _write_png16(file, array, photo)
    picture = PIL.Image.frombuffer(_mode(array), (array.shape[1], len(array)), np.ascontiguousarray(array))
    options = _metadata(kind, photo)
    if kind == "JPEG":
        options |= dict(quality=95, subsampling=0)
    if kind == "WEBP":
        options |= dict(lossless=True, exact=True, quality=80)
    return lambda file: picture.save(file, format=kind, **options)


def _on_white(array: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 2 or 4] without its alpha: [H, W] or [H, W, 3]."""
    share = array[..., -1:].astype(np.float32) / 255
    laid = np.rint(array[..., :-1] * share + 255 * (1 - share)).astype(np.uint8)
    return laid[..., 0] if laid.shape[2] == 1 else laid


def _mode(array: np.ndarray) -> str:
    return {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[1 if array.ndim == 2 else array.shape[2]]


def _metadata(kind: str, photo: Photo) -> dict[str, Any]:
    """Options of Pillow's save for a format."""
    options: dict[str, Any] = {}
    if photo.dpi is not None and kind != "WEBP":
        options["dpi"] = photo.dpi
    if kind == "BMP":
        return options
    if photo.profile is not None:
        options["icc_profile"] = photo.profile
    if photo.exif is not None:
        options["exif"] = photo.exif
    if photo.xmp is not None:
        if kind == "PNG":
            from PIL.PngImagePlugin import PngInfo

            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", photo.xmp.decode("utf-8", "replace"))
        else:
            options["xmp"] = photo.xmp
    return options


def _tiff_tags(photo: Photo) -> Any:
    """EXIF and XMP as a TIFF's own tags."""
    import PIL.Image
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    if photo.exif is not None:
        found = PIL.Image.Exif()
        found.load(photo.exif)
        for tag, value in found.items():
            tags[tag] = found.get_ifd(tag) if tag in (EXIF_IFD, GPS_IFD) else value
    if photo.xmp is not None:
        tags.tagtype[XMP] = BYTE
        tags[XMP] = photo.xmp
    return tags


def _deflated(rows: np.ndarray, filtered: bool) -> bytes:
    """Rows of bytes in one zlib stream; filtered: each as its difference from the one above (PNG's filter 2)."""
    packer = zlib.compressobj(6)
    parts, above = [], np.zeros_like(rows[:1])
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        if filtered:
            lines = np.full((len(part), rows.shape[1] + 1), 2, np.uint8)
            lines[:, 1:] = part - np.concatenate([above, part[:-1]])
            above, part = part[-1:], lines
        parts.append(packer.compress(np.ascontiguousarray(part).data))
    return b"".join([*parts, packer.flush()])


def _write_png16(file: BinaryIO, array: np.ndarray, photo: Photo) -> None:
    """A PNG of 16 bits a channel. Pillow writes the metadata's chunks, in a picture of one pixel; we write the rest."""
    import PIL.Image

    small = io.BytesIO()
    mode = _mode(array)
    PIL.Image.new(mode, (1, 1)).save(small, format="PNG", **_metadata("PNG", photo))
    data = small.getvalue()
    file.write(data[:8])
    at = 8
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + length]
        at += 12 + length
        if name == b"IHDR":
            content = struct.pack(">II", array.shape[1], len(array)) + bytes([16, content[9], 0, 0, 0])
        if name == b"IDAT":
            content = _deflated(array.astype(">u2").reshape(len(array), -1).view(np.uint8), filtered=True)
        for start in range(0, max(len(content), 1), 2**30):
            part = content[start : start + 2**30]
            file.write(struct.pack(">I4s", len(part), name) + part + struct.pack(">I", zlib.crc32(name + part)))


def _write_tiff(file: BinaryIO, array: np.ndarray, photo: Photo) -> None:
    """A TIFF of 8 or 16 bits a channel in one strip, deflated; Pillow's own has no EXIF where it deflates."""
    tags = _tiff_tags(photo)
    channels = 1 if array.ndim == 2 else array.shape[2]
    size = array.dtype.itemsize
    data = _deflated(array.astype(f"<u{size}").reshape(len(array), -1).view(np.uint8), filtered=False)
    values = {
        WIDTH: array.shape[1], HEIGHT: len(array), BITS: (8 * size,) * channels, COMPRESSION: 8, OFFSETS: 0,
        PHOTOMETRIC: 1 if channels < 3 else 2, SAMPLES: channels, ROWS: len(array), COUNTS: len(data),
    }  # fmt: skip
    if channels in (2, 4):
        values[EXTRA] = 2  # alpha, not premultiplied
    if photo.dpi is not None:
        values |= {X_RESOLUTION: photo.dpi[0], Y_RESOLUTION: photo.dpi[1], RESOLUTION_UNIT: 2}  # in inches
    for tag in (OFFSETS, COUNTS):
        tags.tagtype[tag] = LONG
    for tag, value in values.items():
        tags[tag] = value
    if photo.profile is not None:
        tags.tagtype[ICC] = UNDEFINED
        tags[ICC] = photo.profile
    tags.save(file)
    file.write(data)
