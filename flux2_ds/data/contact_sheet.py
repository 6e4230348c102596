"""Many images with their captions on a sheet."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CAPTION_SIZE = 11
"""Of the letters on a contact sheet, in px."""
_LINES, _LINE_HEIGHT = 3, 14


def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic; the rest is drawn as boxes.

    `size`: in px.
    """
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size
    )


def contact_sheet(images: list[NDArray[np.uint8]], captions: list[str]) -> Image.Image:
    """Images of possibly different sizes in a grid on white, each over its caption."""
    columns = math.ceil(math.sqrt(len(images)))
    above = max(image.shape[0] for image in images)
    height = above + _LINES * _LINE_HEIGHT + 10
    width = max(image.shape[1] for image in images) + 8
    rows = math.ceil(len(images) / columns)
    font = caption_font(CAPTION_SIZE)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(place, columns)
        x = column * width + (width - image.shape[1]) // 2
        y = row * height + (above - image.shape[0]) // 2
        sheet.paste(Image.fromarray(image), (x, y))
        text = "\n".join(_wrapped(caption, width - 8, font))
        draw.text((column * width + 4, row * height + above + 2), text, "black", font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The first lines of `text` that fit under an image; an ellipsis says that there is more."""
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
