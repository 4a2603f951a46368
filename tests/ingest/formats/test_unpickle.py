"""Plain values come out as pickle.load gives them; anything else does nothing and is one refusal."""

import collections
import contextlib
import copyreg
import datetime
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medgen.ingest.formats.raw import UnreadableImage
from medgen.ingest.formats.unpickle import load

LIMIT = 2 << 20
BATCH = {
    b"data": np.arange(48, dtype=np.uint8).reshape(4, 12),
    "fortran": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
    "labels": [3, 0, 255, 256, 70_000, -1, 2**40],
    "names": ["apple", "é\n\\", b"\xff\0'", "中"],
    "others": (True, False, None, 2.5, (), (1,), (1, 2), [[]], {1: {}}),
}


def assert_same(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)  # type: ignore[call-overload]
        for key, value in expected.items():
            assert_same(found[key], value)  # type: ignore[index]
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)  # type: ignore[attr-defined]
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_every_protocol(protocol: int) -> None:
    assert_same(load(pickle.dumps(BATCH, protocol), LIMIT), BATCH)


def test_the_text_of_python_2_comes_as_bytes() -> None:
    """The words of the real CIFAR-10 batch: protocol 2, cPickle's short strings, numpy of 2009."""
    pickled = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\teU\x04data"
        b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01K\x02K\x03"
        b"\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06abcdeftbu."
    )
    found = load(pickled, LIMIT)
    assert_same(found, pickle.loads(pickled, encoding="bytes"))
    assert found[b"data"].tolist() == [[97, 98, 99], [100, 101, 102]]  # type: ignore[index]


def test_protocol_0_of_python_2() -> None:
    pickled = b"(dp1\nS'label_names'\np2\n(lp3\nS'airplane'\np4\naS'it\\'s'\naV\\u00e9\naI01\naL7L\nas."
    assert load(pickled, LIMIT) == {b"label_names": [b"airplane", b"it's", "é", True, 7]}


def test_a_file_is_read_as_its_bytes(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    for path in sorted(shared_data("cifar_format").glob("*_batch*")):
        found = load(path, LIMIT)
        assert_same(found, pickle.loads(path.read_bytes()))
    with pytest.raises(UnreadableImage, match="No such file"):
        load(tmp_path / "absent", LIMIT)


class Reduced:
    """Pickles as a call."""

    def __init__(self, *what: object) -> None:
        self.what = what

    def __reduce__(self) -> tuple:
        return self.what


class Slotted:
    def __init__(self) -> None:
        self.command = "x"


MARKER = "medgen-was-here"
HOSTILE = {
    "os.system": pickle.dumps(Reduced(os.system, (f"touch {MARKER}",))),
    "eval": pickle.dumps(Reduced(eval, (f"open({MARKER!r}, 'w')",))),
    "open": pickle.dumps(Reduced(open, (MARKER, "w"))),
    "protocol 0": f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode(),
    "INST": f"(S'touch {MARKER}'\nios\nsystem\n.".encode(),
    "OBJ": f"(cos\nsystem\nS'touch {MARKER}'\no.".encode(),
    "NEWOBJ": pickle.dumps(Slotted(), 2),
    "NEWOBJ_EX": b"\x80\x04cbuiltins\nset\n)}\x92.",
    "BUILD on a dict": b"\x80\x02}}U\x01aK\x01sb.",
    "BUILD on a class": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
    "EXT": b"\x80\x02\x82\x01.",
    "PERSID": b"Pabc\n.",
    "BINPERSID": b"\x80\x02K\x01Q.",
    "set": pickle.dumps({1, 2}),
    "frozenset": pickle.dumps(frozenset({1})),
    "date": pickle.dumps(datetime.date(2020, 1, 1)),
    "complex": pickle.dumps(1j),
    "ordered dict": pickle.dumps(collections.OrderedDict(a=1)),
    "a class": pickle.dumps(os.PathLike),
    "copyreg": pickle.dumps(copyreg._reconstructor),  # type: ignore[attr-defined]
    "a function of numpy": b"\x80\x02cnumpy\nload\nU\x01a\x85R.",
    "numpy's own eval": b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
    "a dotted way": pickle.dumps(Reduced(os.path.join, ("a", "b")), 4),
    "a call of a type": b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
    "a name left over": b"\x80\x02cnumpy\nndarray\n.",
    "an array never filled": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
    "an array of objects": pickle.dumps(np.array([None, eval])),
    "an array of floats": pickle.dumps(np.zeros(3)),
    "an array of records": pickle.dumps(np.zeros(3, [("a", "u1")])),
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.",
    "out of band": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_wants_more_does_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableImage) as caught:
        load(HOSTILE[name], LIMIT)
    assert len(str(caught.value)) < 150 and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def array(shape: bytes, raw: bytes) -> bytes:
    return (
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R(K\x01" + shape
        + b"cnumpy\ndtype\nX\x02\0\0\0u1\x89\x88\x87R\x89B" + struct.pack("<I", len(raw)) + raw + b"tb."
    )  # fmt: skip


BOMBS = {
    "a memo's huge index": b"\x80\x02]r\xff\xff\xff\xff.",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"].",
    "a huge array": array(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"abc"),
    "a huge empty array": array(b"K\0" + b"\x8a\x08" + struct.pack("<q", 1 << 62) + b"\x86", b""),
    "a negative array": array(b"J\xff\xff\xff\xff\x85", b"abc"),
    "lists in lists": b"(" * 100_000 + b"l" * 100_000 + b".",
    "tuples in tuples": b")" + b"\x85" * 200_000 + b".",
    "a list of itself": b"\x80\x02]q\0h\0ah\0ah\0a.",
    "laughs as a key": b"}" + b")" + b"q\0h\0\x86" * 60 + b"K\x01s.",
    "too many steps": b"]0" * 520_000 + b"].",
    "empty dicts": b"(" + b"}" * 500_000 + b"t",
    "text encoded again and again": b"\x80\x02X\x00\x00\x01\x00" + b"a" * 65536 + b"q\x00c_codecs\nencode\nq\x01("
        + b"h\x01h\x00U\x06latin1\x86R" * 20_000 + b"t.",
    "a long number": b"L" + b"9" * 100_000 + b"\n.",
    "a line without end": b"I" + b"9" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_its_size(name: str) -> None:
    tracemalloc.start()
    with contextlib.suppress(UnreadableImage):
        load(BOMBS[name], LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "train"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnreadableImage, match="1048576 MiB; expected at most 2 MiB"):
        load(path, LIMIT)


SEED = pickle.dumps({"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2], "n": ("a", b"b")}, 4)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), max_size=6), st.integers(1, len(SEED)))
@example([], len(SEED))
def test_damage_is_only_ever_one_kind_of_error(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(SEED)
    for place, value in changes:
        data[place] = value
    for hostile in (bytes(data), bytes(data[:length])):
        try:
            load(hostile, LIMIT)
        except UnreadableImage:
            continue


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from([bytes([code]) for code in range(256)] + [b"cnumpy\ndtype\n", b"X\1\0\0\0a"])))
def test_random_opcodes_are_only_ever_one_kind_of_error(words: list[bytes]) -> None:
    with contextlib.suppress(UnreadableImage):
        load(b"".join(words) + b".", LIMIT)
