"""Pictures: measure, decode, crop to a bucket, and show many on a sheet."""

from __future__ import annotations

import io
import math
import struct
import warnings
from pathlib import Path, PurePosixPath

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN
from flux2_ds.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
UNREAD = frozenset({
    ".heic", ".heif", ".avif", ".jxl", ".gif", ".jp2", ".svg", ".psd", ".xcf",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
})  # fmt: skip
"""Of pictures that are not read: they are named, where other files are passed over in silence."""
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
CAPTION_SIZE = 11
"""Of the letters on a contact sheet, in px."""
_LINES, _LINE_HEIGHT = 3, 14
_SAME_ASPECT = 0.02
# What Pillow warns of is an error here (`_open`): filters of warnings are not for threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name, one that is not read included."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES | UNREAD and not path.name.startswith(".")


def why_unread(name: str) -> str | None:
    """Why a file is not read that is a picture by its name; None if it is."""
    suffix = PurePosixPath(name).suffix.lower()
    return f"{suffix} is not read: convert it to JPEG or PNG" if suffix in UNREAD else None


def check_format(option: str, path: Path) -> None:
    """Refuse to write a picture in no format that can be written."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(
            f"{option} {path}: no picture format has the suffix {path.suffix!r}. Use .png, .jpg or .webp."
        )


class UnreadableImageError(Exception):
    """A picture that cannot be used; the message is the reason."""


def image_size(content: bytes | str) -> tuple[int, int]:
    """(width, height) as shown, that is, after the EXIF orientation.

    `content` is an encoded picture or the path of one, of which the header alone is read.
    """
    with _open(content) as image:
        width, height = image.size
        turned = _orientation(image) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def load_cropped(content: bytes | str, bucket: Bucket) -> NDArray[np.uint8]:
    """Decode, orient, convert to RGB, resize to cover the bucket and crop its centre.

    Returns: uint8 [height, width, 3].
    Raises: UnreadableImageError, with the decoder's reason.
    """
    fitted = ImageOps.fit(
        load_upright(content), (bucket.width, bucket.height), Image.Resampling.LANCZOS
    )
    return np.asarray(fitted)


def load_upright(content: bytes | str) -> Image.Image:
    """Decode, orient and convert to 8-bit RGB.

    Raises: UnreadableImageError, with the decoder's reason.
    """
    return _on_white(_upright(content))


def load_mask(
    content: bytes | str, picture: tuple[int, int], bucket: Bucket
) -> NDArray[np.float32]:
    """A mask on the grid of image tokens, cropped like its picture of `picture` (width, height) px.

    White is 1, black and transparent 0, and a token has the mean of its 16 × 16 px.
    Returns: float32 [height / 16, width / 16].
    Raises: UnreadableImageError, also if it is black all over or not of the picture's proportions.
    """
    image = _eight_bits(_upright(content))
    if abs(math.log(image.width / image.height * picture[1] / picture[0])) > _SAME_ASPECT:
        raise UnreadableImageError(
            f"its mask is {image.width}x{image.height} px, the picture {picture[0]}x{picture[1]}: "
            "the proportions differ"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    cells = (bucket.width // PIXELS_PER_TOKEN, bucket.height // PIXELS_PER_TOKEN)
    grey = image.convert("L").convert("F")  # in floating point, so that means are not rounded
    fitted = ImageOps.fit(grey, cells, Image.Resampling.BOX)
    mask = np.asarray(fitted, dtype=np.float32) / np.float32(255)
    if not mask.any():
        raise UnreadableImageError("its mask is black all over: nothing to train on")
    return mask


def load_reference(content: bytes | str, resolution: int) -> NDArray[np.uint8]:
    """A reference image as inference takes it: of at most resolution² px, sides cut to multiples of 16.

    Returns: uint8 [height, width, 3].
    Raises: UnreadableImageError, with the reason.
    """
    image = load_upright(content)
    scale = min(1.0, resolution / math.sqrt(image.width * image.height))
    sides = [int(side * scale) for side in image.size]
    if scale < 1:
        image = image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
    width, height = (side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for side in sides)
    if not width or not height:
        raise UnreadableImageError(f"a reference image of {sides[0]}x{sides[1]} px is too small")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _upright(content: bytes | str) -> Image.Image:
    """A decoded picture, turned as its EXIF orientation says."""
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


def _on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparent parts become white, as a picture viewer shows them."""
    image = _eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


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
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError("not a picture that Pillow can identify") from error
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(_too_large()) from error
    except _BROKEN as error:
        raise UnreadableImageError(str(error)) from error
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        image.close()
        raise UnreadableImageError(_too_large())
    if image.format in ("PNG", "WEBP", "GIF") and getattr(image, "n_frames", 1) > 1:
        image.close()  # TIFF and MPO have pages: there the first is the picture
        raise UnreadableImageError("animated")
    return image


def _too_large() -> str:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return f"more than {limit:.0f} megapixels, as decompression bombs have: make it smaller"


def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic; the rest is drawn as boxes.

    `size`: in px.
    """
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size
    )


def contact_sheet(pictures: list[NDArray[np.uint8]], captions: list[str]) -> Image.Image:
    """Pictures of possibly different sizes in a grid on white, each over its caption."""
    columns = math.ceil(math.sqrt(len(pictures)))
    above = max(picture.shape[0] for picture in pictures)
    height = above + _LINES * _LINE_HEIGHT + 10
    width = max(picture.shape[1] for picture in pictures) + 8
    rows = math.ceil(len(pictures) / columns)
    font = caption_font(CAPTION_SIZE)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(place, columns)
        x = column * width + (width - picture.shape[1]) // 2
        y = row * height + (above - picture.shape[0]) // 2
        sheet.paste(Image.fromarray(picture), (x, y))
        text = "\n".join(_wrapped(caption, width - 8, font))
        draw.text((column * width + 4, row * height + above + 2), text, "black", font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The first lines of `text` that fit under a picture; an ellipsis says that there is more."""
    lines: list[str] = []
    left = " ".join(text.split())
    while left and len(lines) < _LINES:
        fits = min(len(left), width)
        while fits > 1 and font.getlength(left[:fits]) > width:
            fits -= 1
        if fits < len(left) and " " in left[1:fits]:
            fits = left.rindex(" ", 0, fits)
        lines.append(left[:fits])
        left = left[fits:].lstrip()
    if left:
        lines[-1] = lines[-1][:-1] + "…"
    return lines
