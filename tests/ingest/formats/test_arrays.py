"""npz, idx and CIFAR files: images, labels and splits as numpy and gzip read them, and errors for damaged files."""

import contextlib
import gzip
import pickle
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen.config import Preprocess
from medgen.ingest.formats import arrays, streams
from medgen.ingest.formats.arrays import ArrayFile, inspect, is_cifar_batch, is_idx_images
from medgen.ingest.formats.raw import ImageFile, RawImage, UnreadableImage

GREY, COLOUR = Preprocess(), Preprocess(channels=3)
RANDOM = np.random.default_rng(0)


def random_pixels(*shape: int, dtype: type = np.uint8, top: int = 256) -> np.ndarray:
    return RANDOM.integers(0, top, shape).astype(dtype)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ [0.299, 0.587, 0.114]


def open_file(path: Path, preprocess: Preprocess = GREY, mask: bool = False) -> ImageFile:
    return ArrayFile(path, preprocess, mask)


def read_all(path: Path, preprocess: Preprocess = GREY) -> list[RawImage]:
    with open_file(path, preprocess) as file:
        return [file.read(index) for index in inspect(path, preprocess).indices]


# npz


def save_npz(path: Path, save: Callable[..., None] = np.savez_compressed, **changes: Any) -> dict[str, np.ndarray]:
    """A small file in MedMNIST's layout; a change of None leaves the array out."""
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = random_pixels(count, 6, 7)
        arrays[f"{split}_labels"] = random_pixels(count, 1, top=3)
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    save(path, **arrays)
    return arrays


def test_labels_of_a_medmnist_set_are_its_class_names(tmp_path: Path) -> None:
    stored = save_npz(tmp_path / "pneumoniamnist.npz", **{
        f"{split}_labels": random_pixels(count, 1, top=2) for split, count in (("train", 5), ("val", 2), ("test", 3))
    })  # fmt: skip
    numbers = np.concatenate([stored[f"{split}_labels"] for split in ("train", "val", "test")]).ravel()
    found = inspect(tmp_path / "pneumoniamnist.npz", GREY).labels
    assert found == [("normal", "pneumonia")[number] for number in numbers]


def test_volumes_of_medmnist_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    """OrganMNIST3D has other class numbers than the flat sets."""
    stored = save_npz(tmp_path / "organmnist3d.npz", **{
        f"{split}_images": random_pixels(count, 28, 28, 28) for split, count in (("train", 5), ("val", 2), ("test", 3))
    })  # fmt: skip
    settings = Preprocess(image_size=(28, 28, 28), clahe_clip=0.0)
    contents = inspect(tmp_path / "organmnist3d.npz", settings)
    assert contents.labels is not None and contents.labels[0] == ("liver", "kidney-right", "kidney-left")[
        int(stored["train_labels"][0, 0])
    ]  # fmt: skip
    found = read_all(tmp_path / "organmnist3d.npz", settings)
    expected = np.concatenate([stored[f"{split}_images"] for split in ("train", "val", "test")])
    assert np.array_equal(np.stack([raw.pixels for raw in found]), expected)
    assert {(raw.size, raw.mode, raw.spacing) for raw in found} == {((28, 28), "L", (1.0, 1.0, 1.0))}
    save_npz(tmp_path / "flat.npz")
    for name in ("flat.npz", "t10k-images-idx3-ubyte"):
        with pytest.raises(UnreadableImage, match="three sides, which needs volumes"):
            inspect(tmp_path / name, settings)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_medmnist_images_come_in_the_order_train_val_test(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "set.npz"
    stored = save_npz(path, save)
    contents = inspect(path, GREY)
    assert list(contents.indices) == list(range(10))
    assert contents.splits == ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    labels = np.concatenate([stored[f"{split}_labels"] for split in ("train", "val", "test")])
    assert contents.labels == [str(label) for label in labels[:, 0]]
    assert contents.independent and contents.patient is None and not contents.companions
    images = np.concatenate([stored[f"{split}_images"] for split in ("train", "val", "test")])
    found = read_all(path)
    assert np.array_equal([raw.pixels for raw in found], images)
    assert {(raw.size, raw.mode, raw.pixels.dtype.name) for raw in found} == {((7, 6), "L", "uint8")}


def test_colour_images_are_rgb_or_luma(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    rgb = random_pixels(5, 6, 7, 3)
    save_npz(path, train_images=np.asfortranarray(rgb))
    assert np.array_equal([raw.pixels for raw in read_all(path, COLOUR)[:5]], rgb)
    for raw, expected in zip(read_all(path)[:5], rgb, strict=True):
        assert np.abs(raw.pixels - luma(expected)).max() <= 1.0
        assert raw.mode == "RGB"
    assert read_all(path, COLOUR)[5].pixels.shape == (6, 7)  # grey stays grey


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_images_are_shifted_to_fill_the_range(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "set.npz"
    deep = random_pixels(5, 6, 7, dtype=np.uint16, top=1000).astype(dtype)
    deep[0] //= 100
    deep[4, 0, 0] = 1000  # ten bits
    save_npz(path, train_images=deep)
    found = read_all(path)[:5]
    assert np.array_equal([raw.pixels for raw in found], deep.astype(np.int64) * 64)
    assert found[0].mode == "I;16"
    with ArrayFile(path, COLOUR, mask=True) as file:
        assert np.array_equal(file.read(0).pixels, deep[0])  # a mask's values are as stored


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([3, 12, 0, 7, 12]), ["03", "12", "00", "07", "12"]),
        (np.array([[3], [2], [0], [1], [2]], np.int64), ["03", "02", "00", "01", "02"]),  # others reach 12
        (np.array([True, False, True, True, False]), ["01", "00", "01", "01", "00"]),
        (np.zeros((5, 14), np.uint8), None),  # several labels per image
        (None, None),
    ],
)
def test_labels_are_padded_to_sort_as_numbers(
    tmp_path: Path, labels: np.ndarray | None, expected: list[str] | None
) -> None:
    path = tmp_path / "set.npz"
    save_npz(path, train_labels=labels, val_labels=np.array([12, 1]))
    found = inspect(path, GREY).labels
    assert (None if found is None else list(found[:5])) == expected


def test_a_split_may_be_missing(tmp_path: Path) -> None:
    save_npz(tmp_path / "set.npz", val_images=None, val_labels=None)
    assert inspect(tmp_path / "set.npz", GREY).splits == ["train"] * 5 + ["test"] * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_images": np.zeros((5, 4, 4, 4), np.uint8)}, r"train_images .*\(5, 4, 4, 4\) \(MedMNIST3D\); expected"),
        ({"train_images": np.zeros((5, 4, 4))}, "train_images holds float64; expected uint8 or uint16"),
        ({"train_images": np.zeros((5, 4, 4), np.uint32)}, "holds uint32"),
        ({"train_images": np.zeros((5, 4), np.uint8)}, r"has shape \(5, 4\)"),
        ({"train_images": np.zeros((), np.uint8)}, r"has shape \(\)"),
        ({"train_images": np.zeros((5, 0, 4), np.uint8)}, "images of 4 x 0; expected at least 4 x 4"),
        ({"train_images": np.zeros((5, 9, 3), np.uint8)}, "train_images holds images of 3 x 9; expected at least 4"),
        ({"train_images": np.array([[[None]]])}, "Python objects"),
        ({"train_labels": np.array([None] * 5)}, "Python objects"),
        ({"train_labels": np.zeros(5)}, "train_labels holds float64"),
        ({"train_labels": np.zeros(4, int)}, r"\(4,\) for 5 images"),
        ({"train_labels": np.full(5, -1)}, "labels down to -1"),
        ({f"{split}_images": np.zeros((0, 4, 4), np.uint8) for split in ("train", "val", "test")}
         | {f"{split}_labels": None for split in ("train", "val", "test")}, "0 images"),
    ],
)  # fmt: skip
def test_unsupported_arrays_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    save_npz(tmp_path / "set.npz", **changes)
    with pytest.raises(UnreadableImage, match=reason):
        inspect(tmp_path / "set.npz", GREY)


def test_another_layout_is_refused_with_its_keys(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros(3), y_train=np.zeros(3))
    with pytest.raises(UnreadableImage, match=r"^arrays 'x_train', 'y_train'; expected MedMNIST's train_images"):
        inspect(tmp_path / "mnist.npz", GREY)


def npy(shape: tuple[int, ...], data: bytes = b"", descr: str = "'|u1'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def save_zip(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy((5, 4, 4), b"abc"), "bytes long, as its header says"),
        (npy((5, 4, 4), bytes(81)), "bytes long, as its header says"),
        (npy((1 << 40, 1, 1), bytes(80)), "train_images is not 1099511627861 bytes long"),
        (npy((-5, 4, 4), bytes(80)), "has shape"),
        (npy((5, 4, 4), bytes(80), "'|O'"), "Python objects"),
        (npy((5, 4, 4), bytes(80), "__import__('os').getcwd()"), "damaged"),
        (npy((5, 4, 4), bytes(80), "(" * 5000 + ")" * 5000), "damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1000), "damaged"),
        (b"\x93NUMPY\x09\x00", "version 9.0"),
        (b"PK", "damaged"),
        (b"", "damaged"),
    ],
)
def test_a_false_npy_header_is_refused_without_using_memory(tmp_path: Path, content: bytes, reason: str) -> None:
    save_zip(tmp_path / "set.npz", train_images=content)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=reason):
        inspect(tmp_path / "set.npz", GREY)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_size_beyond_the_deflate_ratio_is_refused(tmp_path: Path) -> None:
    """The npy header and the zip directory claim 3 GB; the file has 200 bytes."""
    content = npy((1 << 20, 50, 60), bytes(100))
    save_zip(tmp_path / "set.npz", train_images=content)
    data = bytearray((tmp_path / "set.npz").read_bytes())
    claimed = len(content) - 100 + (1 << 20) * 50 * 60
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, claimed)
    (tmp_path / "set.npz").write_bytes(data)
    with pytest.raises(UnreadableImage, match=f"train_images is not {claimed} bytes long, as its header says"):
        inspect(tmp_path / "set.npz", GREY)


def test_a_kilobyte_cannot_claim_a_million_images(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    for shape, reason in (((1 << 20, 1, 1), "images of 1 x 1; expected"), ((1 << 17, 4, 4), "as its header says")):
        save_zip(path, train_images=npy(shape, bytes(1 << 20)))
        data = bytearray(path.read_bytes())
        assert len(data) < 1500
        entry = data.rindex(b"PK\x01\x02")  # the directory claims four times the real size
        struct.pack_into("<I", data, entry + 20, 4000)
        struct.pack_into("<I", data, entry + 24, len(npy(shape)) + (shape[0] * shape[1] * shape[2]))
        path.write_bytes(data)
        with pytest.raises(UnreadableImage, match=reason):
            inspect(path, GREY)


def test_the_number_of_images_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_MAX_IMAGES", 9)
    save_npz(tmp_path / "set.npz")
    with pytest.raises(UnreadableImage, match=r"^10 images; expected 1 to 9$"):
        inspect(tmp_path / "set.npz", GREY)


def test_a_zip_bomb_is_mapped_from_disk_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.npz"
    side = 8000  # 64 MB of zeros in 64 kB
    save_zip(path, train_images=npy((1, side, side), bytes(side * side)))
    tracemalloc.start()
    with ArrayFile(path, GREY) as file:
        file.read(0)
    assert tracemalloc.get_traced_memory()[1] < 2.2 * side * side  # the image itself, and no more
    tracemalloc.stop()
    monkeypatch.setattr(streams.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with ArrayFile(path, GREY) as file, pytest.raises(UnreadableImage, match=r"takes 61 MiB, .* has 1 MiB free"):
        file.read(0)


def test_a_long_list_of_members_is_refused(tmp_path: Path) -> None:
    """Names of 64 KiB each make the directory larger than the arrays."""
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for number in range(100):
            archive.writestr(f"{number:060000d}", b"")
    with pytest.raises(UnreadableImage, match="damaged"):
        inspect(tmp_path / "set.npz", GREY)


def test_unusual_compression_is_refused(tmp_path: Path) -> None:
    save_zip(tmp_path / "set.npz", zipfile.ZIP_BZIP2, train_images=npy((5, 4, 4), bytes(80)))
    with pytest.raises(UnreadableImage, match="unusual"):
        inspect(tmp_path / "set.npz", GREY)


# idx


def idx_images(pixels: np.ndarray) -> bytes:
    return struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes()


def idx_labels(labels: list[int]) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + bytes(labels)


DIGITS = random_pixels(4, 5, 6)


@pytest.mark.parametrize(
    ("images", "labels", "split"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "train"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "test"),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte", "test"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte", "train"),
        ("test-images-idx3-ubyte", "test-labels-idx1-ubyte.gz", "test"),
        ("images-idx3-ubyte", "labels-idx1-ubyte", None),
        ("qmnist-test-images-idx3-ubyte.gz", "qmnist-test-labels-idx1-ubyte.gz", "test"),
    ],
)
def test_idx_files_with_their_labels(tmp_path: Path, images: str, labels: str, split: str | None) -> None:
    for name, content in ((images, idx_images(DIGITS)), (labels, idx_labels([9, 10, 0, 1]))):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    contents = inspect(tmp_path / images, GREY)
    assert list(contents.indices) == [0, 1, 2, 3]
    assert contents.labels == ["09", "10", "00", "01"]
    assert contents.splits == (None if split is None else [split] * 4)
    assert contents.companions == (tmp_path / labels,) and contents.independent
    found = read_all(tmp_path / images)
    assert np.array_equal([raw.pixels for raw in found], DIGITS)
    assert found[0].size == (6, 5) and found[0].mode == "L"


def test_emnist_images_are_transposed(tmp_path: Path) -> None:
    path = tmp_path / "emnist-letters-train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_images(DIGITS)))
    contents = inspect(path, GREY)
    assert contents.labels is None and contents.companions == () and contents.splits == ["train"] * 4
    assert np.array_equal(read_all(path)[1].pixels, DIGITS[1].T)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train-images-idx3-ubyte", True),
        ("T10K-IMAGES.IDX3-UBYTE.GZ", True),
        ("train-labels-idx1-ubyte.gz", False),
        ("train-labels-idx3-ubyte", False),
        ("images.png", False),
        ("myimages-idx3-ubyte", False),
        ("train-images-idx3-ubyte.zip", False),
    ],
)
def test_idx_image_files_are_recognised_by_name(name: str, expected: bool) -> None:
    assert is_idx_images(name) is expected


BAD_IDX = {
    "empty": (b"", "cut short"),
    "short header": (idx_images(DIGITS)[:10], "cut short"),
    "labels": (idx_labels([1, 2, 3]) * 2, "00 00 08 03"),
    "html": (b"<html><body>404 Not Found</body></html>", "00 00 08 03"),
    "no images": (struct.pack(">4I", 0x803, 0, 28, 28), "0 images"),
    "too many": (struct.pack(">4I", 0x803, 2**32 - 1, 1, 1), "4294967295 images"),
    "too large": (struct.pack(">4I", 0x803, 1, 2**31, 2**31), "more than 100 megapixels"),
    "no pixels": (struct.pack(">4I", 0x803, 1, 0, 28), "28 x 0; expected at least 4 x 4"),
    "specks": (struct.pack(">4I", 0x803, 9, 1, 1) + bytes(9), "^images of 1 x 1; expected at least 4 x 4$"),
    "a claim": (struct.pack(">4I", 0x803, 1 << 20, 28, 28) + bytes(1 << 20), "cut short: it should hold 1048576"),
    "bomb": (struct.pack(">4I", 0x803, 1000, 9000, 9000), "cut short: it should hold 1000"),
    "cut": (idx_images(DIGITS)[:-1], "cut short"),
    "more": (idx_images(DIGITS) + b"1", "longer"),
    "damaged gzip": (gzip.compress(idx_images(DIGITS))[:-12] + bytes(12), "damaged"),
    "cut gzip": (gzip.compress(idx_images(DIGITS))[:-12], "damaged"),
    "zipped more": (gzip.compress(idx_images(DIGITS) + bytes(10_000_000)), "longer"),
}


@pytest.mark.parametrize("name", BAD_IDX)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, name: str) -> None:
    content, reason = BAD_IDX[name]
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        read_all(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (idx_labels([1, 2, 3]), "t10k-labels-idx1-ubyte: 3 labels for 4 images"),
        (idx_labels([1, 2, 3, 4])[:-1], "cut short"),
        (idx_labels([1, 2, 3, 4]) + b"5", "longer"),
        (idx_images(DIGITS), "00 00 08 01"),
    ],
)
def test_idx_labels_that_do_not_fit_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_images(DIGITS))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        inspect(tmp_path / "t10k-images-idx3-ubyte", GREY)


# CIFAR

PIXELS = random_pixels(3, 3072)


def cifar(*labels: list[int], pixels: np.ndarray = PIXELS) -> bytes:
    """Rows of the binary edition: the label bytes, then red, green and blue."""
    return b"".join(bytes(row) + image.tobytes() for row, image in zip(labels, pixels, strict=True))


TEN = cifar([0], [9], [5])
HUNDRED = cifar([19, 99], [0, 0], [3, 5])


@pytest.mark.parametrize(
    ("name", "content", "labels", "split"),
    [
        ("data_batch_1.bin", TEN, ["0", "9", "5"], "train"),
        ("test_batch.bin", TEN, ["0", "9", "5"], "test"),
        ("train.bin", HUNDRED, ["99", "00", "05"], "train"),
        ("test.bin", HUNDRED, ["99", "00", "05"], "test"),
    ],
)
def test_cifar_batches(tmp_path: Path, name: str, content: bytes, labels: list[str], split: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert is_cifar_batch(path)
    contents = inspect(path, COLOUR)
    assert list(contents.indices) == [0, 1, 2] and contents.independent and contents.companions == ()
    assert contents.labels == labels
    assert contents.splits == [split] * 3
    expected = np.stack([PIXELS[:, :1024], PIXELS[:, 1024:2048], PIXELS[:, 2048:]], axis=-1).reshape(3, 32, 32, 3)
    assert np.array_equal([raw.pixels for raw in read_all(path, COLOUR)], expected)
    for raw, rgb in zip(read_all(path), expected, strict=True):
        assert np.abs(raw.pixels - luma(rgb)).max() <= 1.0
        assert raw.size == (32, 32) and raw.mode == "RGB"


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("test_batch.bin", cifar([2], [0], [1]), "batches.meta.txt"),
        ("test.bin", cifar([9, 2], [9, 0], [9, 1]), "fine_label_names.txt"),
    ],
)
def test_cifar_class_names_are_read_from_their_file(tmp_path: Path, name: str, content: bytes, names: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / names).write_text("airplane\ncar\nbird\n\n")
    contents = inspect(tmp_path / name, GREY)
    assert contents.labels == ["bird", "airplane", "car"]
    assert contents.companions == (tmp_path / names,)
    for text, reason in (
        ("airplane\ncar\n", f"labels from 0 to 2; {names} names 2 classes"),
        ("a\0b\n", f"{names}: its lines are not class names"),
        ("\N{SNOWMAN}".encode("utf-16").decode("latin-1"), f"{names}: its lines"),
    ):
        (tmp_path / names).write_text(text)
        with pytest.raises(UnreadableImage, match=reason):
            inspect(tmp_path / name, GREY)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("test_batch.bin", TEN[:-1], "not a CIFAR-10 batch: its size is not a multiple of 3073 bytes"),
        ("test_batch.bin", cifar([0], [10], [5]), "not a CIFAR-10 batch: a label byte is 10; expected 0 to 9"),
        ("test_batch.bin", b"", "0 images"),
        ("train.bin", TEN, "not a CIFAR-100 batch: its size is not a multiple of 3074 bytes"),
        ("train.bin", cifar([20, 1], [0, 0], [3, 5]), "not a CIFAR-100 batch: a label byte is 20; expected 0 to 19"),
        ("train.bin", cifar([0, 1], [0, 100], [3, 5]), "not a CIFAR-100 batch: a label byte is 100; expected 0 to 99"),
        ("train", b"a text", "not a CIFAR batch; expected data_batch_1.bin"),
    ],
)
def test_other_files_are_not_cifar_batches(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert not is_cifar_batch(tmp_path / name)
    with pytest.raises(UnreadableImage, match=f"^{reason}"):
        inspect(tmp_path / name, GREY)


def test_cifar_batches_are_recognised_by_name(tmp_path: Path) -> None:
    for name in ("model.bin", "data_batch_1.bin.gz", "my_test_batch.bin", "test_batch"):
        (tmp_path / name).write_bytes(TEN)
        assert not is_cifar_batch(tmp_path / name)
    (tmp_path / "test.bin").mkdir()
    assert not is_cifar_batch(tmp_path / "test.bin") and not is_cifar_batch(tmp_path / "train.bin")


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "train", "test"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_cifar_batch_is_refused_and_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int
) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({b"data": PIXELS, b"labels": [1, 2, 3]}, protocol))
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    assert is_cifar_batch(tmp_path / name)
    for use in (inspect, ArrayFile):
        with pytest.raises(UnreadableImage, match=r"^a pickled .*cifar-10-binary\.tar\.gz.*data fetch cifar10"):
            use(tmp_path / name, GREY)


# all formats


def write_samples(folder: Path) -> list[Path]:
    save_npz(folder / "set.npz")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_images(DIGITS))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_images(DIGITS)))
    (folder / "test_batch.bin").write_bytes(TEN)
    return sorted(folder.iterdir())


def test_threads_share_a_file(tmp_path: Path) -> None:
    for path in write_samples(tmp_path):
        expected = [raw.pixels for raw in read_all(path)]
        found: list[list[np.ndarray]] = []
        with open_file(path) as file:
            assert file.num_images == len(expected)
            run = lambda: found.append([file.read(index).pixels for index in range(len(expected))])  # noqa: E731, B023
            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 4 and all(np.array_equal(each, expected) for each in found)


def damage(path: Path) -> None:
    """Damage the last bytes of the images, but not the header."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".npz":
        end = data.index(b"PK\x03\x04", 4)  # of the first member
        data[end - 8 : end] = bytes(8)
    elif path.suffix == ".gz":
        data[-8:] = bytes(8)
    else:
        data = data[:-1]
    path.write_bytes(data)


def test_a_damaged_file_is_loaded_once_and_each_image_raises_a_new_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = {path: open_file(path) for path in write_samples(tmp_path) if path.suffix != ".bin"}
    for path in opened:
        damage(path)
    loads: list[str] = []
    for name in ("_open_npz", "open_inflated"):
        whole = getattr(arrays, name)
        monkeypatch.setattr(arrays, name, lambda *given, name=name, whole=whole: loads.append(name) or whole(*given))
    for path, file in opened.items():
        loads.clear()
        errors = []
        for _ in range(5):
            with pytest.raises(UnreadableImage) as caught:
                file.read(0)
            errors.append(caught.value)
        assert len(loads) == 1, path
        assert len({str(error) for error in errors}) == 1 and len(set(map(id, errors))) == 5


def test_a_missing_image_or_file_is_refused(tmp_path: Path) -> None:
    for path in write_samples(tmp_path):
        for index in (-1, 10):
            with open_file(path) as file, pytest.raises(UnreadableImage, match=f"image {index} of"):
                file.read(index)
        path.unlink()
        with pytest.raises(UnreadableImage, match="No such file"):
            read_all(path)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.floats(0, 1) | st.just(1.0),
)
def test_random_damage_raises_only_unreadable_image(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], share: float
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for path in write_samples(folder):
        data = bytearray(path.read_bytes())
        for place, value in changes:
            # headers are short, so half of the changes are in the first and last 128 bytes
            at = int(place * 2 * len(data)) if place < 0.5 else int((place - 0.75) * 512)
            data[max(-len(data), min(at, len(data) - 1))] = value
        path.write_bytes(data[: max(1, int(share * len(data)))])
        with contextlib.suppress(UnreadableImage):
            read_all(path, COLOUR)


# real files


def test_real_medmnist(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("medmnist") / "pneumoniamnist_balanced.npz"
    contents = inspect(path, GREY)
    assert [contents.splits.count(split) for split in ("train", "val", "test")] == [2428, 270, 468]
    assert set(contents.labels) == {"0", "1"}
    with np.load(path) as stored, ArrayFile(path, GREY) as file:
        for index, (split, place) in {0: ("train", 0), 2428: ("val", 0), 3165: ("test", 467)}.items():
            assert np.array_equal(file.read(index).pixels, stored[f"{split}_images"][place])
            assert contents.labels[index] == str(stored[f"{split}_labels"][place, 0])


def test_real_mnist(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("mnist_idx")
    path = folder / "t10k-images-idx3-ubyte.gz"
    contents = inspect(path, GREY)
    assert len(contents.indices) == 10_000
    assert "".join(contents.labels[:10]) == "7210414959"  # as its authors publish them
    assert contents.companions == (folder / "t10k-labels-idx1-ubyte.gz",)
    stored = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    with ArrayFile(path, GREY) as file:
        for index in (0, 1, 9999):
            pixels = file.read(index).pixels
            assert np.array_equal(pixels, stored[index])
            assert np.median(pixels) == 0 and pixels.max() > 200  # white digits on black
    assert not is_idx_images("train-labels-idx1-ubyte.gz")


def test_real_pickled_cifar_batches_are_refused(shared_data: Callable[[str], Path]) -> None:
    paths = sorted(path for path in shared_data("cifar_format").iterdir() if is_cifar_batch(path))
    assert len(paths) == 6
    for path in paths:
        with pytest.raises(UnreadableImage, match=r"^a pickled CIFAR batch"):
            inspect(path, COLOUR)
