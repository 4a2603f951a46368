"""Files of thousands of small pictures: MedMNIST's npz, MNIST's idx, CIFAR's batches.

contents = inspect(Path("pneumoniamnist.npz"), preprocess)   # one index, label and split for each picture
with NpzFile(path, preprocess) as file:
    raw = file.read(0)

Compressed arrays are inflated once, into a temporary file without a name that is mapped into memory: a file takes as
much disk as it is long and next to no memory. MNIST: http://yann.lecun.com/exdb/mnist; CIFAR: Krizhevsky, Learning
Multiple Layers of Features from Tiny Images (2009); MedMNIST: Yang et al., Scientific Data 10, 41 (2023).

Shapes: N pictures of a file, H W height and width.
"""

import gzip
import io
import math
import mmap
import re
import shutil
import struct
import tempfile
import threading
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats import unpickle
from medgen.ingest.formats.medmnist import class_names
from medgen.ingest.formats.raw import MAX_PIXELS, Contents, RawImage, UnreadableImage

T = TypeVar("T")

_SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "t10k": "test", "test": "test"}
_MAX_PICTURES = 1 << 21  # more than twice the largest set of digits, EMNIST
_MIN_SIDE = 4  # pixels; less is no picture, and a small file could claim a million of them
_MAX_BATCH = 256 << 20  # bytes of a pickle; CIFAR-100's train has 155 million
_MAX_RATIO = 1032  # deflate makes no byte more than this (zlib.net/zlib_tech.html)
_MAX_KEYS = 8  # named in a reason
_NPY_HEADER = 1 << 16
_CHUNK = 1 << 20
_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801  # unsigned bytes in three dimensions, in one
_IDX_NAME = re.compile(r"((?:.*[-_. ])?)images([-.]idx)3(-ubyte(?:\.gz)?)", re.IGNORECASE)
_IDX_LABELS_NAME = re.compile(r"(?:.*[-_. ])?labels[-.]idx1-ubyte(?:\.gz)?", re.IGNORECASE)
_CIFAR_BATCH = re.compile(r"data_batch_\d+|test_batch")
_CIFAR_SIDE = 32


def is_idx_images(name: str) -> bool:
    """True for the name of MNIST's pictures, such as t10k-images-idx3-ubyte.gz; False for that of its labels."""
    return _IDX_NAME.fullmatch(name) is not None


def is_idx_labels(name: str) -> bool:
    """True for the name of MNIST's labels, such as t10k-labels-idx1-ubyte.gz."""
    return _IDX_LABELS_NAME.fullmatch(name) is not None


def is_cifar_batch(path: Path) -> bool:
    """True for data_batch_N and test_batch, and for CIFAR-100's train and test where they begin as a pickle does."""
    if _CIFAR_BATCH.fullmatch(path.name):
        return True
    if path.name not in ("train", "test") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """Number, labels and splits of the pictures of an npz, idx or CIFAR file.

    Labels that are numbers are filled with zeros to one width, so that they sort as numbers.

    Raises:
        UnreadableImage: it is damaged or none of these.
    """
    if is_idx_images(path.name):
        return _inspect_idx(path)
    if is_cifar_batch(path):
        return _inspect_cifar(path)
    return _inspect_npz(path)


class _ArrayFile:
    """What the three have in common: `_picture` gives (H, W) or (H, W, 3) and how many bits are unused."""

    @property
    def num_pictures(self) -> int:
        """Of the file.

        Raises:
            UnreadableImage: it is damaged.
        """
        raise NotImplementedError

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self._path, self._mask = path, mask
        self._keeps_colour = preprocess.channels == 3 and not mask
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}  # of what could not be loaded

    def read(self, index: int) -> RawImage:
        """The picture of that index; an array of 16 bits is shifted so that its highest value nears white."""
        with _reasons():
            stored, num_unused_bits = self._picture(index)
        deep = stored.dtype.itemsize == 2
        pixels: Any = np.array(stored, np.uint16 if deep else np.uint8, order="C")
        height, width = pixels.shape[:2]
        mode = ("RGB" if pixels.ndim == 3 else "I" if deep else "L") + (";16" if deep else "")
        if num_unused_bits and not self._mask:
            pixels <<= num_unused_bits
        if pixels.ndim == 3 and not self._keeps_colour:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        return RawImage(pixels, (width, height), mode)

    def _picture(self, index: int) -> tuple[NDArray[Any], int]:
        raise NotImplementedError

    def _load_once(self, key: str, load: Callable[[], T]) -> T:
        """What `load` gives, or why it fails: once for all pictures, as a damaged file may be long."""
        with self._lock:
            if key in self._reasons:
                raise UnreadableImage(self._reasons[key])
            if key not in self._loaded:
                try:
                    with _reasons():
                        self._loaded[key] = load()
                except UnreadableImage as error:
                    self._reasons[key] = str(error)
                    raise
            return cast(T, self._loaded[key])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


# npz


@dataclass(frozen=True)
class _Member:
    """An array of an npz: what its header says, and where in the member the values begin."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, values: Any) -> NDArray[Any]:
        return np.frombuffer(values, self.dtype).reshape(self.shape, order="F" if self.is_fortran else "C")


class NpzFile(_ArrayFile):
    """The pictures of a file in MedMNIST's layout: those of train, then of val, then of test."""

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        super().__init__(path, preprocess, mask)
        with _reasons(), _open_npz(path) as archive:
            self._members = [member for _, member in _image_members(archive)]
        self._ends = list(accumulate(member.shape[0] for member in self._members))

    @property
    def num_pictures(self) -> int:
        """Of train, val and test together."""
        return self._ends[-1]

    def _picture(self, index: int) -> tuple[NDArray[Any], int]:
        if not 0 <= index < self._ends[-1]:
            raise UnreadableImage(f"picture {index} of {self._ends[-1]}")
        place = bisect_right(self._ends, index)
        member = self._members[place]
        array, num_unused_bits = self._load_once(member.name, lambda: self._load(member))
        return array[index - (self._ends[place] - len(array))], num_unused_bits

    def _load(self, member: _Member) -> tuple[NDArray[Any], int]:
        with _open_npz(self._path) as archive, archive.open(member.name) as stream:
            stream.read(member.start)
            array = member.view(spill(stream, member.num_bytes))
            _require_end(stream)
        unused = 0 if array.dtype.itemsize == 1 else 16 - max(1, int(array.max()).bit_length())
        return array, unused


def _inspect_npz(path: Path) -> Contents:
    with _reasons(), _open_npz(path) as archive:
        members = _image_members(archive)
        splits = [split for split, member in members for _ in range(member.shape[0])]
        numbers = [_npz_labels(archive, split, member.shape[0]) for split, member in members]
        present = [part for part in numbers if part is not None]
        names: Sequence[str] | None = None
        if len(present) == len(numbers):
            labels, classes = np.concatenate(present), class_names(path.stem)
            names = _numbered(labels) if classes is None else _named(labels, classes, path.name)
    return Contents(range(len(splits)), names, splits, independent=True)


def _image_members(archive: zipfile.ZipFile) -> list[tuple[str, _Member]]:
    """The pictures' arrays with their splits, in the order of their indices."""
    present = {name.removesuffix(".npy") for name in archive.namelist()}
    members = [(split, _member(archive, f"{split}_images")) for split in _SPLITS if f"{split}_images" in present]
    if not members:
        found = ", ".join(f"{name[:30]!a}" for name in sorted(present)[:_MAX_KEYS]) or "none"
        more = "" if len(present) <= _MAX_KEYS else f" and {len(present) - _MAX_KEYS} more"
        raise UnreadableImage(f"arrays {found}{more}; expected MedMNIST's train_images, train_labels, val_images, ...")
    for _, member in members:
        _check_images(member)
    num_pictures = sum(member.shape[0] for _, member in members)
    if not 1 <= num_pictures <= _MAX_PICTURES:
        raise UnreadableImage(f"{num_pictures} pictures; expected 1 to {_MAX_PICTURES}")
    return members


def _check_images(member: _Member) -> None:
    shape, key = member.shape, member.name.removesuffix(".npy")
    if len(shape) == 4 and shape[3] != 3:
        raise UnreadableImage(
            f"{key} holds volumes of shape {shape} (MedMNIST3D); expected pictures: (N, H, W) or (N, H, W, 3)"
        )
    if len(shape) not in (3, 4):
        raise UnreadableImage(f"{key} has shape {shape}; expected (N, H, W) or (N, H, W, 3)")
    if member.dtype.kind != "u" or member.dtype.itemsize > 2:
        raise UnreadableImage(f"{key} holds {member.dtype}; expected uint8 or uint16")
    _check_size(shape[2], shape[1], f"{key} holds ")


def _npz_labels(archive: zipfile.ZipFile, split: str, num_pictures: int) -> NDArray[Any] | None:
    """One number for each picture; None where there are no labels, or several for one picture."""
    key = f"{split}_labels"
    if f"{key}.npy" not in archive.namelist():
        return None
    member = _member(archive, key)
    if not member.shape or member.shape[0] != num_pictures:
        raise UnreadableImage(f"{key} has shape {member.shape} for {num_pictures} pictures")
    if member.shape[1:] not in ((), (1,)):
        return None
    if member.dtype.kind not in "uib":
        raise UnreadableImage(f"{key} holds {member.dtype}; expected whole numbers")
    with archive.open(member.name) as stream:
        stream.read(member.start)
        return member.view(_read_exactly(stream, member.num_bytes)).reshape(num_pictures)


class _Sparing(io.BufferedReader):
    """Gives a MiB at most at a time: zipfile reads a list of members in one go, however long the file says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_CHUNK if size is None or size < 0 else min(size, _CHUNK))


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    with _Sparing(io.FileIO(path)) as file:
        if file.peek(2)[:2] != b"PK":
            raise UnreadableImage("no npz file: it does not begin as a zip archive does")
        with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            yield archive


def _member(archive: zipfile.ZipFile, key: str) -> _Member:
    """An array's header, without its values."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableImage(f"{key} is compressed in an unusual way; expected numpy.savez or savez_compressed")
    with archive.open(info) as stream:
        start = io.BytesIO(stream.read(_NPY_HEADER))  # numpy would read a header as long as it claims to be
    version = np.lib.format.read_magic(start)
    if version not in ((1, 0), (2, 0)):
        raise UnreadableImage(f"{key} is of .npy version {version[0]}.{version[1]}; expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(start)
    if dtype.hasobject:
        raise UnreadableImage(f"{key} holds Python objects, which are not loaded; expected numbers")
    if any(side < 0 for side in shape):
        raise UnreadableImage(f"{key} has shape {shape}")
    member = _Member(info.filename, shape, dtype, is_fortran, start.tell())
    expected = member.start + member.num_bytes
    there = min(info.compress_size, archive.start_dir)  # the pictures end where the list of members begins
    if expected != info.file_size or expected > there * (1 if info.compress_type == zipfile.ZIP_STORED else _MAX_RATIO):
        raise UnreadableImage(f"{key} should take {expected} bytes by its header, and does not")
    return member


# idx


class IdxFile(_ArrayFile):
    """The pictures of one file of MNIST's kind, as stored: white digits on black."""

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        super().__init__(path, preprocess, mask)
        with _reasons():
            self._shape = _idx_images_shape(path)
        self._is_turned = path.name.lower().startswith("emnist")  # written column by column, unlike all others

    @property
    def num_pictures(self) -> int:
        """As the header says."""
        return self._shape[0]

    def _picture(self, index: int) -> tuple[NDArray[Any], int]:
        if not 0 <= index < self._shape[0]:
            raise UnreadableImage(f"picture {index} of {self._shape[0]}")
        pixels = self._load_once("pictures", self._load)[index]
        return (pixels.T if self._is_turned else pixels), 0

    def _load(self) -> NDArray[np.uint8]:
        with _open_idx(self._path) as stream:
            stream.read(16)
            values = spill(stream, math.prod(self._shape))
            _require_end(stream)
        return np.frombuffer(values, np.uint8).reshape(self._shape)


def _inspect_idx(path: Path) -> Contents:
    with _reasons():
        num_pictures, _, _ = _idx_images_shape(path)
    labels_path = _idx_labels_path(path)
    names = None
    if labels_path is not None:
        with _reasons(f"{labels_path.name}: "):
            names = _numbered(_idx_labels(labels_path, num_pictures))
    words = re.split(r"[-_. ]", path.name.lower())
    split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
    return Contents(
        range(num_pictures),
        names,
        None if split is None else [split] * num_pictures,
        independent=True,
        companions=() if labels_path is None else (labels_path,),
    )


def _idx_labels_path(path: Path) -> Path | None:
    """The labels beside the pictures: zipped or not, whatever the pictures are."""
    name = _IDX_NAME.sub(r"\1labels\g<2>1\3", path.name)
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((path.with_name(each) for each in (name, other) if path.with_name(each).is_file()), None)


@contextmanager
def _open_idx(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        is_zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_zipped:
            yield file
            return
        with gzip.open(file) as stream:
            yield cast(IO[bytes], stream)


def _idx_images_shape(path: Path) -> tuple[int, int, int]:
    with _open_idx(path) as stream:
        kind, num_pictures, height, width = struct.unpack(">4I", _read_exactly(stream, 16))
        is_zipped = isinstance(cast(Any, stream), gzip.GzipFile)
    if kind != _IDX_IMAGES:
        raise UnreadableImage("no idx file of pictures: it does not begin with 00 00 08 03")
    if not 1 <= num_pictures <= _MAX_PICTURES:
        raise UnreadableImage(f"{num_pictures} pictures; expected 1 to {_MAX_PICTURES}")
    _check_size(width, height)
    ratio = _MAX_RATIO if is_zipped else 1
    if 16 + num_pictures * height * width > ratio * path.stat().st_size:
        raise UnreadableImage(f"cut short: it should hold {num_pictures} pictures of {width} x {height}")
    return num_pictures, height, width


def _idx_labels(path: Path, num_pictures: int) -> NDArray[np.uint8]:
    with _open_idx(path) as stream:
        kind, num_labels = struct.unpack(">2I", _read_exactly(stream, 8))
        if kind != _IDX_LABELS:
            raise UnreadableImage("no idx file of labels: it does not begin with 00 00 08 01")
        if num_labels != num_pictures:
            raise UnreadableImage(f"{num_labels} labels for {num_pictures} pictures")
        labels = np.frombuffer(_read_exactly(stream, num_labels), np.uint8)
        _require_end(stream)
    return labels


# CIFAR


class CifarFile(_ArrayFile):
    """The pictures of one batch of CIFAR-10 or CIFAR-100."""

    @property
    def num_pictures(self) -> int:
        """Of the batch, which is read for it."""
        return len(self._rows())

    def _rows(self) -> NDArray[np.uint8]:
        return self._load_once("rows", lambda: _read_batch(self._path)[0])

    def _picture(self, index: int) -> tuple[NDArray[Any], int]:
        rows = self._rows()
        if not 0 <= index < len(rows):
            raise UnreadableImage(f"picture {index} of {len(rows)}")
        planes = rows[index].reshape(3, _CIFAR_SIDE, _CIFAR_SIDE)  # red, green, blue
        return planes.transpose(1, 2, 0), 0


def _inspect_cifar(path: Path) -> Contents:
    with _reasons():
        rows, labels = _read_batch(path)
        meta, classes = _class_names(path)
    names: Sequence[str] | None = None
    if labels is not None:
        names = _numbered(labels) if classes is None else _named(labels, classes, meta.name)
    split = "test" if path.name.startswith("test") else "train"
    return Contents(
        range(len(rows)),
        names,
        [split] * len(rows),
        independent=True,
        companions=() if classes is None else (meta,),
    )


def _read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
    """Pixels (N, 3072) and, where the batch has them, labels (N,)."""
    batch = _dictionary(path)
    rows, labels = batch.get("data"), batch.get("fine_labels", batch.get("labels"))
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3 * _CIFAR_SIDE**2,):
        raise UnreadableImage("no CIFAR batch: it has no 'data' of N x 3072 bytes")
    if not 1 <= len(rows) <= _MAX_PICTURES:
        raise UnreadableImage(f"{len(rows)} pictures; expected 1 to {_MAX_PICTURES}")
    if labels is None:
        return rows, None
    if not isinstance(labels, list) or len(labels) != len(rows) or any(type(label) is not int for label in labels):
        raise UnreadableImage(f"the labels of {len(rows)} pictures are not as many whole numbers")
    return rows, np.array(labels, np.int64)


def _class_names(path: Path) -> tuple[Path, list[str] | None]:
    """The file with the classes' names, and these; None where it is not there."""
    is_of_ten = _CIFAR_BATCH.fullmatch(path.name)
    meta = path.with_name("batches.meta" if is_of_ten else "meta")
    if not meta.is_file():
        return meta, None
    names = _dictionary(meta).get("label_names" if is_of_ten else "fine_label_names")
    if not isinstance(names, list):
        raise UnreadableImage(f"{meta.name}: it has no list of class names")
    texts = [name.decode("utf-8") if isinstance(name, bytes) else name for name in names]
    if not all(isinstance(text, str) and text.isprintable() and 0 < len(text) <= 100 for text in texts):
        raise UnreadableImage(f"{meta.name}: its class names are not short texts")
    return meta, texts


def _dictionary(path: Path) -> dict[str, Any]:
    batch = unpickle.load(path, _MAX_BATCH)
    if not isinstance(batch, dict):
        raise UnreadableImage("no CIFAR batch: its pickle holds no dictionary")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}


# labels and bytes


def _check_size(width: int, height: int, prefix: str = "") -> None:
    if min(width, height) < _MIN_SIDE:
        expected = f"expected at least {_MIN_SIDE} x {_MIN_SIDE}"
        raise UnreadableImage(f"{prefix}pictures of {width} x {height}; {expected}")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{prefix}pictures of {width} x {height}, more than {MAX_PIXELS // 10**6} megapixels")


def _numbered(labels: NDArray[Any]) -> list[str]:
    """7 -> "07" where there are classes of two digits."""
    if labels.min() < 0:
        raise UnreadableImage(f"labels down to {labels.min()}; expected 0 and more")
    numbers, places = np.unique(labels, return_inverse=True)
    width = len(str(int(numbers[-1])))
    names = [f"{int(number):0{width}}" for number in numbers]
    return [names[place] for place in places.tolist()]


def _named(labels: NDArray[Any], names: Sequence[str], source: str) -> list[str]:
    if labels.min() < 0 or labels.max() >= len(names):
        raise UnreadableImage(f"labels from {labels.min()} to {labels.max()}; {source} names {len(names)} classes")
    return [names[label] for label in labels.tolist()]


def spill(stream: IO[bytes], num_bytes: int) -> mmap.mmap:
    """The stream's next `num_bytes` bytes, through a temporary file that has no name and so leaves nothing behind."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if num_bytes > free:
        raise UnreadableImage(
            f"inflated it takes {num_bytes >> 20} MiB, and the temporary folder has {free >> 20} MiB (set TMPDIR)"
        )
    with tempfile.TemporaryFile() as file:
        for start in range(0, num_bytes, _CHUNK):
            file.write(_read_exactly(stream, min(_CHUNK, num_bytes - start)))
        file.flush()
        return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)


def _read_exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:  # a zip member gives less than was asked
        more = stream.read(num_bytes - len(data))
        if not more:
            raise UnreadableImage("cut short")
        data += more
    return data


def _require_end(stream: IO[bytes]) -> None:
    """Nothing follows; reaching the end is also what makes zip and gzip compare their checksums."""
    if stream.read(1):
        raise UnreadableImage("longer than its header says")


@contextmanager
def _reasons(prefix: str = "") -> Iterator[None]:
    """What zipfile, gzip and numpy raise on a damaged file, as a reason."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f"{prefix}{error}") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, struct.error):
        raise UnreadableImage(f"{prefix}damaged or cut short") from None
    except OSError as error:
        raise UnreadableImage(f"{prefix}{error.strerror or 'damaged'}") from None
    except (LookupError, ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RuntimeError) as error:
        raise UnreadableImage(f"{prefix}damaged ({type(error).__name__})") from None
