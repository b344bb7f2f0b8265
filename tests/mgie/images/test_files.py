"""What an upload becomes before the model sees it, and what leaves: claims of `mgie/images/files.py`."""

import ast
import io
import itertools
import json
import math
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from safetensors.torch import load_file

from mgie.config import ImageLimits
from mgie.errors import ConfigError, ImageError, ImageTooLargeError
from mgie.images import files, geometry
from mgie.images import pixels as tensors
from mgie.images.files import EditMetadata, read_image, read_metadata, write_image
from mgie.images.geometry import Framing, plan_framing
from mgie.images.pixels import ClipPixels

Pixels = npt.NDArray[np.uint8]
METADATA = EditMetadata(seed=7, bundle="tiny@0123abcd", software="mgie 0.1.0 <test>")
CLIP_CONFIG = {
    "size": 28,
    "crop_size": 28,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}


def noise(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int = 48, height: int = 40) -> Image.Image:
    """Colours that survive lossy compression nearly unchanged."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 4, y * 4, 200 - 2 * x], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def array(image: Image.Image) -> Pixels:
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, *, depth: int, color_type: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG by hand: for layouts that Pillow cannot write. `rows` without the filter bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    stride = len(rows) // height if height else 0
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height if rows else 0))
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(filtered))
        + chunk(b"IEND", b"")
    )


def icc_profile(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A minimal ICC v2 profile (ICC.1:2001-04, sections 6.1 and 6.2)."""
    offset = 128 + 4 + 12 * len(tags)
    table, bodies = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += struct.pack(">4sII", name, offset + len(bodies), len(body))
        bodies += body + b"\0" * (-len(body) % 4)
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    header = struct.pack(">I4sI4s4s4s", offset + len(bodies), b"test", 0x02100000, kind, space, pcs)
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + d50 + b"\0" * 48
    assert len(header) == 128
    return header + table + bodies


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


LINEAR = b"curv\0\0\0\0\0\0\0\0"  # a tone curve without points: the identity
D50 = xyz(0.9642, 1.0, 0.8249)
SRGB_RED, SRGB_GREEN, SRGB_BLUE = xyz(0.4361, 0.2225, 0.0139), xyz(0.3851, 0.7169, 0.0971), xyz(0.1431, 0.0606, 0.7141)


def rgb_profile(red: bytes, green: bytes, blue: bytes) -> bytes:
    tags = {
        b"rXYZ": red,
        b"gXYZ": green,
        b"bXYZ": blue,
        b"wtpt": D50,
        b"rTRC": LINEAR,
        b"gTRC": LINEAR,
        b"bTRC": LINEAR,
    }
    return icc_profile(b"RGB ", b"mntr", b"XYZ ", tags)


def cmyk_profile_of_black_cyan() -> bytes:
    """Inks of a press loaded wrongly: cyan is black (lightness 100 (1 - C)), the others leave no mark."""
    identity = bytes(range(256))
    clut = bytes([255, 128, 128]) * 8 + bytes([0, 128, 128]) * 8  # Lab at the corners of CMYK, cyan varying slowest
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + clut + identity * 3
    return icc_profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"wtpt": D50})


LINEAR_PROFILE = rgb_profile(SRGB_RED, SRGB_GREEN, SRGB_BLUE)
# 128 in linear light, encoded as sRGB: 255 (1.055 (128/255)^(1/2.4) - 0.055)
LINEAR_128_IN_SRGB = 188


# ---- reading


def test_lossless_files_give_their_exact_pixels_without_metadata() -> None:
    source = noise()
    for data in (
        saved(source, "PNG"),
        saved(source, "WEBP", lossless=True),
        saved(source, "PNG", comment="x", dpi=(9, 9)),
    ):
        image = read_image(data)
        np.testing.assert_array_equal(array(image), np.asarray(source))
        assert type(image) is Image.Image
        assert image.info == {}
        assert dict(image.getexif()) == {}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_files_give_nearly_their_pixels(kind: str) -> None:
    difference = array(read_image(saved(smooth(), kind, quality=95))).astype(int) - np.asarray(smooth())
    assert np.abs(difference).mean() < 2


# EXIF 2.32, tag 0x0112: what to do with the stored pixels to see the scene upright.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_in_every_format(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = UPRIGHT[orientation](np.asarray(noise()))
    np.testing.assert_array_equal(array(read_image(saved(noise(), "PNG", exif=exif))), expected)
    np.testing.assert_array_equal(array(read_image(saved(noise(), "WEBP", lossless=True, exif=exif))), expected)
    jpeg = array(read_image(saved(smooth(), "JPEG", quality=95, exif=exif))).astype(int)
    assert np.abs(jpeg - UPRIGHT[orientation](np.asarray(smooth()))).mean() < 2


def test_damaged_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x09", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(array(read_image(saved(noise(), "PNG", exif=exif))), np.asarray(noise()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colour_profile_is_converted_to_srgb(kind: str) -> None:
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    image = read_image(saved(grey, kind, icc_profile=LINEAR_PROFILE))
    assert np.abs(array(image).astype(int) - LINEAR_128_IN_SRGB).max() <= 1
    assert np.abs(array(read_image(saved(grey, kind))).astype(int) - 128).max() <= 1


def test_colour_profile_primaries_are_used() -> None:
    swapped = rgb_profile(SRGB_GREEN, SRGB_RED, SRGB_BLUE)
    image = read_image(saved(Image.new("RGB", (16, 16), (255, 0, 0)), "PNG", icc_profile=swapped))
    np.testing.assert_allclose(array(image)[0, 0], (0, 255, 0), atol=3)


def test_grey_profiles_apply_to_grey_images() -> None:
    linear_grey = icc_profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": LINEAR, b"wtpt": D50})
    for profile in (linear_grey, LINEAR_PROFILE):  # some programs store the RGB profile in a grey file
        for mode, value in (("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257)):
            image = read_image(saved(Image.new(mode, (16, 16), value), "PNG", icc_profile=profile))
            assert np.abs(array(image).astype(int) - LINEAR_128_IN_SRGB).max() <= 1, mode


def test_profile_applies_before_alpha_and_to_palettes() -> None:
    half = Image.new("RGBA", (16, 16), (128, 128, 128, 128))
    expected = (LINEAR_128_IN_SRGB * 128 + 255 * 127) / 255
    assert np.abs(array(read_image(saved(half, "PNG", icc_profile=LINEAR_PROFILE))) - expected).max() <= 1.5
    palette = Image.new("P", (16, 16))
    palette.putpalette([128, 128, 128])
    image = read_image(saved(palette, "PNG", icc_profile=LINEAR_PROFILE))
    assert np.abs(array(image).astype(int) - LINEAR_128_IN_SRGB).max() <= 1


def test_damaged_or_unfitting_profile_is_ignored() -> None:
    for profile in (b"not a profile", LINEAR_PROFILE[:150], cmyk_profile_of_black_cyan()):
        np.testing.assert_array_equal(
            array(read_image(saved(noise(), "PNG", icc_profile=profile))), np.asarray(noise())
        )


def test_cmyk_jpeg_is_read_the_right_way_round_and_through_its_profile() -> None:
    for ink, colour in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))):
        data = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
        assert b"Adobe" in data  # Adobe's convention: inks stored inverted
        np.testing.assert_allclose(array(read_image(data))[8, 8], colour, atol=2)
    # Lightness 49.8: Y = ((49.8 + 16) / 116)^3 = 0.1825, encoded as sRGB: 118.
    for ink, grey in (((0, 200, 200, 255), 255), ((255, 0, 0, 0), 0), ((128, 0, 99, 0), 118)):
        data = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100, icc_profile=cmyk_profile_of_black_cyan())
        np.testing.assert_allclose(array(read_image(data))[8, 8], grey, atol=2)


def test_alpha_is_composited_over_white() -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        image = Image.new("RGBA", (16, 16), (200, 0, 0, 51))  # 51 / 255 = 1/5
        np.testing.assert_allclose(array(read_image(saved(image, kind, **options)))[0, 0], (244, 204, 204), atol=1)
    image = Image.new("LA", (16, 16), (0, 51))
    np.testing.assert_allclose(array(read_image(saved(image, "PNG")))[0, 0], (204, 204, 204), atol=1)
    clear = Image.new("RGBA", (16, 16), (1, 2, 3, 0))
    np.testing.assert_array_equal(array(read_image(saved(clear, "PNG"))), 255)


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30, 40, 50, 60])
    palette.paste(2, (8, 0, 16, 16))
    image = array(read_image(saved(palette, "PNG")))
    assert image[0, 0].tolist() == [10, 20, 30]
    assert image[0, 15].tolist() == [40, 50, 60]
    image = array(read_image(saved(palette, "PNG", transparency=1)))  # one transparent index
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 15].tolist() == [40, 50, 60]
    image = array(read_image(saved(palette, "PNG", transparency=bytes([255, 255, 0]))))  # an alpha per index
    assert image[0, 0].tolist() == [10, 20, 30]
    assert image[0, 15].tolist() == [255, 255, 255]


def test_grey_and_one_bit_images() -> None:
    grey = noise().convert("L")
    np.testing.assert_array_equal(array(read_image(saved(grey, "PNG"))), np.asarray(grey.convert("RGB")))
    bits = noise().convert("1")
    np.testing.assert_array_equal(array(read_image(saved(bits, "PNG"))), np.asarray(bits.convert("RGB")))


def test_sixteen_bit_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 1024, dtype=np.uint16).reshape(32, 32)  # steps of 64: rounding shows
    image = array(read_image(saved(Image.fromarray(values), "PNG")))
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(image, np.stack([expected] * 3, axis=-1))

    colour = np.stack([values, values[::-1], values.T], axis=-1).astype(">u2")
    image = array(read_image(png(32, 32, depth=16, color_type=2, rows=colour.tobytes())))
    np.testing.assert_array_equal(image, colour >> 8)  # as documented: the high byte


def test_colour_key_transparency_is_compared_at_the_depth_of_the_file() -> None:
    first_transparent: list[tuple[str, bytes]] = [
        ("1 bit", png(16, 16, depth=1, color_type=0, rows=b"\x7f\xff" * 16, tRNS=b"\0\0")),
        ("2 bit", png(16, 16, depth=2, color_type=0, rows=b"\x15\x55\x55\x55" * 16, tRNS=b"\0\0")),
        ("2 bit, key 2", png(16, 16, depth=2, color_type=0, rows=b"\x95\x55\x55\x55" * 16, tRNS=b"\0\x02")),
        ("8 bit", png(16, 16, depth=8, color_type=0, rows=(b"\x07" + b"\x55" * 15) * 16, tRNS=b"\0\x07")),
        ("16 bit", png(16, 16, depth=16, color_type=0, rows=(b"\x12\x34" + b"\x12\x35" * 15) * 16, tRNS=b"\x12\x34")),
        ("RGB", png(16, 16, depth=8, color_type=2, rows=(b"\1\2\3" + b"\1\2\4" * 15) * 16, tRNS=b"\0\1\0\2\0\3")),
        ("RGB 16", png(16, 16, depth=16, color_type=2, rows=(b"\1\1" * 3 + b"\2\2" * 45) * 16, tRNS=b"\1\1" * 3)),
    ]
    for name, data in first_transparent:
        image = array(read_image(data))
        assert image[:, 0].min() == 255, name
        if name != "1 bit":  # there the others are white
            assert image[:, 1:].max() < 255, name


def test_jpeg_with_more_pictures_behind_the_first_gives_the_first() -> None:
    mpo = saved(smooth(), "MPO", save_all=True, append_images=[Image.new("RGB", (48, 40))])
    assert np.abs(array(read_image(mpo)).astype(int) - np.asarray(smooth())).mean() < 3


def test_heic_is_read_upright() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra mgie[heic] is not installed")
    exif = Image.Exif()
    exif[0x0112] = 6
    source = smooth(64, 48)
    out = io.BytesIO()
    pillow_heif.from_pillow(source).save(out, quality=95, exif=exif.tobytes())
    image = read_image(out.getvalue())
    assert image.size == (48, 64)
    assert np.abs(array(image).astype(int) - np.rot90(np.asarray(source), -1)).mean() < 3
    with pytest.raises(ImageError, match="truncated or damaged HEIC"):
        read_image(out.getvalue()[:-200])
    with pytest.raises(ImageTooLargeError, match="48x64 px"):
        read_image(out.getvalue(), limits=ImageLimits(max_side_px=40))


HEIC_START = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + b"\0" * 64


def test_heic_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)  # Python's way of "not installed"
    with pytest.raises(ImageError, match=r"mgie\[heic\]"):
        read_image(HEIC_START)


# ---- refusals


def animation(kind: str) -> bytes:
    return saved(noise(), kind, save_all=True, append_images=[noise(seed=1)], duration=100)


REFUSED = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "text": (b"hello, world", r"unknown format \(begins 68 65 6c"),
    "GIF": (saved(noise(), "GIF"), "image is GIF; allowed: PNG, JPEG, WebP, HEIC"),
    "BMP": (saved(noise(), "BMP"), "image is BMP"),
    "TIFF": (saved(noise(), "TIFF"), "image is TIFF"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is SVG"),
    "AVIF": (b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf", "image is AVIF"),
    "AVIF as mif1": (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "image is AVIF"),
    "MP4": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "image is MP4"),
    "HEIC sequence": (b"\0\0\0\x18ftyphevc\0\0\0\0hevcmif1", "image is HEIC sequence"),
    "damaged HEIC": (HEIC_START, "HEIC"),
    "APNG": (animation("PNG"), "animated PNG"),
    "animated WebP": (animation("WEBP"), "animated WebP"),
    "PNG start": (b"\x89PNG\r\n\x1a\n", "truncated or damaged PNG"),
    "JPEG start": (b"\xff\xd8\xff", "truncated or damaged JPEG"),
    "WebP start": (b"RIFF\x1a\0\0\0WEBPVP8L", "truncated or damaged WebP"),
    "narrow": (saved(Image.new("RGB", (12, 900)), "PNG"), "image is 12x900 px; each side must be 16 to 16384 px"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_file_gets_an_image_error_that_says_what_it_is(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(ImageError, match=message) as caught:
        read_image(data)
    assert caught.value.param == "image"
    assert not isinstance(caught.value, ImageTooLargeError)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_file_gets_an_image_error(kind: str) -> None:
    data = saved(noise(64, 64), kind)
    for percent in range(1, 96, 7):
        with pytest.raises(ImageError):
            read_image(data[: len(data) * percent // 100])


def bomb(kind: str, side: int) -> bytes:
    """A small file whose header claims side x side pixels."""
    if kind == "PNG":
        return png(side, side, depth=8, color_type=2, rows=b"")
    if kind == "JPEG":
        data = bytearray(saved(smooth(), "JPEG"))
        start = data.index(b"\xff\xc0")  # frame header: marker, length, precision, height, width
        data[start + 5 : start + 9] = struct.pack(">HH", side, side)
        return bytes(data)
    body = b"VP8X\x0a\0\0\0" + b"\0" * 4 + struct.pack("<I", side - 1)[:3] * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("side", [8000, 15_000, 60_000])  # above our limit; Pillow would warn; Pillow would raise
def test_decompression_bomb_is_refused_before_a_pixel_is_decoded(
    kind: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (loaded.append(image.format), load(image))[1])
    read_image(saved(smooth(), "PNG"))
    assert loaded  # where pixels are decoded, this is called
    loaded.clear()
    data = bomb(kind, side)
    assert len(data) < 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLargeError, match=f"image is {side}x{side}"):
            read_image(data)
    assert loaded == []


def test_jpeg_with_endless_scans_is_refused_but_a_clip_behind_the_picture_is_not() -> None:
    data = saved(smooth(), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageTooLargeError, match="more than 100 scans"):
        read_image(data[:-2] + last_scan * 200 + data[-2:])
    np.testing.assert_array_equal(array(read_image(data + b"\0\0" + b"\xff\xda\0\0" * 200)), array(read_image(data)))


def test_limits_are_those_given() -> None:
    data = saved(noise(64, 32), "PNG")
    read_image(data, limits=ImageLimits(max_bytes=len(data), max_pixels=64 * 32, min_side_px=32, max_side_px=64))
    with pytest.raises(ImageTooLargeError, match=rf"{len(data)} bytes; at most {len(data) - 1} "):
        read_image(data, limits=ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(ImageTooLargeError, match=r"64x32 = 2048 pixels; at most 2047 "):
        read_image(data, limits=ImageLimits(max_pixels=2047))
    with pytest.raises(ImageTooLargeError, match=r"64x32 px; each side must be 16 to 63 px"):
        read_image(data, limits=ImageLimits(max_side_px=63))
    with pytest.raises(ImageError, match=r"64x32 px; each side must be 33 to 16384 px"):
        read_image(data, limits=ImageLimits(min_side_px=33))


def test_pillows_global_limit_neither_matters_nor_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(saved(noise(), "PNG")).size == read_image(saved(noise(), "JPEG")).size == noise().size
        with pytest.raises(ImageTooLargeError):  # its WebP decoder checks on its own
            read_image(saved(noise(), "WEBP"))


SMALL = ImageLimits(max_bytes=20_000, max_pixels=100_000)
fuzzing = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def read_or_refuse(data: bytes) -> None:
    """Passes if `data` gives an RGB image or an ImageError; anything else propagates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF and the like
        try:
            image = read_image(data, limits=SMALL)
        except ImageError:
            return
    assert image.mode == "RGB"
    assert image.info == {}


def seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    rich = {"exif": exif.tobytes(), "icc_profile": LINEAR_PROFILE}
    palette = noise().quantize(8)
    result = [
        saved(noise(), "PNG", **rich),
        saved(noise(), "JPEG", **rich),
        saved(noise(), "JPEG", progressive=True),
        saved(noise(), "WEBP", lossless=True, **rich),
        saved(noise(), "WEBP"),
        saved(palette, "PNG", transparency=3),
        saved(Image.new("CMYK", (20, 20)), "JPEG", icc_profile=cmyk_profile_of_black_cyan()),
        png(16, 16, depth=16, color_type=0, rows=bytes(512), tRNS=b"\0\1", iTXt=b"XML:com.adobe.xmp\0\0\0\0\0<x/>"),
        animation("PNG"),
        animation("WEBP"),
        HEIC_START,
    ]
    try:
        import pillow_heif
    except ImportError:
        return result
    out = io.BytesIO()
    pillow_heif.from_pillow(noise(64, 64)).save(out)
    return [*result, out.getvalue()]


SEEDS = seeds()


@fuzzing
@given(st.sampled_from([seed[:n] for seed, n in itertools.product(SEEDS, (0, 4, 12, 33))]), st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_image_error(start: bytes, rest: bytes) -> None:
    read_or_refuse(start + rest)


@fuzzing
@given(st.sampled_from(SEEDS), st.integers(0, 2**32))
def test_mutated_files_raise_nothing_but_image_error(data: bytes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mutated = bytearray(data)
    # Half of the edits hit the first 700 bytes, where the headers, EXIF and profiles are.
    for _ in range(rng.integers(1, 6)):
        reach = len(mutated) if rng.random() < 0.5 else min(700, len(mutated))
        at = int(rng.integers(0, max(1, reach)))
        match rng.integers(0, 4):
            case 0:
                mutated[at : at + 1] = rng.bytes(1)
            case 1:
                mutated[at : at + 4] = struct.pack(">I", int(rng.choice([0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1])))
            case 2:
                del mutated[at : at + int(rng.integers(1, 40))]
            case 3:
                mutated[at:at] = rng.bytes(int(rng.integers(1, 40)))
    if mutated[:4] == b"\x89PNG" and rng.random() < 0.8:
        mutated = repair_crcs(bytes(mutated))
    read_or_refuse(bytes(mutated))


def repair_crcs(data: bytes) -> bytearray:
    """Right checksums for the chunks of a mutated PNG, so that the mutation gets past them."""
    out, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 4 : position + 8 + length]
        out += data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body))
        position += 12 + length
    return out


# ---- writing


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_reads_back_with_its_metadata_and_equal_input_gives_equal_bytes(kind: files.OutputFormat) -> None:
    data = write_image(smooth(), format=kind, metadata=METADATA)
    assert data == write_image(smooth(), format=kind, metadata=METADATA)
    assert files.detect_format(data) == {"png": "PNG", "jpeg": "JPEG", "webp": "WebP"}[kind]
    assert np.abs(array(read_image(data)).astype(int) - np.asarray(smooth())).mean() < 2
    assert read_metadata(data) == {
        "description": "AI-edited image",
        "digital_source_type": files.AI_EDITED_SOURCE_TYPE,
        "seed": "7",
        "bundle": "tiny@0123abcd",
        "software": "mgie 0.1.0 <test>",
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_is_marked_in_exif_and_xmp_even_without_metadata(kind: files.OutputFormat) -> None:
    data = write_image(smooth(), format=kind)
    assert read_metadata(data) == {
        "description": "AI-edited image",
        "digital_source_type": files.AI_EDITED_SOURCE_TYPE,
    }
    with Image.open(io.BytesIO(data)) as image:  # by Pillow, as another program would
        image.load()
        assert image.getexif()[0x010E] == "AI-edited image"
        xmp = image.info.get("xmp") or image.info["XML:com.adobe.xmp"].encode()
    assert f'Iptc4xmpExt:DigitalSourceType="{files.AI_EDITED_SOURCE_TYPE}"'.encode() in xmp


def test_png_output_has_text_chunks() -> None:
    with Image.open(io.BytesIO(write_image(smooth(), format="png", metadata=METADATA))) as image:
        text = dict(image.text)
    del text["XML:com.adobe.xmp"]
    assert text == {
        "Description": "AI-edited image",
        "DigitalSourceType": files.AI_EDITED_SOURCE_TYPE,
        "Seed": "7",
        "Bundle": "tiny@0123abcd",
        "Software": "mgie 0.1.0 <test>",
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_location_camera_and_comments_of_the_source_do_not_get_out(kind: files.OutputFormat) -> None:
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)  # GPS latitude
    source = smooth()
    source.info |= {
        "exif": exif.tobytes(),
        "comment": b"SecretComment",
        "xmp": b"<SecretXmp/>",
        "XML:com.adobe.xmp": "<SecretXmp/>",
        "icc_profile": b"SecretProfile",
        "Title": "SecretTitle",
        "dpi": (72, 72),
    }
    assert b"SecretCamera" in saved(source, "JPEG", exif=exif)  # the trap works
    data = write_image(source, format=kind, metadata=METADATA)
    assert b"Secret" not in data
    with Image.open(io.BytesIO(data)) as image:
        assert dict(image.getexif().get_ifd(0x8825)) == {}
        assert "icc_profile" not in image.info
    assert source.info["comment"] == b"SecretComment"  # the caller's image is left as it was


def test_read_metadata_of_foreign_files() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + json.dumps({"seed": "1"}).encode()
    assert read_metadata(saved(noise(), "PNG")) == {} == read_metadata(saved(noise(), "JPEG", exif=exif))
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0{not json"
    assert read_metadata(saved(noise(), "JPEG", exif=exif)) == {}
    with pytest.raises(ImageError, match="unknown format"):
        read_metadata(b"hello")


def test_quality_and_size_are_checked() -> None:
    assert len(write_image(noise(), format="jpeg", quality=5)) < len(write_image(noise(), format="jpeg"))
    assert len(write_image(noise(), format="webp", quality=5)) < len(write_image(noise(), format="webp"))
    for quality in (0, 101):
        with pytest.raises(ConfigError, match=f"quality is {quality}; it must be 1 to 100"):
            write_image(noise(), format="jpeg", quality=quality)
    with pytest.raises(ConfigError, match="png is lossless"):
        write_image(noise(), format="png", quality=50)
    with pytest.raises(ImageTooLargeError, match="webp holds at most 16383 px"):
        write_image(Image.new("RGB", (16_384, 16)), format="webp")


# ---- framing

sides = st.integers(1, 16_384)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sides, sides, st.sampled_from([(512 * 512, 64), (64 * 64, 8), (256 * 256, 32), (128 * 128, 64), (100, 10)]))
def test_work_size_is_a_multiple_near_the_work_area(width: int, height: int, work: tuple[int, int]) -> None:
    area, multiple = work
    framing = plan_framing((width, height), work_area_px=area, multiple_px=multiple)
    work_width, work_height = framing.work_wh
    assert work_width % multiple == work_height % multiple == 0
    assert min(framing.work_wh) >= multiple
    assert work_width * work_height <= 1.1 * area
    assert max(framing.work_wh) <= 1.1 * area / multiple
    cells = area // multiple**2
    ratio = max(width / height, height / width)
    if cells >= 16 and ratio <= math.sqrt(cells) / 2:  # from about two cells on the shorter side there is a choice
        assert work_width * work_height >= 0.6 * area
        assert 0.7 < (work_width / work_height) / (width / height) < 1.43
    assert framing.output_wh == (width, height)


def test_work_sizes_of_common_photos() -> None:
    def work(width: int, height: int, **options: bool) -> tuple[int, int]:
        return plan_framing((width, height), work_area_px=512 * 512, multiple_px=64, **options).work_wh

    assert work(512, 512) == work(3000, 3000) == work(16, 16) == (512, 512)
    assert work(4032, 3024) == (576, 448)
    assert work(3024, 4032) == (448, 576)
    assert work(1920, 1080) == (704, 384)
    assert work(6000, 4000) == (576, 384)
    assert work(16_384, 16) == (64 * 70, 64)
    assert work(16, 16_384) == (64, 64 * 70)
    assert work(1920, 1080, square_crop=True) == (512, 512)


def test_impossible_work_area_is_refused() -> None:
    with pytest.raises(ConfigError, match="work_area_px is 4095; it must be at least multiple_px squared = 4096"):
        plan_framing((10, 10), work_area_px=4095, multiple_px=64)
    with pytest.raises(ConfigError, match="multiple_px is 0"):
        plan_framing((10, 10), work_area_px=4095, multiple_px=0)


@pytest.mark.parametrize("square_crop", [False, True])
@pytest.mark.parametrize("wh", [(97, 64), (64, 113), (300, 20), (64, 64)])
def test_result_has_the_size_and_framing_of_the_source(wh: tuple[int, int], square_crop: bool) -> None:
    width, height = wh
    y, x = np.mgrid[0:height, 0:width]
    gradient = np.stack([x * 255 / width, y * 255 / height, np.full((height, width), 90)], axis=-1).astype(np.uint8)
    source = Image.fromarray(gradient)
    framing = plan_framing(wh, work_area_px=128 * 128, multiple_px=16, square_crop=square_crop)
    pixels = tensors.to_work(source, framing)
    assert pixels.shape == (3, framing.work_wh[1], framing.work_wh[0])
    assert pixels.dtype == torch.float32
    result = tensors.from_work(pixels, framing)
    expected = geometry.center_square(source) if square_crop else source
    assert result.size == expected.size == framing.output_wh
    # The gradient returns to its place: neither shifted, mirrored nor cropped.
    assert np.abs(array(result).astype(int) - np.asarray(expected)).max() <= 6


def test_work_at_the_source_size_changes_nothing() -> None:
    source = noise(64, 64)
    framing = plan_framing(source.size, work_area_px=64 * 64, multiple_px=8)
    assert framing == Framing((64, 64), (64, 64), False)
    np.testing.assert_array_equal(
        array(tensors.from_work(tensors.to_work(source, framing), framing)), np.asarray(source)
    )


def test_center_square_leaves_the_odd_pixel_right_or_below() -> None:
    source = np.asarray(noise(21, 18))
    np.testing.assert_array_equal(array(geometry.center_square(Image.fromarray(source))), source[:, 1:19])
    tall = source.transpose(1, 0, 2).copy()
    np.testing.assert_array_equal(array(geometry.center_square(Image.fromarray(tall))), tall[1:19])


# ---- tensors


def test_every_byte_survives_the_signed_range() -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    signed = tensors.to_signed(Image.fromarray(ramp))
    expected = (2 * ramp.astype(np.float64) / 255 - 1).astype(np.float32).transpose(2, 0, 1)
    np.testing.assert_array_equal(signed.numpy(), expected)
    assert signed.min() == -1
    assert signed.max() == 1
    assert signed.is_contiguous()
    np.testing.assert_array_equal(array(tensors.from_signed(signed)), ramp)
    np.testing.assert_array_equal(tensors.to_uint8(signed.to(torch.float16)).numpy(), ramp)


def test_values_outside_the_signed_range_are_clipped() -> None:
    pixels = torch.tensor([-7.0, 7.0, 0.0, 0.999]).reshape(1, 2, 2).expand(3, 2, 2)
    assert tensors.to_uint8(pixels)[..., 0].flatten().tolist() == [0, 255, 128, 255]


def test_clip_pixels_are_resized_cropped_and_normalised() -> None:
    wide, tall = noise(90, 40), noise(30, 77, seed=1)
    pixels = ClipPixels(CLIP_CONFIG)([wide, tall])
    assert pixels.shape == (2, 3, 28, 28)
    assert pixels.dtype == torch.float32
    for got, image, (resized_wh, box) in zip(
        pixels,
        (wide, tall),
        (((63, 28), (17, 0, 45, 28)), ((28, 71), (0, 21, 28, 49))),
        strict=True,
    ):
        crop = np.asarray(image.resize(resized_wh, Image.Resampling.BICUBIC).crop(box)) / 255
        expected = (crop - CLIP_CONFIG["image_mean"]) / CLIP_CONFIG["image_std"]
        np.testing.assert_allclose(got.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_clip_pixels_accept_both_forms_of_sizes() -> None:
    new_form = CLIP_CONFIG | {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    old, new = ClipPixels(CLIP_CONFIG), ClipPixels(new_form)
    assert old.side_px == new.side_px == 28
    torch.testing.assert_close(old([noise()]), new([noise()]), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="28x20 px; it must centre-crop to a square"):
        ClipPixels(CLIP_CONFIG | {"crop_size": {"height": 20, "width": 28}})


def test_clip_pixels_of_a_slender_image_are_those_of_its_middle() -> None:
    y, x = np.mgrid[0:16, 0:16_000]
    strip = Image.fromarray(np.stack([x % 251, y * 9, (x // 64) % 256], axis=-1).astype(np.uint8))
    trimmed = ClipPixels(CLIP_CONFIG)([strip])
    whole = ClipPixels(CLIP_CONFIG)._processor(images=[strip], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(trimmed, whole, rtol=0, atol=0.02)


def test_importing_images_does_not_import_transformers() -> None:
    assert files.__file__
    tree = ast.parse(Path(files.__file__).read_text())
    top_level = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert top_level
    assert not any("transformers" in line or "pillow_heif" in line for line in top_level)


# ---- recorded vectors


@pytest.fixture(scope="module")
def vectors(reference_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(reference_dir / "vectors.safetensors")


@pytest.fixture(scope="module")
def reference_image(reference_dir: Path) -> Callable[[str], Image.Image]:
    return lambda name: read_image((reference_dir / "images" / f"{name}.png").read_bytes())


def test_recorded_crops_are_equal(
    vectors: dict[str, torch.Tensor], reference_image: Callable[[str], Image.Image]
) -> None:
    names = sorted({name.split(".")[1] for name in vectors if name.startswith("pre.")})
    assert len(names) == 5
    for name in names:
        source = reference_image(name)
        small = geometry.resize(geometry.center_square(source), (64, 64))
        np.testing.assert_array_equal(array(small), vectors[f"pre.{name}.crop_resize64"].numpy())
        chain = geometry.training_pixels(source, 64)
        np.testing.assert_array_equal(array(chain), vectors[f"pre.{name}.train_chain"].numpy())
        if f"pre.{name}.img2npy" in vectors:
            assert torch.equal(tensors.to_signed(small), vectors[f"pre.{name}.img2npy"])
    large = geometry.resize(geometry.center_square(reference_image("pre_0")), (512, 512))
    corner = vectors["pre.pre_0.crop_resize512_corner"].numpy()
    np.testing.assert_array_equal(array(large)[:96, :96], corner)


def test_recorded_training_pixels_are_equal(
    vectors: dict[str, torch.Tensor], reference_image: Callable[[str], Image.Image]
) -> None:
    for tensor, kind in (("train.p2p_inp", "inp"), ("train.p2p_ans", "ans")):
        sources = [reference_image(f"train_{i}_{kind}") for i in range(3)]
        got = torch.stack([tensors.to_signed(geometry.training_pixels(source, 64)) for source in sources])
        assert torch.equal(got, vectors[tensor])


def test_recorded_clip_pixels_are_equal(
    vectors: dict[str, torch.Tensor], reference_image: Callable[[str], Image.Image], reference_dir: Path
) -> None:
    clip_pixels = ClipPixels(json.loads((reference_dir / "clip" / "preprocessor_config.json").read_text()))
    squares = [geometry.center_square(reference_image(f"train_{i}_inp")) for i in range(3)]
    assert torch.equal(clip_pixels([geometry.resize(s, (512, 512)) for s in squares]), vectors["train.pixel_values"])
    raw = clip_pixels([reference_image(f"gen_{i}") for i in range(4)])
    assert torch.equal(raw, torch.stack([vectors[f"gen{i}.pixel_values"] for i in range(4)]))


def test_recorded_diffusion_images_are_equal(
    vectors: dict[str, torch.Tensor], reference_image: Callable[[str], Image.Image]
) -> None:
    for i in range(4):
        source = reference_image(f"gen_{i}")
        framing = plan_framing(source.size, work_area_px=64 * 64, multiple_px=8, square_crop=True)
        work = tensors.to_uint8(tensors.to_work(source, framing))
        assert torch.equal(work, vectors[f"gen{i}.sd_image"])


# ---- real photos


def test_real_photos_keep_their_size(sample_photos: Path) -> None:
    files = sorted((sample_photos / "demo_inputs").glob("*.jpg"))
    assert len(files) == 10
    for file in files:
        source = read_image(file.read_bytes())
        framing = plan_framing(source.size, work_area_px=256 * 256, multiple_px=64)
        result = tensors.from_work(tensors.to_work(source, framing), framing)
        assert result.size == source.size == (512, 512)
        assert np.abs(array(result).astype(int) - np.asarray(source)).mean() < 16  # blurred, not displaced
        assert read_image(write_image(result, format="jpeg", metadata=METADATA)).size == source.size
