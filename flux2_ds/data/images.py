"""Decode images to 8-bit sRGB, and crop them, their masks and their references to a bucket."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, features

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN
from flux2_ds.errors import UserError

_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF"]
"""Pillow tries no other: some of its formats start programs, such as Ghostscript for EPS."""
_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
if features.check("avif"):
    _FORMATS.append("AVIF")
    _SUFFIXES.add(".avif")
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    _FORMATS.append("HEIF")
    _SUFFIXES |= {".heic", ".heif", ".hif"}
SUFFIXES = frozenset(_SUFFIXES)
"""Of the images that are read."""
_CONVERT = "convert it to JPEG or PNG"
_UNREAD = {
    **dict.fromkeys(
        (".heic", ".heif", ".hif"), "install pillow-heif, or convert it to JPEG or PNG"
    ),
    **dict.fromkeys((".avif", ".jxl", ".gif", ".jp2", ".svg", ".eps", ".psd", ".xcf"), _CONVERT),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), _CONVERT),
}
"""What to do with images that are not read."""
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
    struct.error, NotImplementedError,
)  # fmt: skip
"""What Pillow raises where a file is not as it should be."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MASK_ASPECT, _REFERENCE_ASPECT = 0.02, 0.005
"""By so much the proportions of a mask, and of a reference that is aligned, may differ from the image's."""
DAMAGED_PROFILE = "a color profile that is not applied"
ALIGNED = "references that are aligned with the image"
OWN_SIZE = "references of other proportions, which keep their own size"
"""Notes on an image that is used; details follow a colon."""
# What Pillow warns of is an error here (`_open`): filters of warnings are not for threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImageError(Exception):
    """An image that cannot be used; the message is the reason."""


class BlackMaskError(UnreadableImageError):
    """A crop that has nothing to train on."""


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, one that is not read included."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES | _UNREAD.keys()


def why_unread(name: str) -> str | None:
    """Why a file that is an image by its name is not read; None if it is."""
    suffix = PurePosixPath(name).suffix.lower()
    return None if suffix in SUFFIXES else f"{suffix} is not read: {_UNREAD[suffix]}"


def check_format(option: str, path: Path) -> None:
    """Refuse to write an image in no format that can be written."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(
            f"{option} {path}: no image format has the suffix {path.suffix!r}. Use .png, .jpg or .webp."
        )


def image_size(content: bytes | str) -> tuple[int, int]:
    """(width, height) as shown, that is, after the EXIF orientation.

    `content` is an encoded image or the path of one, of which the header alone is read.
    """
    with _open(content) as image:
        width, height = image.size
        turned = _orientation(image) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def load_cropped(
    content: bytes | str, bucket: Bucket, notes: list[str] | None = None, place: float = 0.5
) -> NDArray[np.uint8]:
    """Decode, resize to cover the bucket and crop; uint8 [height, width, 3].

    `place` of the crop: 0.5 is the center, 0 left or top, 1 right or bottom. Raises `UnreadableImageError` with the decoder's reason, as all of these do. What else there is to
    say is added to `notes`.
    """
    return np.asarray(cover(load_upright(content, notes), bucket, place))


def load_upright(content: bytes | str, notes: list[str] | None = None) -> Image.Image:
    """Decode, orient and convert to 8-bit sRGB; transparent parts become white, as viewers show them."""
    decoded = _upright(content)
    image = _to_srgb(_eight_bits(decoded), decoded.info, [] if notes is None else notes)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def load_mask(
    content: bytes | str, image: tuple[int, int], bucket: Bucket, place: float = 0.5
) -> NDArray[np.float32]:
    """A mask on the grid of image tokens, cropped like its image of `image` (width, height) px.

    White is 1, black and transparent 0, and a token has the mean of its 16 × 16 px; float32
    [height / 16, width / 16]. One that is black all over, or has other proportions than the image, is
    unreadable.
    """
    mask = _eight_bits(_upright(content))
    if not _similar(mask.size, image, _MASK_ASPECT):
        raise UnreadableImageError(
            f"its mask is {mask.width}x{mask.height} px, the image {image[0]}x{image[1]}: "
            "the proportions differ"
        )
    if mask.has_transparency_data:
        rgba = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return _weights(mask.convert("L"), bucket, place)


def load_alpha(
    content: bytes | str, bucket: Bucket, place: float = 0.5
) -> NDArray[np.float32] | None:
    """The transparency of an image as its mask, like `load_mask`; None if nothing is transparent."""
    image = _eight_bits(_upright(content))
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else _weights(alpha, bucket, place)


def _weights(mask: Image.Image, bucket: Bucket, place: float) -> NDArray[np.float32]:
    cells = (bucket.width // PIXELS_PER_TOKEN, bucket.height // PIXELS_PER_TOKEN)
    gray = mask.convert("F")  # in floating point, so that means are not rounded
    fitted = ImageOps.fit(gray, cells, Image.Resampling.BOX, centering=(place, place))
    weights = np.asarray(fitted, dtype=np.float32) / np.float32(255)
    if not weights.any():
        raise BlackMaskError("its mask is black all over: nothing to train on")
    return weights


def is_aligned(reference: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a reference has the proportions of its image: it is scaled and cropped like that, so that the same
    point is at the same place in both. (width, height) in px each."""
    return _similar(reference, image, _REFERENCE_ASPECT)


def load_reference(
    content: bytes | str, bucket: Bucket, resolution: int = 1024, notes: list[str] | None = None
) -> NDArray[np.uint8]:
    """The middle of a reference of its own size, as inference takes it: made smaller if it has more than resolution²
    px; uint8 [height, width, 3]."""
    reference = load_upright(content, notes)
    scale = resolution / math.sqrt(reference.width * reference.height)
    if scale < 1:
        sides = int(reference.width * scale), int(reference.height * scale)
        reference = reference.resize(sides, Image.Resampling.LANCZOS)
    left = (reference.width - bucket.width) // 2
    top = (reference.height - bucket.height) // 2
    return np.asarray(reference.crop((left, top, left + bucket.width, top + bucket.height)))


def reference_bucket(
    reference: tuple[int, int],
    image: tuple[int, int],
    bucket: Bucket,
    resolution: int = 1024,
    step: int = PIXELS_PER_TOKEN,
) -> Bucket:
    """What a reference is cropped to, of at most about resolution² px.

    One that is aligned with its image, which goes to `bucket`, has the size of that. Any other keeps its own, as in
    inference: smaller if it is too large, sides cut to multiples of `step`.
    """
    sides, aligned = reference[::-1], is_aligned(reference, image)
    if aligned:
        sides, step = (bucket.height, bucket.width), PIXELS_PER_TOKEN
    scale = min(1.0, resolution / math.sqrt(sides[0] * sides[1]))
    height, width = (
        max(1, round(side * scale / step)) if aligned else int(side * scale) // step
        for side in sides
    )
    if not width or not height:
        raise UnreadableImageError(
            f"its reference image of {reference[0]}x{reference[1]} px is too small: each side must have {step} px"
        )
    return Bucket(step * height, step * width)


def _similar(one: tuple[int, int], other: tuple[int, int], tolerance: float) -> bool:
    """Whether two sizes have the same proportions."""
    return abs(math.log(one[0] * other[1] / (one[1] * other[0]))) <= tolerance


def cover(image: Image.Image, bucket: Bucket, place: float = 0.5) -> Image.Image:
    """Resize to cover the bucket, and crop."""
    size, centering = (bucket.width, bucket.height), (place, place)
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=centering)


def _upright(content: bytes | str) -> Image.Image:
    """A decoded image, turned as its EXIF orientation says."""
    with _open(content) as image:
        turn = _TURNS.get(_orientation(image))
        try:
            image.load()
        except _BROKEN as error:
            raise UnreadableImageError(str(error)) from error
        return image.copy() if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """By what stands before the pixels; 1, upright, if that is damaged, for the pixels need not be."""
    if image.format == "TIFF":  # which Pillow turns itself
        return 1
    try:
        # A PNG's own method would decode it, to look for EXIF behind the pixels as well.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except _BROKEN:
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, which makes scans white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"pixel format {image.mode} (32 bits a channel) has no scale")
    return image


def _open(content: bytes | str) -> Image.Image:
    if not content:
        raise UnreadableImageError("the file is empty")
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        image = Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image that is read ({', '.join(_FORMATS)})") from error
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(_too_large()) from error
    except _BROKEN as error:
        raise UnreadableImageError(str(error)) from error
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        image.close()
        raise UnreadableImageError(_too_large())
    if image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "n_frames", 1) > 1:
        image.close()  # TIFF, MPO and HEIF have pages: there the first is the image
        raise UnreadableImageError("animated")
    return image


def _too_large() -> str:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return f"more than {limit:.0f} megapixels, as decompression bombs have: make it smaller"


def _to_srgb(image: Image.Image, info: dict[Any, Any], notes: list[str]) -> Image.Image:
    """Convert pixels by their color profile, or by a PNG's gamma and primaries; alpha stays."""
    try:
        profile = info.get("icc_profile") or _png_profile(info)
        conversion = _conversion(profile, _COLOR_SPACES.get(image.mode, "RGB")) if profile else None
    except (ImageCms.PyCMSError, OSError, ValueError, ArithmeticError) as error:
        notes.append(f"{DAMAGED_PROFILE}: {error}")
        return image
    if conversion is None:
        return image
    mode, transform = conversion
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


_COLOR_SPACES = {"L": "GRAY", "LA": "GRAY", "1": "GRAY", "CMYK": "CMYK"}


@lru_cache(64)
def _conversion(profile: bytes, pixels: str) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The mode that pixels must have for a transform to sRGB, and the transform; None if they are sRGB."""
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    if mode is None or (space != pixels and not (space == "RGB" and pixels == "GRAY")):
        raise ValueError(f"it is for {space} pixels, and these are {pixels}")
    # Optimized, a steep curve of gray is off by 7 levels in the dark.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", flags=flags)
    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(colors).convert(mode)
        found = ImageCms.applyTransform(probe, transform)
        assert found is not None
        change = np.asarray(found, np.int16) - np.asarray(probe.convert("RGB"), np.int16)
        if abs(change).max() <= 1:  # by rounding
            return None
    return mode, transform


_SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def _png_profile(info: dict[Any, Any]) -> bytes | None:
    """An ICC profile of a PNG's gAMA and cHRM; None without them, or if they are sRGB's."""
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if "srgb" in info or (gamma is None and primaries is None):
        return None
    if gamma is not None and not 0.05 < gamma < 20:
        raise ValueError(f"gamma {gamma}")
    primaries = primaries or _SRGB_PRIMARIES
    close = bool(np.allclose(primaries, _SRGB_PRIMARIES, rtol=0, atol=0.002))
    # Writers say 1/2.2 when they mean sRGB's curve, which is near it.
    if close and (gamma is None or abs(gamma * 2.2 - 1) < 0.05):
        return None
    return _matrix_profile(tuple(primaries), None if gamma is None else 1 / gamma)


def _matrix_profile(primaries: tuple[float, ...], exponent: float | None) -> bytes:
    """An ICC profile (version 4.2) of primaries, as x and y of white, red, green and blue, and of an exponent
    or sRGB's curve."""
    xyz = np.array(
        [[x / y, 1, (1 - x - y) / y] for x, y in zip(*[iter(primaries)] * 2, strict=True)]
    ).T
    white, colors = xyz[:, 0], xyz[:, 1:]
    colors = colors * np.linalg.solve(colors, white)  # together they make white
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    colors = np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ colors

    def numbers(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"para" + bytes(4) + (
        struct.pack(">HH", 3, 0) + numbers(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        if exponent is None
        else struct.pack(">HH", 0, 0) + numbers(exponent)
    )  # fmt: skip
    tags = {b"wtpt": b"XYZ " + bytes(4) + numbers(*_D50)}
    for name, color in zip((b"r", b"g", b"b"), colors.T, strict=True):
        tags[name + b"XYZ"] = b"XYZ " + bytes(4) + numbers(*color)
        tags[name + b"TRC"] = curve
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">II", start + len(body), 0) + bytes.fromhex("04200000") + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + numbers(*_D50)
    return head.ljust(128, b"\0") + table + body
