"""A font for texts in any script, among those of this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

log = logging.getLogger("flux2_ds")

_USUAL = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
"""Has Latin, Greek, Cyrillic and more; Pillow's own has no letters beyond English."""


def font_for(texts: Iterable[str], size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans, or the font that lacks fewest of the texts' characters, which a warning
    then names: they are drawn as boxes. `size`: in px."""
    needed = {ord(letter) for text in texts for letter in text if letter.isprintable()}
    chosen, lacking = _USUAL, needed - _letters(_USUAL)
    if lacking:
        found = font_manager.findSystemFonts()
        for path in sorted(found, key=lambda path: ("Regular" not in path, path)):
            without = needed - _letters(path)
            if len(without) < len(lacking):
                chosen, lacking = path, without
    if lacking:
        log.warning(
            "no font of this machine has all letters of the texts under pictures: %s and %d others are drawn "
            "as boxes. Install one that has, such as Noto Sans CJK (fonts-noto-cjk); training does not need it.",
            chr(min(lacking)),
            len(lacking) - 1,
        )
    return ImageFont.truetype(chosen, size)


def _letters(path: str) -> set[int]:
    """The characters that a font can draw in any size."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # damaged, or of a kind that FreeType does not know
        return set()
    return set(font.get_charmap()) if font.scalable else set()
