"""Text in figures is readable in every script: drawn in a font that has it, or replaced by something without boxes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image, ImageDraw

from medgen.reports import fonts
from medgen.reports.figures import write_curves, write_grid

UNKNOWN = "\U000f0000\U000f0001"  # for private use: no font of a machine has them


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    installed = list(fontManager.ttflist)
    yield
    fontManager.ttflist[:] = installed
    for cached in (fonts.caption, fonts._find, fonts._warn_of_missing):
        cached.cache_clear()


def install(folder: Path, text: str) -> None:
    """Add a font with a square for each character of the text to the system's."""
    pen = TTGlyphPen(None)
    for at, point in enumerate([(50, 0), (50, 700), (450, 700), (450, 0)]):
        (pen.lineTo if at else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square" for letter in f"{text}…"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (500, 50)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / "squares.ttf")
    fontManager.addfont(folder / "squares.ttf")


def drawn(text: str) -> np.ndarray:
    canvas = Image.new("L", (200, 20), 255)
    caption = fonts.caption(text)
    ImageDraw.Draw(canvas).text((100, 10), caption.text, 0, caption.font, anchor="mm")
    return np.asarray(canvas)


@pytest.mark.parametrize("text", ["Пневмония", "عادی", "Müller", "véritable", "Πνευμονία"])
def test_scripts_of_dejavu_sans_are_drawn_without_boxes(text: str) -> None:
    caption = fonts.caption(text)
    assert caption.text == text
    box = bytes(caption.font.getmask("\U0010fffe"))
    assert all(bytes(caption.font.getmask(letter)) != box for letter in text)


def test_a_font_of_the_system_draws_what_no_other_font_has(tmp_path: Path) -> None:
    before = drawn(UNKNOWN)
    for cached in (fonts.caption, fonts._find):
        cached.cache_clear()
    install(tmp_path, UNKNOWN)
    assert fonts.class_captions(["A", UNKNOWN]) == ["A", UNKNOWN]
    assert fonts.families(["A", UNKNOWN]) == ["DejaVu Sans", "Squares"]
    assert (drawn(UNKNOWN) != before).any()
    write_curves(tmp_path / "curves.png", {"loss": [1.0, 0.5]}, phases={"one": 1, UNKNOWN: 2})


def test_without_a_font_classes_are_numbered_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert fonts.class_captions(["NORMAL", UNKNOWN, "Пневмония"]) == ["NORMAL", "class 1", "Пневмония"]
    assert capsys.readouterr().err.count("warning: figures show numbers instead of the class names") == 1
    assert fonts.caption(UNKNOWN).text == "\\U000f0000\\U000f0001"


def test_a_long_caption_in_another_script_is_cut(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", torch.zeros(1, 1, 96, 96), captions=["Пневмония " * 20])
    dark = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))[100:, :] < 128
    assert dark.any() and not dark[:, :2].any()
