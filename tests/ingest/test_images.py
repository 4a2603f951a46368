"""File kinds are detected by name and first bytes; other files are described without their content."""

import io
import os
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medgen.config import Preprocess
from medgen.ingest.formats.raw import UnreadableImage
from medgen.ingest.formats.signatures import NUM_BYTES, describe_start, kind_of_start
from medgen.ingest.images import describe_file, file_kind, inspect, open_file, read_image
from medgen.ingest.transforms import preprocess_image

GREY = np.arange(30 * 40, dtype=np.uint16).reshape(40, 30).astype(np.uint8)
SECRET = b"Jane Doe, born 1970-01-01"


def encoded(format: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, format)
    return stream.getvalue()


def zipped(member: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(member, SECRET)
    return stream.getvalue()


PNG = encoded("PNG")
DICOM = bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0" + SECRET
NIFTI = struct.pack("<i", 348) + bytes(340) + b"n+1\0" + bytes(200)
NIFTI_2 = struct.pack(">i", 540) + b"n+2\0\r\n\x1a\n" + bytes(600)
TAR = b"resnet.pth".ljust(257, b"\0") + b"ustar\0" + bytes(300)
TEXT = "Müller, Jörg: Röntgen".encode()

KINDS = [  # name, content, kind
    ("a.png", PNG, "raster"),
    ("a.JPEG", b"", "raster"),
    ("a.Tiff", SECRET, "raster"),  # the suffix decides; the reader reports the wrong content
    ("case_001_slice_0.nii.png", b"", "raster"),
    ("a", PNG, "raster"),
    ("a.dat", PNG, "raster"),
    ("a.webp-day10", encoded("JPEG"), "raster"),
    ("a", encoded("BMP"), "raster"),
    ("a", encoded("TIFF"), "raster"),
    ("a.DCM", b"", "dicom"),
    ("IM-0001-0001.dicom", b"", "dicom"),
    ("1.2.840.113619.2.5", DICOM, "dicom"),  # scanners use UIDs as file names
    ("IM000001", DICOM, "dicom"),
    ("IM000001", b"II*\0" + DICOM[4:], "dicom"),  # the preamble is a TIFF header as well
    ("IM000001", b"\x08\0\5\0CS\x0a\0ISO_IR 100", "dicom"),  # no preamble, explicit value representations
    ("IM000001", b"\x08\0\5\0\x0a\0\0\0ISO_IR 100", "dicom"),  # no preamble, implicit value representations
    ("a.nii", b"", "volume"),
    ("sub-01_T1w.NII.GZ", b"", "volume"),
    ("orig.mgz", b"", "volume"),
    ("orig.mgh", b"", "volume"),
    ("a.hdr", b"", "volume"),
    ("a.vol", NIFTI, "volume"),
    ("a", NIFTI_2, "volume"),
    ("pneumoniamnist.npz", b"", "npz"),
    ("t10k-images-idx3-ubyte.gz", b"", "idx"),
    ("data_batch_1.bin", bytes(3073), "cifar"),
    ("test.bin", bytes(2 * 3074), "cifar"),
    ("test_batch", b"\x80\2}.", "cifar"),  # a pickle, which the reader refuses
]
OTHERS = [  # name, content, description
    ("a.img", NIFTI, "voxels without their header (.hdr)"),
    ("t10k-labels-idx1-ubyte.gz", b"\x1f\x8b\x08\0", "labels without their images (images-idx3-ubyte)"),
    ("notes.txt", b"BMI 22, " + SECRET, "a text file"),
    ("notes.txt", TEXT, "a text file"),
    ("notes.txt", TEXT.decode().encode("latin-1"), "a text file"),
    ("notes.txt", TEXT.decode().encode("utf-16"), "a text file"),
    ("notes.txt", ("x" * (NUM_BYTES - 1) + "ü").encode(), "a text file"),  # the last character is cut in half
    ("README", SECRET, "a text file"),
    ("README.md", SECRET, "a text file"),
    ("patients.csv", SECRET, "a table"),
    ("patients.json", b'{"name": "Jane Doe"}', "a JSON file"),
    ("a.ipynb", b'{"cells": []}', "a notebook"),
    ("figure.svg", b"<svg/>", "an SVG drawing: convert it to PNG"),
    ("weights.pth", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer instead of the file"),
    ("weights.pth", b"<!DOCTYPE html><title>Sign in</title>", "a web page (a failed download?)"),
    ("weights.pth", zipped("archive/data.pkl"), "a torch checkpoint"),
    ("weights.pth", TAR, "a torch checkpoint"),
    ("model.h5", b"\x89HDF\r\n\x1a\n\0", "HDF5, such as weights of Keras"),
    ("model.bin", b"\x89HDF\r\n\x1a\n\0", "HDF5, such as weights of Keras or MINC 2 (convert MINC with mnc2nii)"),
    ("minc2.mnc", b"\x89HDF\r\n\x1a\n\0", "MINC: convert it with mnc2nii"),
    ("minc1", b"CDF\1\0\0\0\0", "NetCDF, such as MINC: convert MINC with mnc2nii"),
    ("data.pkl", pickle.dumps({"name": "Jane Doe"}), "a Python pickle, which is never opened"),
    ("a.npy", b"\x93NUMPY\1\0", "a NumPy array: save it as an .npz of the MedMNIST layout"),
    ("a.mat", b"MATLAB 5.0 MAT-file, Platform: GLNXA64\0", "a MATLAB file"),
    ("a.nrrd", b"NRRD0004\ntype: short", "an NRRD volume: convert it to NIfTI"),
    ("a.mha", b"ObjectType = Image\nNDims = 3", "a MetaImage volume: convert it to NIfTI"),
    ("a.gif", encoded("GIF"), "a GIF image: convert it to PNG"),
    ("a.webp", encoded("WEBP"), "a WebP image: convert it to PNG"),
    ("a.jp2", encoded("JPEG2000"), "a JPEG 2000 image: convert it to PNG"),
    ("a.heic", b"\0\0\0\x18ftypheic", "a HEIC image: convert it to PNG"),
    ("a.mp4", b"\0\0\0\x18ftypisom", "a video"),
    ("zipMR.gz", b"\x1f\x8b\x08\0", "a gzip archive: unpack it"),
    ("chest.zip", zipped("a.png"), "a zip archive: unpack it"),
    ("chest.tar", TAR, "a tar archive: unpack it"),
    ("chest.7z", b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    ("paper.pdf", b"%PDF-1.7\n%" + SECRET, "a PDF document"),
    ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "folder settings of Windows"),
    (".DS_Store", b"\0\0\0\1Bud1" + SECRET, "folder settings of macOS"),
    ("._a", b"\0\5\x16\7\0\2\0\0", "attributes of a macOS file"),
    ("empty", b"", "empty file"),
    ("empty.csv", b"", "empty file"),
    ("a.bin", bytes(range(256)), "no image format that is read here"),
]


@pytest.mark.parametrize(("name", "content", "kind"), KINDS)
def test_names_and_first_bytes_determine_the_kind(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert file_kind(tmp_path / name) == kind


@pytest.mark.parametrize(("name", "content", "description"), OTHERS)
def test_other_files_are_described(name: str, content: bytes, description: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert file_kind(path) is None
    assert describe_file(path).startswith(description)
    for refused in (inspect, open_file, read_image):
        with pytest.raises(UnreadableImage) as caught:
            refused(path, Preprocess())  # type: ignore[operator]
        assert str(caught.value) == describe_file(path)


def test_special_files_are_never_opened(tmp_path: Path) -> None:
    for name in ("pipe", "pipe.png", "pipe.dcm", "data_batch_1", "train"):
        os.mkfifo(tmp_path / name)  # opening it would block forever
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "link.png").symlink_to("pipe")
    for path in tmp_path.iterdir():
        assert file_kind(path) is None, path
        assert describe_file(path) == "not a regular file", path


def test_the_reason_for_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    expected = {"gone": "a link that leads nowhere", "loop": "a link that leads nowhere"}
    expected |= {"absent": "No such file or directory", "a" * 300: "File name too long"}
    for name, reason in expected.items():
        assert file_kind(tmp_path / name) is None
        assert describe_file(tmp_path / name) == reason
    for name in ("absent.png", "absent.txt"):  # the first by its reader, the second by `images`
        with pytest.raises(UnreadableImage, match=r"^No such file or directory$"):
            read_image(tmp_path / name, Preprocess())


@pytest.mark.parametrize("name", ["two\nlines", "größe 図", "a\udcff", " ", "-rf", "%s{0}"])
def test_any_name_has_a_kind_and_a_description(name: str, tmp_path: Path) -> None:
    for suffix, content in ((".png", PNG), ("", PNG), (".txt", SECRET)):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        assert file_kind(path) == (None if suffix == ".txt" else "raster")
        assert describe_file(path) in ("a text file", "a PNG, JPEG, BMP or TIFF image")


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(
    prefix=st.sampled_from([b"", *(content[:64] for _, content, _ in OTHERS if SECRET not in content)]),
    rest=st.binary(max_size=NUM_BYTES),
)
def test_a_description_never_contains_file_content(prefix: bytes, rest: bytes) -> None:
    start = (prefix + rest)[:NUM_BYTES]
    assert kind_of_start(start) in (None, "raster", "dicom", "volume")
    starts = [*MORE_STARTS, *(content[:NUM_BYTES] for _, content, _ in OTHERS + KINDS)]
    assert describe_start(start) in set(map(describe_start, starts))


MORE_STARTS = (
    b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"Rar!\x1a\x07", b"PK\5\6", b"8BPS", b"\0\0\0\0ftypavif",
    b"\0\0\0\0JXL \r\n\x87\n", b"\xff\x4f\xff\x51", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"SQLite format 3\0",
    b"\x7fELF", PNG, DICOM, NIFTI,
)  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_the_content_determines_the_reader_of_an_image(channels: int, tmp_path: Path) -> None:
    (tmp_path / "a.JPG").write_bytes(PNG)  # PNG content with a JPEG suffix
    preprocess = Preprocess(channels=channels)  # type: ignore[arg-type]
    assert list(inspect(tmp_path / "a.JPG", preprocess).indices) == [0]
    assert (read_image(tmp_path / "a.JPG", preprocess).pixels == GREY).all()


# real files


@pytest.mark.parametrize(
    ("folder", "name", "num_images"),
    [
        ("formats", "dicom/pydicom/CT_small.dcm", 1),
        ("formats", "dicom/pydicom/SC_rgb_rle_2frame.dcm", 2),
        ("formats", "nifti/nibabel/standard.nii.gz", 7),
        ("formats", "torchxrayvision/16747_3_1.jpg", 1),
        ("medmnist", "pneumoniamnist_balanced.npz", None),
        ("mnist_idx", "t10k-images-idx3-ubyte.gz", 10_000),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_is_read(
    shared_data: Callable[[str], Path], folder: str, name: str, num_images: int | None, channels: int
) -> None:
    path, preprocess = shared_data(folder) / name, Preprocess(channels=channels)  # type: ignore[arg-type]
    indices = inspect(path, preprocess).indices
    assert num_images in (None, len(indices))
    middle = read_image(path, preprocess)
    with open_file(path, preprocess) as file:
        assert (file.read(indices[len(indices) // 2]).pixels == middle.pixels).all()
    assert middle.pixels.ndim == 2 or (channels == 3 and middle.pixels.shape[2] == 3)
    assert preprocess_image(middle.pixels, preprocess).shape == (channels, 64, 64)
    with open_file(path, preprocess, mask=True) as file:
        assert file.read(indices[0]).pixels.ndim == 2


def test_every_real_file_has_a_kind_or_a_description(shared_data: Callable[[str], Path]) -> None:
    for name, expected in {
        "quirks": {"raster": 30, "folder settings of macOS": 1, "a torch checkpoint": 1, "a text file": 1},
        "mnist_idx": {"idx": 1, "labels without their images (images-idx3-ubyte)": 2, "a text file": 1},
        "cifar_format": {"cifar": 6, "a text file": 1},
        "medmnist": {"npz": 1, "a text file": 1},
    }.items():
        files = [path for path in sorted(shared_data(name).rglob("*")) if path.is_file()]
        assert Counter(file_kind(path) or describe_file(path) for path in files) == expected
