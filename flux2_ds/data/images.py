"""Photographs from disk: find them, read their captions, decode, crop to a bucket."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flux2_ds.data.buckets import Bucket
from flux2_ds.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


class UnreadableImageError(Exception):
    """A picture that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Photo:
    """A picture file and its caption (None if it has none)."""

    path: Path
    caption: str | None


def find_photos(folder: Path) -> list[Photo]:
    """All pictures below `folder`, sorted by path, with the caption from the .txt file beside them.

    Raises:
        UserError: the folder is missing or holds no picture.
    """
    if not folder.is_dir():
        raise UserError(f"data.images {folder} is not a folder. Give the folder of your pictures.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"data.images {folder} holds no pictures ({', '.join(sorted(SUFFIXES))}), neither in "
            "itself nor below. Give the folder of your pictures."
        )
    return [Photo(path, _caption(path.with_suffix(".txt"))) for path in paths]


def _caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip() or None
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(
            f"caption {path} is not UTF-8 ({error.reason}). Save it as UTF-8."
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) as shown, that is, after the EXIF orientation; reads the header only."""
    with _open(path) as image:
        width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF behind the pixels, where nobody writes it.
        has_exif = image.format != "PNG" or "exif" in image.info
        turned = has_exif and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def load_cropped(path: Path, bucket: Bucket) -> NDArray[np.uint8]:
    """Decode, orient, convert to RGB, resize to cover the bucket and crop its centre.

    Returns: uint8 [height, width, 3].
    Raises: UnreadableImageError, with the decoder's reason.
    """
    with _open(path) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImageError(str(error)) from error
        upright = _on_white(ImageOps.exif_transpose(image))
    fitted = ImageOps.fit(upright, (bucket.width, bucket.height), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def _on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparent parts become white, as a picture viewer shows them."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, which makes scans white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImageError(f"pixel format {image.mode} (32 bits a channel) has no scale")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning) as error:
            raise UnreadableImageError(str(error).replace(str(path), path.name)) from error
        except Image.DecompressionBombError as error:
            raise UnreadableImageError(str(error)) from error


def contact_sheet(pictures: list[NDArray[np.uint8]], columns: int | None = None) -> Image.Image:
    """Pictures of possibly different sizes in a grid on white, each centred in its cell."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    height = max(picture.shape[0] for picture in pictures) + 4
    width = max(picture.shape[1] for picture in pictures) + 4
    sheet = Image.new(
        "RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white"
    )
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        x = column * width + (width - picture.shape[1]) // 2
        y = row * height + (height - picture.shape[0]) // 2
        sheet.paste(Image.fromarray(picture), (x, y))
    return sheet
