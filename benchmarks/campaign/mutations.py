"""Damage files: change bytes, numbers and words, and put in programs that a careless reader would run."""

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable

CANARY = "canary"  # the file that every hostile program writes, in the current folder
NUMBERS = (
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\x00",
    b"\x01\x00\x00\x00",
)
WORDS = (
    b"null", b"-1", b"0", b"1e999", b"NaN", b"[]", b"{}", b'""', b"true", b"9" * 400, b"../../../outside",
    b"/etc/passwd", b"[" * 3000, b'{"a":' * 500, b"\xff\xfe", b"\x00",
    b"!!python/object/apply:os.system ['touch canary']",
    b"&a [*a, *a]", b"<<: *a", b"2147483648", b"18446744073709551616", b"\xf0\x9f\x92\xa9", b"\x1b[31m", b"%s%n",
    b"$(touch canary)",
)  # fmt: skip


class Touch:
    """Unpickling this writes the canary."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def mutate(content: bytes, draws: random.Random) -> bytes:
    """The content with one to four changes."""
    for _ in range(draws.randint(1, 4)):
        content = draws.choice(CHANGES)(content, draws)
    return content


def flip(content: bytes, draws: random.Random) -> bytes:
    """Change some bits."""
    changed = bytearray(content)
    for _ in range(draws.choice((1, 1, 4, 40))):
        if changed:
            changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def cut(content: bytes, draws: random.Random) -> bytes:
    """Keep the start."""
    return content[: draws.randint(0, len(content))]


def remove(content: bytes, draws: random.Random) -> bytes:
    """Remove a part."""
    start = draws.randint(0, len(content))
    return content[:start] + content[start + draws.choice((1, 4, 100, 5000)) :]


def repeat(content: bytes, draws: random.Random) -> bytes:
    """Insert a part again, at another place."""
    start, at = draws.randint(0, len(content)), draws.randint(0, len(content))
    return content[:at] + content[start : start + draws.choice((1, 8, 200, 5000))] + content[at:]


def set_number(content: bytes, draws: random.Random) -> bytes:
    """Overwrite bytes, more often near the start, with a number at a limit."""
    at = draws.randint(0, min(len(content), draws.choice((64, 512, len(content)))))
    number = draws.choice(NUMBERS)
    return content[:at] + number + content[at + len(number) :]


def set_word(content: bytes, draws: random.Random) -> bytes:
    """Replace a word of a text, or insert one."""
    at = draws.randint(0, len(content))
    begin = max((content.rfind(mark, 0, at) for mark in (b":", b",", b" ", b"\n", b'"')), default=-1) + 1
    ends = [end for mark in (b",", b"\n", b"}", b'"') if (end := content.find(mark, begin)) >= 0]
    return content[:begin] + draws.choice(WORDS) + content[min(ends, default=begin) :]


CHANGES = (flip, flip, cut, remove, repeat, set_number, set_number, set_word, set_word)


def hostile_pickle() -> bytes:
    """A pickle that runs a program."""
    return pickle.dumps({"model": Touch()}, protocol=2)


def hostile_checkpoint() -> bytes:
    """A file as `torch.save` writes it whose pickle runs a program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", hostile_pickle())
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def hostile_array() -> bytes:
    """A .npy file of objects."""
    import numpy as np

    buffer = io.BytesIO()
    array = np.empty(1, object)
    array[0] = Touch()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def hostile_archive() -> bytes:
    """A zip file whose members lead outside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("../outside.png", "/tmp/medgen-outside.png", "a/../../outside.png", "..\\outside.png"):
            archive.writestr(name, b"x")
    return buffer.getvalue()
