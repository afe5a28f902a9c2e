# SPDX-License-Identifier: Apache-2.0
"""Picture files: nothing of theirs is lost, damage is said in one line, a write is whole or not at all."""

import io
import itertools
import os
import random
import re
import stat
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import pytest

from specedit_kernels.images import files
from specedit_kernels.images.files import ImageFileError, Photo, check_target, write_file

SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF></rdf:RDF></x:xmpmeta>'


def narrow_profile(gamma=1.0, space=b"RGB "):
    """A small profile: sRGB's colours with another curve (linear by default), or greys."""

    def s15(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 79 + b"\0"
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": xyz(0.9642, 1, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"rXYZ": xyz(0.4361, 0.2225, 0.0139),
                 b"gXYZ": xyz(0.3851, 0.7169, 0.0971), b"bXYZ": xyz(0.1431, 0.0606, 0.7141)}  # fmt: skip
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28 + s15(0.9642) + s15(1) + s15(0.8249)
    return head.ljust(128, b"\0") + table + body


LINEAR = narrow_profile()


def exif(**more):
    found = PIL.Image.Exif()
    found[0x010F], found[0x0132] = "Maker", "2020:01:01 00:00:00"
    found[0x8769] = {0x9003: "2020:01:01 00:00:00", 0x829A: (1, 200)}
    found[0x8825] = {1: "N", 2: (50.0, 2.0, 3.0)}
    for tag, value in more.items():
        found[int(tag[1:])] = value
    return found


def told(data):
    """EXIF as dictionaries."""
    found = PIL.Image.Exif()
    found.load(data)
    inner = [dict(found.get_ifd(tag)) for tag in (0x8769, 0x8825)]
    return {k: v for k, v in found.items() if k not in (0x8769, 0x8825)}, *inner


def picture(channels, kind=np.uint8, size=(5, 7), seed=0):
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max + 1, shape).astype(kind)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (37, 2000), (2000, 3)], ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_lossless_files_give_back_every_bit(tmp_path, channels, kind, size):
    photo = Photo(picture(channels, kind, size), SRGB, exif().tobytes(), XMP, (300.0, 300.0))
    for suffix in (".png", ".tif", ".webp"):
        notes = photo.save(tmp_path / f"a{suffix}")
        found = Photo.open(tmp_path / f"a{suffix}")
        greys = channels < 3 and (suffix == ".webp" or (suffix == ".tif" and kind == np.uint16 and channels == 2))
        if suffix == ".webp" and kind == np.uint16:
            assert "holds 8 bits a channel" in notes[0]
            continue
        if greys:
            assert "holds no such greys" in notes[-1]
            assert (found.array[..., 0] == (photo.array if channels == 1 else photo.array[..., 0])).all()
            assert channels == 1 or (found.alpha == photo.alpha).all()
        else:
            assert notes == () and found.array.dtype == kind and np.array_equal(found.array, photo.array)
        assert found.profile == SRGB and found.xmp == XMP and told(found.exif) == told(photo.exif)
        if suffix != ".webp":
            assert found.dpi == pytest.approx((300, 300), abs=0.01)


def test_what_a_format_does_not_hold_is_said(tmp_path):
    photo = Photo(picture(4, np.uint16), SRGB, exif().tobytes())
    notes = photo.save(tmp_path / "a.jpg")
    assert [n.split(":")[0] for n in notes[:2]] == ["JPEG holds 8 bits a channel", "JPEG holds no alpha"]
    assert "encodes every pixel again" in notes[2]
    found = Photo.open(tmp_path / "a.jpg")
    assert found.profile == SRGB and told(found.exif) == told(photo.exif) and found.array.shape == (5, 7, 3)
    assert "BMP holds no colour profile and no metadata" in Photo(picture(3), SRGB).save(tmp_path / "a.bmp")[0]
    assert Photo(picture(3)).save(tmp_path / "a.bmp") == ()
    assert np.array_equal(Photo.open(tmp_path / "a.bmp").array, picture(3))
    with pytest.raises(ImageFileError, match=r"ends in one of .png"):
        photo.save(tmp_path / "a.gif")


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_tiffs_of_others(tmp_path, channels, byteorder, compression):
    tifffile = pytest.importorskip("tifffile")
    if compression:
        pytest.importorskip("imagecodecs")
    array = picture(channels, np.uint16, (40, 33))
    extra = ["unassalpha"] if channels == 4 else []
    tifffile.imwrite(tmp_path / "a.tif", array, byteorder=byteorder, compression=compression, photometric="rgb",
                     extrasamples=extra, predictor=bool(compression))  # fmt: skip
    assert np.array_equal(Photo.open(tmp_path / "a.tif").array, array)


def test_big_endian_tiff_of_sixteen_bits(tmp_path):
    """The same without the library: one strip, not compressed, in Motorola's order."""
    array = picture(3, np.uint16, (4, 6))
    data = array.astype(">u2").tobytes()
    entries = [(256, 3, 1, 6 << 16), (257, 3, 1, 4 << 16), (258, 3, 3, 8), (259, 3, 1, 1 << 16), (262, 3, 1, 2 << 16),
               (273, 4, 1, 14), (277, 3, 1, 3 << 16), (278, 3, 1, 4 << 16), (279, 4, 1, len(data))]  # fmt: skip
    body = b"MM\0*" + struct.pack(">I", 14 + len(data)) + struct.pack(">3H", 16, 16, 16) + data
    body += struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *e) for e in entries) + b"\0" * 4
    (tmp_path / "a.tif").write_bytes(body)
    assert np.array_equal(Photo.open(tmp_path / "a.tif").array, array)


def test_interlaced_and_filtered_pngs_of_sixteen_bits(tmp_path):
    """Paeth's filter, bytes of the pixel before: decoded twice, both bytes of a number come out."""
    array = picture(3, np.uint16, (3, 5))
    rows = array.astype(">u2").reshape(3, -1).view(np.uint8).astype(int)
    lines = []
    for r in range(3):
        line = []
        for i, value in enumerate(rows[r]):
            left = rows[r][i - 6] if i >= 6 else 0
            up = rows[r - 1][i] if r else 0
            corner = rows[r - 1][i - 6] if r and i >= 6 else 0
            guess = min((left, up, corner), key=lambda p: abs(left + up - corner - p))
            line.append((value - guess) % 256)
        lines.append(bytes([4, *line]))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 3, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(png + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b""))
    assert np.array_equal(Photo.open(tmp_path / "a.png").array, array)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix, channels, kind", [
    (".png", 3, np.uint8), (".png", 3, np.uint16), (".png", 2, np.uint16), (".webp", 4, np.uint8),
    (".tif", 3, np.uint8), (".tif", 4, np.uint16),
], ids=str)  # fmt: skip
def test_orientation_is_applied_once(tmp_path, turn, suffix, channels, kind):
    array = picture(channels, kind)
    xmp = b'<rdf tiff:Orientation="%d"/><tiff:Orientation>%d</tiff:Orientation>' % (turn, turn)
    Photo(array, exif=exif(_274=turn, _34665={0xA002: 7, 0xA003: 5}).tobytes(), xmp=xmp).save(tmp_path / f"a{suffix}")
    grey = PIL.Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    grey.getexif()[274] = turn
    order = np.asarray(PIL.ImageOps.exif_transpose(grey))
    found = Photo.open(tmp_path / f"a{suffix}")
    assert np.array_equal(found.array, array.reshape(35, channels)[order])
    base, inner, _ = told(found.exif)
    assert 274 not in base and base[0x010F] == "Maker"
    assert (inner[0xA002], inner[0xA003]) == found.size
    # Pillow takes it out of a TIFF's XMP as it turns it
    assert found.xmp == xmp.replace(b"%d" % turn, b"1") if suffix != ".tif" else not re.search(rb"[2-8]", found.xmp)
    assert ("turned upright by its EXIF orientation" in found.notes) == (turn != 1)
    found.save(tmp_path / f"b{suffix}")
    again = Photo.open(tmp_path / f"b{suffix}")
    assert np.array_equal(again.array, found.array) and again.notes == ()


# modes


def save(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return Photo.open(tmp_path / name)


def test_palettes_and_black_and_white(tmp_path):
    colours = PIL.Image.fromarray(picture(3, size=(16, 16))).quantize(8)
    found = save(tmp_path, colours)
    assert np.array_equal(found.array, np.asarray(colours.convert("RGB"))) and "palette" in found.notes[0]
    found = save(tmp_path, colours, "a.png", transparency=2)
    assert (found.alpha == np.where(np.asarray(colours) == 2, 0, 255)).all()
    found = save(tmp_path, PIL.Image.fromarray(picture(1) > 99))
    assert np.array_equal(found.array, np.where(picture(1) > 99, 255, 0)) and "black and white" in found.notes[0]
    frames = [PIL.Image.new("P", (8, 8), i) for i in range(2)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    found = save(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert "the first of 2 frames" in found.notes


def test_a_colour_that_is_transparent(tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    found = save(tmp_path, PIL.Image.fromarray(grey), transparency=9)
    assert np.array_equal(found.array[..., 0], grey) and found.alpha.min() == 0 and (found.alpha == 0).sum() == 1
    deep = picture(3, np.uint16)
    Photo(deep).save(tmp_path / "b.png")
    data = (tmp_path / "b.png").read_bytes()
    key = struct.pack(">3H", *deep[2, 3])
    (tmp_path / "b.png").write_bytes(data[:33] + chunk(b"tRNS", key) + data[33:])
    found = Photo.open(tmp_path / "b.png")
    assert np.array_equal(found.array[..., :3], deep) and np.argwhere(found.alpha == 0).tolist() == [[2, 3]]


def test_cmyk(tmp_path):
    found = save(tmp_path, PIL.Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "a.tif")
    assert found.array.shape == (9, 9, 3) and (found.array[0, 0] == (255, 0, 0)).all()
    assert "CMYK" in found.notes[0] and found.profile is None


def test_lab(tmp_path):
    found = save(tmp_path, PIL.Image.merge("LAB", [PIL.Image.new("L", (9, 9), v) for v in (255, 128, 128)]), "a.tif")
    assert found.array.min() >= 253 and "LAB" in found.notes[0]


def test_numbers_that_no_picture_has(tmp_path):
    for mode, value in (("F", 0.5), ("I", 70_000), ("I", -1)):
        PIL.Image.new(mode, (8, 8), value).save(tmp_path / "a.tif")
        with pytest.raises(ImageFileError, match="expected 8 or 16 bits"):
            Photo.open(tmp_path / "a.tif")


# colours


def test_a_profile_of_srgb_changes_nothing():
    photo = Photo(picture(3), SRGB)
    assert np.array_equal(np.asarray(photo.rgb), photo.array)
    assert np.array_equal(photo.from_rgb(np.asarray(photo.rgb)), photo.array)


def linear(values):
    values = values / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_profile_is_applied_and_undone(channels):
    """A linear profile's 55 is sRGB's 128; there and back no value moves by more than the darkest steps are apart."""
    photo = Photo(picture(channels, size=(40, 40)), LINEAR)
    colours = photo.array[..., None] if channels == 1 else photo.array[..., : 1 if channels == 2 else 3]
    seen = np.asarray(Photo(np.ascontiguousarray(colours if channels > 2 else colours[..., 0]), LINEAR).rgb)
    assert abs(linear(seen.astype(float)) * 255 - colours).max() < 1.6
    assert abs(photo.from_rgb(seen).astype(int) - colours.squeeze()).max() <= 2
    assert photo.from_rgb(seen.astype(np.float32) / 255).shape == seen.shape[: 2 if channels < 3 else 3]


def test_a_grey_profile():
    photo = Photo(picture(1), narrow_profile(space=b"GRAY"))
    assert abs(linear(np.asarray(photo.rgb)[..., 0].astype(float)) * 255 - photo.array).max() < 1.6
    assert abs(photo.from_rgb(np.asarray(photo.rgb)).astype(int) - photo.array).max() <= 2


def test_profiles_that_do_not_fit(tmp_path):
    for profile in (narrow_profile(space=b"GRAY"), b"no profile at all", SRGB[:300]):
        Photo(picture(3), profile).save(tmp_path / "a.tif")
        found = Photo.open(tmp_path / "a.tif")
        assert found.profile == profile and np.array_equal(np.asarray(found.rgb), picture(3))
        assert "its colour profile does not fit its pixels: kept, not applied" in found.notes


def test_sixteen_bits_keep_the_precision_of_floats():
    photo = Photo(picture(3, np.uint16))
    values = np.random.default_rng(0).random((4, 4, 3))
    assert np.array_equal(photo.from_rgb(values), np.rint(values * 65535).astype(np.uint16))
    assert np.array_equal(photo.from_rgb(np.full((1, 1, 3), 255, np.uint8)), np.full((1, 1, 3), 65535))
    assert np.array_equal(np.asarray(photo.rgb), np.rint(photo.array / 257).astype(np.uint8))
    grey = Photo(picture(1, np.uint16))
    assert np.array_equal(grey.from_rgb(np.full((2, 3, 3), 0.25)), np.full((2, 3), round(0.25 * 65535)))


def test_a_transparent_picture_is_seen_on_white():
    assert np.asarray(Photo(np.zeros((4, 8, 4), np.uint8)).rgb).min() == 255
    assert np.asarray(Photo(np.zeros((4, 8, 2), np.uint16)).rgb).min() == 255


def test_other_pixels(tmp_path):
    photo = Photo(picture(4, np.uint16), SRGB)
    other = photo.with_picture(PIL.Image.new("RGB", (14, 10), (255, 0, 0)))
    assert other.size == (14, 10) and other.array.dtype == np.uint16 and (other.array[0, 0, :3] == (65535, 0, 0)).all()
    assert photo.with_array(photo.array[:2]).size == (7, 2) and photo.with_array(photo.array[:2]).profile == SRGB
    for array in (photo.array[..., :3], photo.array[:0]):
        with pytest.raises(ValueError, match=r"^array: expected"):
            photo.with_array(array)
    with pytest.raises(TypeError, match=r"^array: expected uint16"):
        photo.with_array(picture(4))
    with pytest.raises(ValueError, match=r"^rgb: expected"):
        photo.from_rgb(picture(1))
    with pytest.raises(TypeError, match=r"^rgb: expected"):
        photo.from_rgb(picture(3, np.uint16))


# damage


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def seeds():
    image = PIL.Image.fromarray(picture(3, size=(24, 20))).resize((30, 28))
    kinds = [("PNG", m) for m in ("1", "L", "LA", "RGB", "RGBA", "P")] + [("TIFF", m) for m in ("1", "RGB", "CMYK")]
    kinds += [("JPEG", m) for m in ("L", "RGB", "CMYK")] + [("WEBP", m) for m in ("RGB", "RGBA")]
    kinds += [("BMP", m) for m in ("1", "RGB", "P")] + [("GIF", "P"), ("PPM", "RGB")]
    for kind, mode in kinds:
        data = io.BytesIO()
        options = dict(exif=exif(_274=6), icc_profile=SRGB) if kind in ("PNG", "JPEG", "WEBP") else {}
        image.convert(mode).save(data, kind, **options)
        yield data.getvalue()
    for channels, write in itertools.product((2, 3, 4), (files._write_png16, files._write_tiff)):
        if (channels, write) != (2, files._write_tiff):
            data = io.BytesIO()
            write(data, picture(channels, np.uint16), Photo(picture(channels, np.uint16), SRGB, exif().tobytes()))
            yield data.getvalue()


@pytest.mark.slow
def test_damage_is_one_line(tmp_path, capfd):
    """Mutated files give pixels or an ImageFileError, and nothing on the screen."""
    chance, whole, refused = random.Random(0), list(seeds()), 0
    path = tmp_path / "a.png"
    for _ in range(600):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 120))
            kind = chance.randrange(4)
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1:
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 2:
                data[at : at + chance.randrange(1, 30)] = b""
            else:
                data[at : at + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
            data = data or bytearray(1)
        path.write_bytes(data)
        try:
            photo = Photo.open(path)
            photo.rgb.close()
            photo.save(tmp_path / "b.tif")
        except ImageFileError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 100 < refused < 590 and capfd.readouterr() == ("", "")


def test_bombs(tmp_path):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0" * 8)) + chunk(b"IEND", b"")
    zeros = zlib.compress(b"\0" * 70_000_000, 9)
    huge = head[:16] + struct.pack(">II", 60_000, 60_000)
    huge = head[:8] + chunk(b"IHDR", huge[16:24] + head[24:29]) + pixels
    for data in (head + chunk(b"zTXt", b"k\0\0" + zeros) + pixels, huge, head[:8] + chunk(b"IHDR", b"\0\0\0\5\0")):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ImageFileError, match=r"a.png: (the picture is|not a picture)"):
            Photo.open(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(head + chunk(b"iCCP", b"k\0\0" + zeros) + pixels)
    try:
        assert len(Photo.open(tmp_path / "a.png").profile or b"") < 2**26
    except ImageFileError:
        pass


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_no_program_is_started(tmp_path):
    """An EPS file by another name: Pillow's reader would look for Ghostscript on the PATH."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    code = (
        "import sys\nfrom specedit_kernels.images.files import Photo, ImageFileError\n"
        "try: Photo.open(sys.argv[1])\nexcept ImageFileError as e: print(e)"
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert "not a picture in a known format (PNG, JPEG" in done.stdout and done.stderr == ""
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name, words", [
    ("none.png", "no such file"), (".", "not a file"), ("x" * 300, "name too long"), ("a\0b", "cannot be read"),
    ("/dev/null", "not a file"), ("text.png/a.png", "cannot be read"),
])  # fmt: skip
def test_names_that_are_no_files(tmp_path, name, words):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageFileError, match=words):
        Photo.open(tmp_path / name)
    with pytest.raises(ImageFileError, match="not a picture"):
        Photo.open(tmp_path / "text.png")


# writing


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")
    for error in (OSError(28, "No space left on device"), ValueError("image too\nlarge"), MemoryError()):

        def breaks(file, error=error):
            file.write(b"half a pic")
            raise error

        with pytest.raises(ImageFileError, match=r"out.png: cannot be written") as raised:
            write_file(path, breaks)
        assert "\n" not in str(raised.value)
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["out.png"]
    with pytest.raises(KeyboardInterrupt):
        write_file(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_rights_are_kept(tmp_path):
    path = tmp_path / "out.png"
    write_file(path, lambda file: file.write(b"new"))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    write_file(path, lambda file: file.write(b"newer"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_bytes() == b"newer"


def test_targets(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("old.png")
    (tmp_path / "dangling.png").symlink_to("new.png")
    (tmp_path / "lost.png").symlink_to("none/new.png")
    assert check_target(tmp_path / "link.png") == tmp_path / "old.png"
    assert check_target(tmp_path / "dangling.png") == tmp_path / "new.png"
    assert check_target(tmp_path / ("n" * 255)).parent == tmp_path
    names = ["folder.png", "file", "old.png", "link.png", "dangling.png", "lost.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert (tmp_path / "old.png").read_bytes() == b"old"
    os.mkfifo(tmp_path / "pipe.png")
    wrong = {"folder.png": "is a folder", "file/a.png": "no such folder", "none/a.png": "no such folder",
             "lost.png": "no such folder", "pipe.png": "is a device", "n" * 256: "name too long",
             "/dev/null": "is a device", "a\0b": "cannot be written"}  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(ImageFileError, match=words):
            check_target(tmp_path / name)
    (tmp_path / "old.png").chmod(0o400)
    for name in ("old.png", "link.png"):
        with pytest.raises(ImageFileError, match="is read-only"):
            check_target(tmp_path / name)


def test_a_folder_without_rights(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ImageFileError, match="cannot be written"):
        check_target(tmp_path / "a.png")
    tmp_path.chmod(0o700)
