"""Captions in any script are drawn with a font that has their letters, if there is one."""

import logging
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager

from flux2_ds import fonts
from flux2_ds.data.images import contact_sheet
from flux2_ds.fonts import font_for


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A font with a cat and a dog, among one with the cat alone, and two that are none."""
    for name, letters in (("A.ttf", "猫"), ("B.ttf", "猫犬")):
        font = TTFont(fonts._USUAL)
        for table in font["cmap"].tables:
            table.cmap |= {ord(letter): table.cmap[ord("A")] for letter in letters}
        font.save(tmp_path / name)
    (tmp_path / "C.ttf").write_bytes(b"damaged")
    (tmp_path / "D.ttf").mkdir()
    files = sorted(map(str, tmp_path.iterdir()))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    return tmp_path


def test_no_other_font_is_looked_for_without_need(monkeypatch, caplog):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: pytest.fail("looked for"))
    font = font_for(["a cat,\n été, жар, Ωmega"], 11)
    assert (font.path, font.size, caplog.text) == (fonts._USUAL, 11, "")
    picture = np.full((16, 16, 3), 255, dtype=np.uint8)
    drawn = {letter: contact_sheet([picture], [letter], font).tobytes() for letter in "éжΩ\ue000"}
    assert len(set(drawn.values())) == 4  # the last is what a font draws for a letter it lacks


def test_a_font_that_has_all_letters_is_found(installed, caplog):
    assert font_for(["a 猫", "a 犬"], 11).path == str(installed / "B.ttf")
    assert font_for(["a 猫"], 11).path == str(installed / "A.ttf")
    assert caplog.text == ""


def test_letters_that_no_font_has_are_named(installed, caplog):
    caplog.set_level(logging.WARNING)
    assert font_for(["猫 and 犬", "鳥", "馬"], 11).path == str(installed / "B.ttf")
    assert "馬 and 1 others are drawn as boxes" in caplog.text
