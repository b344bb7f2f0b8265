"""Image bytes <-> upright sRGB pixels, and the pixel geometry and ranges that the models expect.

The only place that opens image files. Input is PNG, JPEG, WebP or, with the extra `mgie[heic]`,
HEIC; the content decides, never a name. Whatever the file holds, `read_image` returns plain 8-bit RGB:

- EXIF (or XMP) orientation is applied, the embedded ICC profile is converted to sRGB; a damaged or
  unfitting profile is ignored, as browsers do. PNG's `gAMA`/`cHRM`/`cICP` chunks are ignored.
- Transparency (alpha channel, palette or colour key) is composited over white.
- 16-bit grey is scaled to 8 bit with rounding; of 16-bit colour the decoder keeps the high byte.
- CMYK goes through its profile if it has one. CMYK in JPEG is taken as inverted (Adobe's way).

Knows no model: which size the diffusion model works at is an argument. Thread-safe: consults none
of Pillow's global state (only its WebP decoder does: no more than 2 x `MAX_IMAGE_PIXELS`).

Axes: B batch, 3 colour channels (red, green, blue), H height, W width, S side of CLIP's square input.
Sizes written `wh` are (width, height) in pixels, as Pillow has them.
"""

import io
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.WebPImagePlugin import WebPImageFile

from mgie.config import SOFTWARE, ImageLimits, check_range
from mgie.errors import ConfigError, ImageError, ImageTooLargeError, MaskError

OutputFormat = Literal["png", "jpeg", "webp"]

ALLOWED_FORMATS = "PNG, JPEG, WebP, HEIC"
# What a folder is searched for; the content of a file decides what it is.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".webp", ".heic", ".heif", ".hif")
DEFAULT_LIMITS = ImageLimits()
DEFAULT_QUALITY: dict[OutputFormat, int] = {"jpeg": 95, "webp": 90}
# Limits of the formats.
MAX_OUTPUT_SIDE_PX: dict[OutputFormat, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}

AI_EDITED = "AI-edited image"
AI_EDITED_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"IPTC's term for a photo edited by a generative model"

# Start of file -> name shown to the user. The formats that are refused are listed only so that a message can name them.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"%PDF", "PDF"),
    (b"\0\0\x01\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"<", "SVG, HTML or XML"),
)
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1"}
_HEIC_SEQUENCE_BRANDS = {b"hevc", b"hevx", b"hevm", b"hevs", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}

# Encoders write about ten. A 12-byte scan can cost a pass over all pixels, so a file of the allowed size with
# a million of them would decode for hours.
_MAX_JPEG_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # not: escaped 0xFF, TEM, restart markers, fill bytes

# What the decoders of Pillow and pillow-heif raise for damaged files, found by fuzzing and reading their code.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
    EOFError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip

# EXIF orientation -> the transposition that puts the image upright (1 = already upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_DESCRIPTION, _EXIF_ORIENTATION, _EXIF_SOFTWARE = 0x010E, 0x0112, 0x0131
_EXIF_IFD, _EXIF_USER_COMMENT = 0x8769, 0x9286
_ASCII_COMMENT = b"ASCII\0\0\0"  # EXIF: a user comment begins with eight bytes that name its encoding

# ---- bytes -> pixels


def read_image(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decodes an untrusted file into an upright 8-bit sRGB image.

    The limits are checked on the header, before any pixel is decoded. HEIC files with several
    images give the primary one; a JPEG with more pictures behind the first (MPO) gives the first.

    Returns:
        Mode "RGB"; carries no metadata of the file.

    Raises:
        ImageTooLargeError: More bytes, pixels or pixels per side than `limits` allow.
        ImageError: Empty, unknown, not allowed, animated, truncated, damaged, or a side too short.
    """
    image, name = decode_image(data, limits=limits), str(detect_format(data))
    bit_depth = data[24] if name == "PNG" else 8  # byte 24 of a PNG: bits per channel, from its IHDR
    try:
        return _upright_rgb(image, bit_depth)
    except _DECODER_ERRORS as error:
        raise _damaged(name) from error


def decode_image(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The same in the file's own mode and orientation, with its transparency and metadata; errors as `read_image`."""
    image = _open(data, limits)
    name = str(detect_format(data))
    if name != "HEIC" and getattr(image, "is_animated", False):
        raise ImageError(f"image is an animated {name}; only still images can be edited", param="image")
    try:
        image.load()
    except _DECODER_ERRORS as error:
        raise _damaged(name) from error
    check_size(image.size, limits)  # again: a HEIC file can turn out larger than its header says
    return image


def read_mask(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decodes an untrusted PNG whose transparent pixels are to be edited, as OpenAI's clients send masks.

    Returns:
        Mode "L": 255 where alpha is 0, 0 where it is opaque.

    Raises:
        MaskError: It cannot be read or has no transparency.
    """
    name = detect_format(data)
    if name != "PNG":
        raise MaskError(f"mask is {name or 'of an unknown format'}; it must be a PNG with transparency", param="mask")
    try:
        image = decode_image(data, limits=limits)
    except ImageError as error:
        raise MaskError(f"mask cannot be used: {error}", param="mask") from error
    if not image.has_transparency_data:
        raise MaskError(f"mask is a PNG of mode {image.mode} without transparency; it must have some", param="mask")
    return _holes(image)


def to_mask(image: Image.Image, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Where a picture may change, from a mask of either convention, which stays as it is; errors as `to_rgb`.

    An image with transparent pixels means them: what is transparent is edited. An opaque one means its brightness:
    white is edited, black stays. Of a JPEG the last 3 % to either end count as the end: its black is never quite black.

    Returns:
        Mode "L", upright: 255 = edit, 0 = keep.
    """
    grey = to_rgb(image, limits=limits).convert("L")
    if image.has_transparency_data and (holes := _holes(image)).getextrema() != (0, 0):
        return holes
    return grey.point([0] * 8 + [*range(8, 248)] + [255] * 8) if image.format == "JPEG" else grey


def _holes(image: Image.Image) -> Image.Image:
    """The opposite of alpha, upright as the photo that it belongs to."""
    return _turned(ImageChops.invert(image.convert("RGBA").getchannel("A")), _orientation(image))


def to_rgb(image: Image.Image, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The same for an image that is already a Pillow object, of any mode; it stays as it is.

    Returns:
        As `read_image`.

    Raises:
        ImageTooLargeError: More pixels or pixels per side than `limits` allow.
        ImageError: A side too short, or pixels that cannot be decoded or converted.
    """
    check_size(image.size, limits)
    try:
        return _upright_rgb(image.copy(), bit_depth=8)
    except _DECODER_ERRORS as error:
        raise ImageError(
            f"image of mode {image.mode!r} cannot be decoded or converted: {error}", param="image"
        ) from error


def _upright_rgb(image: Image.Image, bit_depth: int) -> Image.Image:
    """Decoded pixels of any mode -> RGB, upright, without metadata; may change `image.info`."""
    orientation = _orientation(image)
    rgb = _turned(_to_rgb(image, bit_depth), orientation)
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image) -> object:
    """What EXIF says of it; a damaged block can hold anything, unhashable values included."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1  # the pixels are good; a damaged EXIF block is no reason to refuse them


def _turned(image: Image.Image, orientation: object) -> Image.Image:
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        return image.transpose(_UPRIGHT[orientation])
    return image


def detect_format(data: bytes) -> str | None:
    """Name of the file format by its first bytes, also of many formats that are not allowed; None: unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        major = data[8:12]
        length = int.from_bytes(data[:4], "big")
        compatible = {data[i : i + 4] for i in range(16, min(length, 256, len(data)), 4)}
        if major in _AVIF_BRANDS or (major == b"mif1" and compatible & _AVIF_BRANDS):
            return "AVIF"
        if major in _HEIC_SEQUENCE_BRANDS:
            return "HEIC sequence"
        return "HEIC" if major in _HEIC_BRANDS else "MP4 or another ISO media file"
    return next((name for magic, name in _SIGNATURES if data.startswith(magic)), None)


def check_size(wh: tuple[int, int], limits: ImageLimits) -> None:
    """Raises ImageTooLargeError or, for a side too short, ImageError unless `wh` is within `limits`."""
    width, height = wh
    if max(wh) > limits.max_side_px or min(wh) < limits.min_side_px:
        kind = ImageTooLargeError if max(wh) > limits.max_side_px else ImageError
        allowed = f"each side must be {limits.min_side_px} to {limits.max_side_px} px"
        raise kind(f"image is {width}x{height} px; {allowed}", param="image")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"image is {width}x{height} = {width * height} pixels; at most {limits.max_pixels} are allowed",
            param="image",
        )


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """Reads the header only and checks the limits.

    Calls the decoder's class instead of `PIL.Image.open`: that consults global state (registered
    plugins, `MAX_IMAGE_PIXELS`, the warnings filter), which is neither ours nor thread-safe.

    Raises:
        ImageTooLargeError, ImageError: As `read_image`.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"image is {len(data)} bytes; at most {limits.max_bytes} are allowed", param="image")
    if not data:
        raise ImageError(f"image is empty (0 bytes); allowed: {ALLOWED_FORMATS}", param="image")
    name = detect_format(data)
    try:
        match name:
            case "PNG":
                image: ImageFile.ImageFile = PngImageFile(io.BytesIO(data))
            case "JPEG":
                image = JpegImageFile(io.BytesIO(data))
                if _num_jpeg_scans(data) > _MAX_JPEG_SCANS:
                    raise ImageTooLargeError(
                        f"image is a JPEG of more than {_MAX_JPEG_SCANS} scans; at most {_MAX_JPEG_SCANS} are allowed",
                        param="image",
                    )
            case "WebP":
                check_size(_webp_size(data), limits)  # Pillow's decoder allocates the canvas as soon as it opens
                image = WebPImageFile(io.BytesIO(data))
            case "HEIC":
                image = _open_heic(data)
            case None:
                found = f"an unknown format (begins {data[:8].hex(' ')})"
                raise ImageError(f"image has {found}; allowed: {ALLOWED_FORMATS}", param="image")
            case _:
                raise ImageError(f"image is {name}; allowed: {ALLOWED_FORMATS}", param="image")
    except Image.DecompressionBombError as error:  # WebP only: Pillow's own limit, lower than `limits`
        raise ImageTooLargeError(f"image is larger than the {name} decoder allows", param="image") from error
    except _DECODER_ERRORS as error:
        raise _damaged(str(name)) from error
    check_size(image.size, limits)
    return image


def _open_heic(data: bytes) -> ImageFile.ImageFile:
    """Raises ImageError when the optional decoder is not installed."""
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError as error:
        raise ImageError("image is HEIC, which needs an extra: pip install 'mgie[heic]'", param="image") from error
    image: ImageFile.ImageFile = HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call]  # pillow-heif has no types
    return image


def _damaged(name: str) -> ImageError:
    return ImageError(f"image is a truncated or damaged {name} file; it cannot be decoded", param="image")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the header. Raises EOFError or ValueError if there is none.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    if len(data) < 30:
        raise EOFError("WebP header is cut off")
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise ValueError(f"unknown first chunk {kind!r}")


def _num_jpeg_scans(data: bytes) -> int:
    """Scans of the first picture, counted up to one more than allowed.

    Walks the segments: what follows the end marker (a phone's video clip, a depth map) does not count.
    """
    position, scans = 2, 0
    while scans <= _MAX_JPEG_SCANS and (marker := _JPEG_MARKER.search(data, position)):
        if marker[0] == b"\xff\xd9":  # end of image
            break
        scans += marker[0] == b"\xff\xda"  # start of scan
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


# ---- colour


def _to_rgb(image: Image.Image, bit_depth: int) -> Image.Image:
    """Any mode -> 8-bit sRGB, transparency over white. `bit_depth`: bits per channel in the file."""
    icc = image.info.get("icc_profile")
    alpha = None
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # resolves transparent palette entries
    elif "transparency" in image.info:
        alpha = _color_key_alpha(image, bit_depth)
        del image.info["transparency"]
    if image.mode in ("RGBA", "LA"):
        alpha = image.getchannel("A")

    if image.mode.startswith("I;16"):
        # 65535 / 255 = 257: rounded division. Pillow's own conversion would clip at 255.
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    rgb = _to_srgb(image, icc) if icc else image.convert("RGB")

    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _color_key_alpha(image: Image.Image, bit_depth: int) -> Image.Image:
    """Alpha from a PNG colour key: the one grey or RGB value that is transparent.

    Done here because Pillow compares the key, which has the file's bit depth, with 8-bit pixels.
    """
    pixels = np.asarray(image)
    key = np.asarray(image.info["transparency"], dtype=np.int64)  # () for grey, (3,) for RGB
    if pixels.dtype == np.bool_:
        key = key != 0
    elif pixels.dtype == np.uint8 and bit_depth == 16:
        key = key >> 8  # the decoder kept the high byte
    elif bit_depth < 8:
        key = key * 255 // (2**bit_depth - 1)
    is_key = pixels == key
    if is_key.ndim == 3:
        is_key = is_key.all(axis=-1)
    return Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Converts "L", "RGB" or "CMYK" by its profile; ignores a profile that is damaged or of another colour space."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip())
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")  # a grey file saved with the camera's RGB profile
        if mode == image.mode:
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        pass  # a profile is a hint on good pixels: without it they are taken as sRGB
    return image.convert("RGB")


# ---- pixels -> bytes


@dataclass(frozen=True, kw_only=True)
class EditMetadata:
    """What an edited image says about its making. The "AI-edited" mark is written in any case."""

    seed: int
    "seed of the edit"
    bundle: str
    "identity of the bundle"
    software: str = SOFTWARE
    "program and version"


def write_image(
    image: Image.Image,
    *,
    format: OutputFormat,  # noqa: A002  # the word that Pillow and the HTTP API use
    quality: int | None = None,
    metadata: EditMetadata | None = None,
) -> bytes:
    """Encodes an image; equal input gives equal bytes.

    Metadata that came with the source (location, camera, comments) is not written. The AI-edited mark
    and `metadata` are: as EXIF (which `read_metadata` reads back) and XMP in every format, and as text
    chunks in PNG, for the tools that know only those. `quality` is for JPEG and WebP only, 1 to 100,
    by default `DEFAULT_QUALITY`.

    Raises:
        ConfigError: Quality out of range, or given for PNG.
        ImageTooLargeError: A side is longer than the format can hold.
    """
    if quality is not None:
        if format == "png":
            raise ConfigError(f"quality is {quality}; png is lossless and takes none", param="quality")
        check_range("quality", quality, 1, 100)
    if max(image.size) > MAX_OUTPUT_SIDE_PX[format]:
        allowed = f"{format} holds at most {MAX_OUTPUT_SIDE_PX[format]} px per side"
        raise ImageTooLargeError(f"image is {image.width}x{image.height} px; {allowed}", param="format")

    clean = image.convert("RGB")
    clean.info = {}  # Pillow writes some of it (comment, ICC, XMP) without being asked
    fields = _metadata_fields(metadata)
    options: dict[str, Any] = {"exif": _exif(fields)}
    if format == "png":
        # `DigitalSourceType` and the like: PNG keywords are capitalised by convention.
        chunks = PngInfo()
        for name, value in fields.items():
            chunks.add_text(name.title().replace("_", ""), value)
        chunks.add_itxt("XML:com.adobe.xmp", _xmp(fields))
        options |= {"pnginfo": chunks}
    else:
        options |= {"xmp": _xmp(fields).encode(), "quality": DEFAULT_QUALITY[format] if quality is None else quality}
    out = io.BytesIO()
    clean.save(out, format=format, **options)
    return out.getvalue()


def read_metadata(data: bytes) -> dict[str, str]:
    """What `write_image` stored: `description`, `digital_source_type` and, if given, `seed`, `bundle`, `software`.

    Empty for an image that it did not write. Decodes no pixels, so it applies no limits.

    Raises:
        ImageError: Not an image of an allowed format.
    """
    unlimited = 2**63 - 1
    limits = ImageLimits(max_bytes=unlimited, max_pixels=unlimited, min_side_px=1, max_side_px=unlimited)
    image = _open(data, limits)
    try:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_EXIF_USER_COMMENT)
        if not isinstance(comment, bytes) or not comment.startswith(_ASCII_COMMENT):
            return {}
        fields = json.loads(comment.removeprefix(_ASCII_COMMENT))
    except _DECODER_ERRORS:
        return {}  # EXIF that is damaged or not ours
    if not isinstance(fields, dict) or fields.get("description") != AI_EDITED:
        return {}
    return {str(name): str(value) for name, value in fields.items()}


def _metadata_fields(metadata: EditMetadata | None) -> dict[str, str]:
    fields = {"description": AI_EDITED, "digital_source_type": AI_EDITED_SOURCE_TYPE}
    if metadata is not None:
        fields |= {"seed": str(metadata.seed), "bundle": metadata.bundle, "software": metadata.software}
    return fields


def _exif(fields: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = fields["description"]
    if "software" in fields:
        exif[_EXIF_SOFTWARE] = fields["software"]
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = _ASCII_COMMENT + json.dumps(dict(fields)).encode("ascii")
    return exif.tobytes()


def _xmp(fields: Mapping[str, str]) -> str:
    """An XMP packet with IPTC's machine-readable mark, which search engines and social networks look for."""
    attributes = [f"Iptc4xmpExt:DigitalSourceType={quoteattr(fields['digital_source_type'])}"]
    if "software" in fields:
        attributes.append(f"xmp:CreatorTool={quoteattr(fields['software'])}")
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'{" ".join(attributes)}/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def output_format(path: Path) -> OutputFormat:
    """The image format that a file name asks for.

    Raises:
        ImageError: It ends in none of .png, .jpg, .jpeg, .webp.
    """
    known: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if path.suffix.lower() not in known:
        raise ImageError(f"{path.name} does not end in one of {', '.join(known)}", param="out")
    return known[path.suffix.lower()]
