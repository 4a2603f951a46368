"""Fonts for text in figures: the first font of this machine that has every character of the text.

drawn = caption("Пневмония")
draw.text(position, drawn.text, font=drawn.font)

Plain English text is drawn in Pillow's own font, which is the same on every machine. Other text uses matplotlib's
DejaVu Sans (accents, Cyrillic, Greek, Arabic …) or a font of the system (Chinese, Japanese, Korean …).
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from PIL import ImageFont

from medgen.console import warn

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SIZE = 12
_UNASSIGNED = "\U0010fffe"  # no font has it, so it is drawn as the box of missing characters


class Caption(NamedTuple):
    """A text that its font can draw."""

    text: str
    font: Font


@cache
def caption(text: str) -> Caption:
    """The text with a font that has its characters, or the characters' numbers in Pillow's font if there is none."""
    builtin = ImageFont.load_default(SIZE)
    if _covers(builtin, text):
        return Caption(text, builtin)
    path = _find(text)
    if path is None:
        return Caption(text.encode("ascii", "backslashreplace").decode(), builtin)
    return Caption(text, ImageFont.truetype(path, SIZE))


def class_captions(classes: Sequence[str]) -> list[str]:
    """The names of classes for figures: "class 2" instead of one that no font of this machine can draw.

    Such names are listed in a warning, once per process.
    """
    missing = tuple(name for name in classes if caption(name).text != name)
    if missing:
        _warn_of_missing(missing)
    return [f"class {index}" if name in missing else name for index, name in enumerate(classes)]


def families(texts: Iterable[str]) -> list[str]:
    """Names of font families in which matplotlib can draw the texts, the default one first."""
    from matplotlib.font_manager import get_font

    paths = [path for text in texts if (path := _find(text)) is not None]
    return list(dict.fromkeys(["DejaVu Sans", *(get_font(path).family_name for path in paths)]))


@cache
def _warn_of_missing(names: tuple[str, ...]) -> None:
    warn(
        f"figures show numbers instead of the class names {', '.join(names)}: no font of this machine has their "
        "characters. Install one, such as Noto Sans CJK for Chinese, Japanese and Korean"
    )


def _covers(font: Font, text: str) -> bool:
    def drawn(letter: str) -> bytes:
        return bytes(font.getmask(letter))

    return all(drawn(letter) != drawn(_UNASSIGNED) for letter in _visible(text))


def _visible(text: str) -> Iterator[str]:
    """The characters of a text that need a glyph: no spaces, and no joiners or direction marks."""
    return (letter for letter in text if not letter.isspace() and unicodedata.category(letter) != "Cf")


@cache
def _find(text: str) -> str | None:
    """Path of a font file that has all characters of the text: DejaVu Sans, or else a regular font of the system."""
    from matplotlib.font_manager import findfont, fontManager, get_font  # slow to import

    wanted = {ord(letter) for letter in _visible(text)}
    regular = sorted(
        entry.fname
        for entry in fontManager.ttflist
        if entry.style == "normal" and entry.weight == 400 and not entry.name.startswith("Last Resort")
    )
    for path in (findfont("DejaVu Sans"), *regular):
        try:
            if wanted <= get_font(path).get_charmap().keys():
                ImageFont.truetype(path, SIZE)
                return path
        except (OSError, RuntimeError):  # a font that has bitmaps only, or that was removed
            continue
    return None
