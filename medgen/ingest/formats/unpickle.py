"""A pickle of plain values, such as a CIFAR batch, read without running anything of it.

batch = load(Path("data_batch_1"), limit=256 << 20)   # {b"data": (N, 3072) uint8, b"labels": [6, 9, …]}

Python's own unpickler calls whatever a file names, and a few bytes make it allocate gigabytes. This is no unpickler
with holes stopped: it is a small machine of its own that knows the opcodes of plain values and of numpy's arrays,
and nothing else. Opcodes: Python's pickletools.
"""

import codecs
import math
import pickle
import struct
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from medgen.ingest.formats.raw import UnreadableImage

_MAX_STEPS = 1 << 20  # a CIFAR-100 batch takes a fifth of it; each step makes at most one small object
_MAX_LINE = 4096  # of a number or a name in protocol 0
_MAX_DIGITS = 20
_MAX_AXES = 8
_TYPES = {f"{kind}{size}" for kind in "ui" for size in (1, 2, 4, 8)}
_PLAIN = (str, bytes, int, float, type(None), np.ndarray)


class _Name(Enum):
    """The functions and types that a pickled array names, as words without power."""

    RECONSTRUCT = "makes an empty array, which BUILD then fills"
    FROM_BUFFER = "makes an array of bytes, since protocol 5"
    NDARRAY = "the type of an array"
    DTYPE = "the type of its elements"
    ENCODE = "turns text into the bytes it stands for, in protocol 2 written by Python 3"


_NAMES = {
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("_codecs", "encode"): _Name.ENCODE,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Name.RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Name.FROM_BUFFER for core in ("core", "_core")},
}


def load(source: Path | bytes, limit: int) -> object:
    """Arrays of integers, lists, dicts, tuples, text, bytes and numbers of a pickle of protocol 0 to 5.

    Text of Python 2 comes as bytes: a file does not say how it is encoded. Memory stays within some times the file's
    size, which is at most `limit` bytes, and 300 MB.

    Raises:
        UnreadableImage: it is no pickle, is damaged, is larger, or holds or asks for anything else.
    """
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > limit:
            raise UnreadableImage(f"a pickle of {size >> 20} MiB; expected at most {limit >> 20} MiB")
        return _Machine(source if isinstance(source, bytes) else source.read_bytes()).run()
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None
    except UnreadableImage:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, struct.error):
        raise UnreadableImage("a damaged pickle") from None


class _Array:
    """An array between its making and its filling."""

    __slots__ = ("filled",)

    def __init__(self) -> None:
        self.filled: Any = None


class _Type:
    """The type of an array's elements; BUILD tells its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


class _Machine:
    """A pickle's stack and memo."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.encodable = len(data)  # text that may still be turned into bytes: it would else grow at each turn

    def run(self) -> object:
        for _ in range(_MAX_STEPS):
            opcode = self.take(1)
            if opcode == pickle.STOP:
                (result,) = self.stack
                _require_plain(result)
                return result
            if opcode not in _ACTIONS:
                raise UnreadableImage(
                    "a pickle of something else than arrays, lists, dicts, tuples, text and numbers, or no pickle"
                )
            _ACTIONS[opcode](self)
        raise UnreadableImage(f"a pickle of more than {_MAX_STEPS} steps")

    # what follows an opcode

    def take(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.data):
            raise UnreadableImage("a pickle that is cut short")
        self.place, start = end, self.place
        return self.data[start:end]

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def counted(self, format: str) -> bytes:
        """Bytes with their number before them."""
        return self.take(self.number(format))

    def line(self, limit: int = _MAX_LINE) -> bytes:
        end = self.data.find(b"\n", self.place, self.place + limit)
        if end < 0:
            raise UnreadableImage("a pickle with a line without end")
        return self.take(end + 1 - self.place)[:-1]

    # the stack

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes, int)):  # hashing nested tuples can take for ever
                raise TypeError
            target[key] = value

    def push_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        value = self.memo[key]
        self.push(value.filled if isinstance(value, _Array) and value.filled is not None else value)

    # numpy's arrays

    def name(self, module: object, name: object) -> None:
        known = _NAMES.get((_text(module), _text(name)))
        if known is None:
            asked = f"{_text(module)}.{_text(name)}"
            asked = asked if asked.isascii() and asked.replace(".", "").isidentifier() else "a strange name"
            raise UnreadableImage(f"a pickle that asks for {asked[:60]}; expected nothing but numpy's arrays")
        self.push(known)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError
        if function is _Name.RECONSTRUCT and arguments[0] is _Name.NDARRAY:
            self.push(_Array())
        elif function is _Name.DTYPE:
            self.push(_Type(_dtype(_text(arguments[0]))))
        elif function is _Name.FROM_BUFFER:
            raw, dtype, shape, order = arguments
            self.push(_array(raw, dtype, shape, _text(order)))
        elif function is _Name.ENCODE and _text(arguments[1]) in ("latin1", "latin-1"):
            self.push(self.encode(arguments[0]))
        else:
            raise UnreadableImage("a pickle that calls something; expected nothing but numpy's arrays")

    def encode(self, text: object) -> bytes:
        if not isinstance(text, str):
            raise TypeError
        self.encodable -= len(text)
        if self.encodable < 0:
            raise UnreadableImage("a pickle that repeats its text without end")
        return text.encode("latin-1")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack.pop()
        if not isinstance(state, tuple):
            raise TypeError
        if isinstance(target, _Type):
            order, *parts = state[1:5]
            if any(part is not None for part in parts) or _text(order) not in ("<", ">", "|", "="):
                raise UnreadableImage("a pickle with an array of records; expected integers")
            target.dtype = target.dtype.newbyteorder(_text(order))  # type: ignore[arg-type]
            self.push(target)
        elif isinstance(target, _Array):
            _, shape, dtype, is_fortran, raw = state
            target.filled = _array(raw, dtype, shape, "F" if is_fortran else "C")
            self.push(target.filled)
        else:
            raise UnreadableImage("a pickle that fills an object; expected nothing but numpy's arrays")


def _text(value: object) -> str:
    """A name, which Python 2 wrote as bytes."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if not isinstance(value, str):
        raise TypeError
    return value


def _dtype(code: str) -> np.dtype[Any]:
    if code.lstrip("<>|=") not in _TYPES:
        raise UnreadableImage("a pickle with an array of something else than integers")
    return np.dtype(code)


def _array(raw: object, dtype: object, shape: object, order: str) -> Any:
    """The bytes seen as an array; nothing is allocated."""
    if not isinstance(raw, bytes) or not isinstance(dtype, _Type) or not isinstance(shape, tuple):
        raise TypeError
    if len(shape) > _MAX_AXES or any(type(side) is not int or side < 0 for side in shape) or order not in ("C", "F"):
        raise ValueError
    expected = math.prod(shape) * dtype.dtype.itemsize
    if expected != len(raw):
        raise UnreadableImage(f"a pickle with an array that should have {expected} bytes and has {len(raw)}")
    pixels = np.frombuffer(raw, dtype.dtype)
    return pixels.reshape(shape, order="F") if order == "F" else pixels.reshape(shape)


def _integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):  # how protocol 0 writes False and True
        return line == b"01"
    line = line.removesuffix(b"L")
    if len(line) > _MAX_DIGITS:
        raise ValueError
    return int(line)


def _require_plain(result: object) -> None:
    """Nothing of the machine's own is left in it."""
    waiting: list[Any] = [result]
    seen: set[int] = set()  # a list may hold itself
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list, tuple)):
            if id(value) not in seen:
                seen.add(id(value))
                waiting.extend(value.values() if isinstance(value, dict) else value)
        elif not isinstance(value, _PLAIN):
            raise TypeError


def _unquote(line: bytes) -> bytes:
    """Python 2's text of protocol 0."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError
    return codecs.escape_decode(line[1:-1])[0]


_ACTIONS: dict[bytes, Callable[[_Machine], object]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    # numbers
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.INT: lambda m: m.push(_integer(m.line())),
    pickle.LONG: lambda m: m.push(_integer(m.line())),
    pickle.FLOAT: lambda m: m.push(float(m.line())),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.counted("<B"), "little", signed=True)),
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    # text and bytes
    pickle.STRING: lambda m: m.push(_unquote(m.line(len(m.data)))),
    pickle.UNICODE: lambda m: m.push(str(m.line(len(m.data)), "raw-unicode-escape")),
    pickle.BINSTRING: lambda m: m.push(m.counted("<I")),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.counted("<B")),
    pickle.BINBYTES: lambda m: m.push(m.counted("<I")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.counted("<B")),
    pickle.BINBYTES8: lambda m: m.push(m.counted("<Q")),
    pickle.BYTEARRAY8: lambda m: m.push(m.counted("<Q")),
    pickle.BINUNICODE: lambda m: m.push(str(m.counted("<I"), "utf-8")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(str(m.counted("<B"), "utf-8")),
    pickle.BINUNICODE8: lambda m: m.push(str(m.counted("<Q"), "utf-8")),
    # lists, tuples, dicts
    pickle.MARK: lambda m: m.mark(),
    pickle.POP: lambda m: m.stack.pop(),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.LIST: lambda m: m.push(m.since_mark()),
    pickle.APPEND: lambda m: m.extend([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.since_mark()),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
    pickle.TUPLE1: lambda m: m.push_tuple(1),
    pickle.TUPLE2: lambda m: m.push_tuple(2),
    pickle.TUPLE3: lambda m: m.push_tuple(3),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.DICT: lambda m: m.push_dict(),
    pickle.SETITEM: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    # the memo: a dict, so that a huge number costs no more than a small one
    pickle.PUT: lambda m: m.put(int(m.line())),
    pickle.BINPUT: lambda m: m.put(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.GET: lambda m: m.get(int(m.line())),
    pickle.BINGET: lambda m: m.get(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.number("<I")),
    # names and arrays
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(m.stack.pop(-2), m.stack.pop()),
    pickle.REDUCE: lambda m: m.reduce(),
    pickle.BUILD: lambda m: m.build(),
}
