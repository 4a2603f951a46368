"""Readers of files of thousands of small images: MedMNIST's npz, MNIST's idx and CIFAR's binary batches.

contents = inspect(Path("pneumoniamnist.npz"), preprocess)   # one index, label and split per image
with ArrayFile(path, preprocess) as file:
    raw = file.read(0)

Compressed arrays are inflated once, into an unnamed temporary file that is mapped into memory: an open file takes disk
space and almost no memory. MNIST: http://yann.lecun.com/exdb/mnist; CIFAR: Krizhevsky, Learning Multiple Layers of
Features from Tiny Images (2009), https://www.cs.toronto.edu/~kriz/cifar.html; MedMNIST: Yang et al., Scientific Data
10, 41 (2023).

Shapes: N images of a file, H W height and width, D depth of the volumes of MedMNIST3D.
"""

import io
import math
import re
import struct
import sys
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.data.conditions import join_findings
from medgen.ingest.formats.medmnist import class_names
from medgen.ingest.formats.raw import Contents, ImageFile, RawImage, UnreadableImage, check_size, no_volume
from medgen.ingest.formats.streams import (
    CHUNK,
    MAX_DEFLATE_RATIO,
    LoadOnce,
    check_end,
    copy_to_mmap,
    max_inflated_bytes,
    open_inflated,
    read_exactly,
    unreadable_errors,
)
from medgen.ingest.formats.windowing import apply_window

_SPLITS = ("train", "val", "test")
_SPLIT_OF_WORD = {"train": "train", "val": "val", "valid": "val", "t10k": "test", "test": "test"}
_MAX_IMAGES = 1 << 21  # more than twice the images of the largest set of digits, EMNIST
_MAX_KEYS = 8  # listed in a message
_NPY_HEADER = 1 << 16
_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801  # unsigned bytes in three dimensions, in one
_IDX_NAME = re.compile(r"((?:.*[-_. ])?)images([-.]idx)3(-ubyte(?:\.gz)?)", re.IGNORECASE)
_IDX_LABELS_NAME = re.compile(r"(?:.*[-_. ])?labels[-.]idx1-ubyte(?:\.gz)?", re.IGNORECASE)
_CIFAR_PIXEL_BYTES = 3 * 32 * 32  # of an image: red, green, blue
_CIFAR_NAME = re.compile(r"data_batch_\d+|test_batch|train|test")
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
_PICKLED_CIFAR = (
    "a pickled CIFAR batch, which is not loaded because a pickle can run code; expected the binary edition: unpack "
    "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html), or run "
    "`medgen data fetch cifar10`"
)


def is_idx_images(name: str) -> bool:
    """True for the name of an idx file of images, such as t10k-images-idx3-ubyte.gz."""
    return _IDX_NAME.fullmatch(name) is not None


def is_idx_labels(name: str) -> bool:
    """True for the name of an idx file of labels, such as t10k-labels-idx1-ubyte.gz."""
    return _IDX_LABELS_NAME.fullmatch(name) is not None


def companion_names(name: str) -> list[str]:
    """Names that the labels of an idx file, or the class names of a CIFAR batch, can have; none for another file."""
    if is_idx_images(name):
        labels = _IDX_NAME.sub(r"\1labels\g<2>1\3", name)
        return [labels, labels.removesuffix(".gz") if labels.endswith(".gz") else f"{labels}.gz"]
    return [edition.class_names for edition in _CIFAR_EDITIONS if edition.file_name.fullmatch(name)]


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """Number, labels and splits of the images of an npz, idx or CIFAR file.

    Numeric labels are padded with zeros to one width, so that they sort as numbers.

    Raises:
        UnreadableImage: the file is damaged, is none of these formats, or is a pickled CIFAR batch.
    """
    inspect_format, _ = _format_of(path, preprocess.has_volumes)
    with unreadable_errors():
        return inspect_format(path)


class ArrayFile(ImageFile):
    """An npz, idx or CIFAR file; an npz file's arrays follow one another in the order train, val, test."""

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        _, find_arrays = _format_of(path, preprocess.has_volumes)
        with unreadable_errors():
            arrays = find_arrays(path)
        self._arrays = [LoadOnce(partial(_load_array, load)) for _, load in arrays]
        self._ends = list(accumulate(num_images for num_images, _ in arrays))
        self.num_images = self._ends[-1]
        self._mask, self._window = mask, preprocess.window
        self._keeps_colour = preprocess.channels == 3 and not mask
        self._spacing = (1.0, 1.0, 1.0) if preprocess.has_volumes else None  # not in the file

    def read(self, index: int) -> RawImage:
        """Read one image; 16-bit values are shifted so that the highest one of their array is close to white.

        With `preprocess.window` its ends become black and white instead.
        """
        if not 0 <= index < self.num_images:
            raise UnreadableImage(f"image {index} of {self.num_images}")
        number = bisect_right(self._ends, index)
        array, num_unused_bits = self._arrays[number]()
        stored = array[index - (self._ends[number] - len(array))]
        deep = stored.dtype.itemsize == 2
        pixels: Any = np.array(stored, np.uint16 if deep else np.uint8, order="C")
        is_colour = pixels.ndim == 3 and self._spacing is None
        height, width = pixels.shape[:2] if self._spacing is None else pixels.shape[1:]
        mode = ("RGB" if is_colour else "I" if deep else "L") + (";16" if deep else "")
        if num_unused_bits and not self._mask and self._window is None:
            pixels <<= num_unused_bits
        if is_colour and not self._keeps_colour:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        if self._window is not None and not self._mask:
            pixels = apply_window(pixels, self._window)
        return RawImage(pixels, (width, height), mode, self._spacing)


_Load = Callable[[], NDArray[Any]]  # loads the images (N, H, W), (N, H, W, 3) or volumes (N, D, H, W) of an array


def _load_array(load: _Load) -> tuple[NDArray[Any], int]:
    """Images of an array, and the number of high bits that none of its values uses."""
    with unreadable_errors():
        array = load()
        return array, 0 if array.dtype.itemsize == 1 else 16 - max(1, int(array.max()).bit_length())


def _format_of(
    path: Path, has_volumes: bool
) -> tuple[Callable[[Path], Contents], Callable[[Path], Sequence[tuple[int, _Load]]]]:
    """Functions that read a file's metadata, and the number of images and loader of each of its arrays."""
    is_idx = is_idx_images(path.name)
    if is_idx or _CIFAR_NAME.fullmatch(path.name.removesuffix(".bin")):
        if has_volumes:
            raise no_volume("flat images")
        return (_inspect_idx, _idx_arrays) if is_idx else (_inspect_cifar, _cifar_arrays)
    return partial(_inspect_npz, has_volumes=has_volumes), partial(_npz_arrays, has_volumes=has_volumes)


# npz


@dataclass(frozen=True)
class _Member:
    """Header of an array of an npz file, and the offset of its values in the member."""

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


def _npz_arrays(path: Path, has_volumes: bool) -> Sequence[tuple[int, _Load]]:
    with _open_npz(path) as archive:
        members = _read_image_members(archive, has_volumes)
        return [(member.shape[0], partial(_load_npz, path, member)) for _, member in members]


def _load_npz(path: Path, member: _Member) -> NDArray[Any]:
    with _open_npz(path) as archive, archive.open(member.name) as stream:
        stream.read(member.start)
        array = member.view(copy_to_mmap(stream, member.num_bytes))
        check_end(stream)
    return array


def _inspect_npz(path: Path, has_volumes: bool) -> Contents:
    with _open_npz(path) as archive:
        members = _read_image_members(archive, has_volumes)
        splits = [split for split, member in members for _ in range(member.shape[0])]
        per_split = [_read_npz_labels(archive, split, member.shape[0]) for split, member in members]
        present = [labels for labels in per_split if labels is not None]
        names: Sequence[str] | None = None
        findings: Sequence[str] | None = None
        if len(present) == len(per_split) and len({labels.shape[1] for labels in present}) == 1:
            labels, classes = np.concatenate(present), class_names(path.stem)
            if labels.shape[1] > 1:
                findings = _name_findings(labels, classes, path.name)
            else:
                labels = labels[:, 0]
                names = _number_labels(labels) if classes is None else _name_labels(labels, classes, path.name)
    return Contents(range(len(splits)), names, splits, independent=True, findings=findings)


def _read_image_members(archive: zipfile.ZipFile, has_volumes: bool) -> list[tuple[str, _Member]]:
    """Split and header of each array of images, in the order of the indices."""
    present = {name.removesuffix(".npy") for name in archive.namelist()}
    members = [(split, _read_member(archive, f"{split}_images")) for split in _SPLITS if f"{split}_images" in present]
    if not members:
        found = ", ".join(f"{name[:30]!a}" for name in sorted(present)[:_MAX_KEYS]) or "none"
        more = "" if len(present) <= _MAX_KEYS else f" and {len(present) - _MAX_KEYS} more"
        raise UnreadableImage(f"arrays {found}{more}; expected MedMNIST's train_images, train_labels, val_images, ...")
    for _, member in members:
        _check_image_array(member, has_volumes)
    _check_num_images(sum(member.shape[0] for _, member in members))
    return members


def _check_image_array(member: _Member, has_volumes: bool) -> None:
    shape, key = member.shape, member.name.removesuffix(".npy")
    are_volumes = len(shape) == 4 and shape[3] != 3
    if are_volumes and not has_volumes:
        raise UnreadableImage(
            f"{key} holds volumes of shape {shape} (MedMNIST3D); expected images: (N, H, W) or (N, H, W, 3). For "
            "volumes set preprocess.image_size to three sides, such as [28, 28, 28]"
        )
    if has_volumes and not are_volumes:
        raise no_volume(f"{key} has shape {shape}")
    if len(shape) not in (3, 4):
        raise UnreadableImage(f"{key} has shape {shape}; expected (N, H, W) or (N, H, W, 3)")
    if member.dtype.kind != "u" or member.dtype.itemsize > 2:
        raise UnreadableImage(f"{key} holds {member.dtype}; expected uint8 or uint16")
    for height, width in pairwise(shape[1:4] if has_volumes else shape[1:3]):
        check_size(width, height, f"{key} holds ")


def _read_npz_labels(archive: zipfile.ZipFile, split: str, num_images: int) -> NDArray[Any] | None:
    """Class numbers (N, 1) of the images, or 0 and 1 for each of their L findings (N, L); None if there are none."""
    key = f"{split}_labels"
    if f"{key}.npy" not in archive.namelist():
        return None
    member = _read_member(archive, key)
    if not member.shape or member.shape[0] != num_images:
        raise UnreadableImage(f"{key} has shape {member.shape} for {num_images} images")
    if len(member.shape) > 2 or 0 in member.shape[1:]:
        return None
    if member.dtype.kind not in "uib":
        if len(member.shape) == 2 and member.shape[1] > 1:
            return None
        raise UnreadableImage(f"{key} holds {member.dtype}; expected whole numbers")
    with archive.open(member.name) as stream:
        stream.read(member.start)
        return member.view(read_exactly(stream, member.num_bytes)).reshape(num_images, -1)


class _ChunkedReader(io.BufferedReader):
    """Reads at most 1 MiB at a time: zipfile reads the list of members in one call, however long it claims to be."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(CHUNK if size is None or size < 0 else min(size, CHUNK))


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    with _ChunkedReader(io.FileIO(path)) as file:
        if file.peek(2)[:2] != b"PK":
            raise UnreadableImage("not an npz file: it does not begin like a zip archive")
        with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            yield archive


def _read_member(archive: zipfile.ZipFile, key: str) -> _Member:
    """Read and check an array's header, without its values."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableImage(f"{key} has an unusual compression; expected numpy.savez or savez_compressed")
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
    compressed = min(info.compress_size, archive.start_dir)  # the arrays end where the list of members begins
    if expected != info.file_size or expected > compressed * (
        1 if info.compress_type == zipfile.ZIP_STORED else MAX_DEFLATE_RATIO
    ):
        raise UnreadableImage(f"{key} is not {expected} bytes long, as its header says")
    return member


# idx


def _idx_arrays(path: Path) -> Sequence[tuple[int, _Load]]:
    shape = _read_idx_shape(path)
    return [(shape[0], partial(_load_idx, path, shape))]


def _load_idx(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    with open_inflated(path) as stream:
        stream.read(16)
        values = copy_to_mmap(stream, math.prod(shape))
        check_end(stream)
    images = np.frombuffer(values, np.uint8).reshape(shape)
    return images.transpose(0, 2, 1) if path.name.lower().startswith("emnist") else images  # stored column by column


def _inspect_idx(path: Path) -> Contents:
    num_images, _, _ = _read_idx_shape(path)
    labels_path = _find_idx_labels(path)
    names = None
    if labels_path is not None:
        with unreadable_errors(f"{labels_path.name}: "):
            names = _number_labels(_read_idx_labels(labels_path, num_images))
    words = re.split(r"[-_. ]", path.name.lower())
    split = next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)
    return Contents(
        range(num_images),
        names,
        None if split is None else [split] * num_images,
        independent=True,
        companions=() if labels_path is None else (labels_path,),
    )


def _find_idx_labels(path: Path) -> Path | None:
    """Path of the labels file in the same folder, gzipped or not."""
    return next((found for name in companion_names(path.name) if (found := path.with_name(name)).is_file()), None)


def _read_idx_shape(path: Path) -> tuple[int, int, int]:
    """N, H and W by the header, checked against the file's size."""
    with open_inflated(path) as stream:
        kind, num_images, height, width = struct.unpack(">4I", read_exactly(stream, 16).data)
    if kind != _IDX_IMAGES:
        raise UnreadableImage("not an idx file of images: it does not begin with 00 00 08 03")
    _check_num_images(num_images)
    check_size(width, height)
    if 16 + num_images * height * width > max_inflated_bytes(path):
        raise UnreadableImage(f"cut short: it should hold {num_images} images of {width} x {height}")
    return num_images, height, width


def _read_idx_labels(path: Path, num_images: int) -> NDArray[np.uint8]:
    with open_inflated(path) as stream:
        kind, num_labels = struct.unpack(">2I", read_exactly(stream, 8).data)
        if kind != _IDX_LABELS:
            raise UnreadableImage("not an idx file of labels: it does not begin with 00 00 08 01")
        if num_labels != num_images:
            raise UnreadableImage(f"{num_labels} labels for {num_images} images")
        labels = np.frombuffer(read_exactly(stream, num_labels), np.uint8)
        check_end(stream)
    return labels


# CIFAR


@dataclass(frozen=True)
class _CifarEdition:
    """Binary edition of CIFAR-10 or CIFAR-100: a row is the label bytes of an image, then its 3072 pixel bytes."""

    name: str
    file_name: re.Pattern[str]
    num_classes: tuple[int, ...]  # of each label byte; the last one is the label
    class_names: str  # text file with one class name a line


_CIFAR_EDITIONS = (
    _CifarEdition("CIFAR-10", re.compile(r"(data_batch_\d+|test_batch)\.bin"), (10,), "batches.meta.txt"),
    _CifarEdition("CIFAR-100", re.compile(r"(train|test)\.bin"), (20, 100), "fine_label_names.txt"),
)


def is_cifar_batch(path: Path) -> bool:
    """True for a batch of CIFAR's binary edition, by its name, size and labels, and for a pickled batch.

    `inspect` refuses a pickled batch with a message that names the binary edition.
    """
    if not path.is_file() or not _CIFAR_NAME.fullmatch(path.name.removesuffix(".bin")):
        return False
    if _is_pickled_cifar(path):
        return True
    try:
        _read_cifar(path)
    except UnreadableImage:
        return False
    return True


def _cifar_arrays(path: Path) -> Sequence[tuple[int, _Load]]:
    _, rows = _read_cifar(path)
    planes = rows[:, -_CIFAR_PIXEL_BYTES:].reshape(-1, 3, 32, 32)  # red, green, blue; still mapped
    return [(len(rows), lambda: planes.transpose(0, 2, 3, 1))]


def _inspect_cifar(path: Path) -> Contents:
    edition, rows = _read_cifar(path)
    labels, names_path = rows[:, len(edition.num_classes) - 1], path.with_name(edition.class_names)
    has_names = names_path.is_file()
    if has_names:
        with unreadable_errors(f"{names_path.name}: "):
            classes = _read_class_names(names_path)
    return Contents(
        range(len(labels)),
        _name_labels(labels, classes, names_path.name) if has_names else _number_labels(labels),
        ["test" if path.name.startswith("test") else "train"] * len(labels),
        independent=True,
        companions=(names_path,) if has_names else (),
    )


def _is_pickled_cifar(path: Path) -> bool:
    with path.open("rb") as file:
        return not path.suffix and _PICKLE_START.match(file.read(2)) is not None


def _read_cifar(path: Path) -> tuple[_CifarEdition, NDArray[np.uint8]]:
    """Edition and rows (N, label bytes + 3072) of a batch, mapped into memory, after a check of all label bytes."""
    if _is_pickled_cifar(path):
        raise UnreadableImage(_PICKLED_CIFAR)
    edition = next((edition for edition in _CIFAR_EDITIONS if edition.file_name.fullmatch(path.name)), None)
    if edition is None:
        raise UnreadableImage("not a CIFAR batch; expected data_batch_1.bin, test_batch.bin, train.bin or test.bin")
    row_bytes = len(edition.num_classes) + _CIFAR_PIXEL_BYTES
    num_rows, rest = divmod(path.stat().st_size, row_bytes)
    if rest:
        raise UnreadableImage(f"not a {edition.name} batch: its size is not a multiple of {row_bytes} bytes")
    _check_num_images(num_rows)
    rows = np.memmap(path, np.uint8, "r", shape=(num_rows, row_bytes))
    for labels, num_classes in zip(rows.T, edition.num_classes, strict=False):
        if labels.max() >= num_classes:
            raise UnreadableImage(
                f"not a {edition.name} batch: a label byte is {labels.max()}; expected 0 to {num_classes - 1}"
            )
    return edition, rows


def _read_class_names(path: Path) -> list[str]:
    with path.open("rb") as file:
        lines = file.read(1 << 16).decode("utf-8").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if not all(name.isprintable() and len(name) <= 100 for name in names):
        raise UnreadableImage("its lines are not class names of at most 100 characters")
    return names


# checks and labels


def _check_num_images(num_images: int) -> None:
    if not 1 <= num_images <= _MAX_IMAGES:
        raise UnreadableImage(f"{num_images} images; expected 1 to {_MAX_IMAGES}")


def _number_labels(labels: NDArray[Any]) -> list[str]:
    """Labels as numbers of equal width: 7 becomes "07" if there are classes of two digits."""
    if labels.min() < 0:
        raise UnreadableImage(f"labels down to {labels.min()}; expected 0 and more")
    numbers, places = np.unique(labels, return_inverse=True)
    width = len(str(int(numbers[-1])))
    names = [f"{int(number):0{width}}" for number in numbers]
    return [names[place] for place in places.tolist()]


def _name_findings(labels: NDArray[Any], names: Sequence[str] | None, source: str) -> list[str] | None:
    """Texts of the findings of each image from 0 and 1 for each finding (N, L); None for other numbers."""
    count = labels.shape[1]
    if labels.min() < 0 or labels.max() > 1:
        return None
    if names is None:
        names = [f"{number:0{len(str(count - 1))}}" for number in range(count)]
    if len(names) != count:
        raise UnreadableImage(f"labels of {count} findings; {source} names {len(names)}")
    return [sys.intern(join_findings([names[at] for at in np.flatnonzero(row).tolist()])) for row in labels]


def _name_labels(labels: NDArray[Any], names: Sequence[str], source: str) -> list[str]:
    if labels.min() < 0 or labels.max() >= len(names):
        raise UnreadableImage(f"labels from {labels.min()} to {labels.max()}; {source} names {len(names)} classes")
    return [names[label] for label in labels.tolist()]
