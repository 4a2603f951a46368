"""The door: names and first bytes tell what a file is; what is no image is named, without a word of its content."""

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
from medgen.ingest.images import describe, inspect, kind_of, open_file, read_image
from medgen.ingest.transforms import to_square

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
    ("a.png", PNG, "picture"),
    ("a.JPEG", b"", "picture"),
    ("a.Tiff", SECRET, "picture"),  # a promise; its reader says why it is broken
    ("case_001_slice_0.nii.png", b"", "picture"),
    ("a", PNG, "picture"),
    ("a.dat", PNG, "picture"),
    ("a.webp-day10", encoded("JPEG"), "picture"),
    ("a", encoded("BMP"), "picture"),
    ("a", encoded("TIFF"), "picture"),
    ("a.DCM", b"", "dicom"),
    ("IM-0001-0001.dicom", b"", "dicom"),
    ("1.2.840.113619.2.5", DICOM, "dicom"),  # scanners name files by their numbers
    ("IM000001", DICOM, "dicom"),
    ("IM000001", b"II*\0" + DICOM[4:], "dicom"),  # a preamble that is a TIFF header too
    ("IM000001", b"\x08\0\5\0CS\x0a\0ISO_IR 100", "dicom"),  # no preamble, explicit types
    ("IM000001", b"\x08\0\5\0\x0a\0\0\0ISO_IR 100", "dicom"),  # and without them
    ("a.nii", b"", "volume"),
    ("sub-01_T1w.NII.GZ", b"", "volume"),
    ("orig.mgz", b"", "volume"),
    ("orig.mgh", b"", "volume"),
    ("a.hdr", b"", "volume"),
    ("a.vol", NIFTI, "volume"),
    ("a", NIFTI_2, "volume"),
    ("pneumoniamnist.npz", b"", "npz"),
    ("t10k-images-idx3-ubyte.gz", b"", "idx"),
    ("data_batch_1", b"", "cifar"),
    ("test_batch", b"", "cifar"),
]
OTHERS = [  # name, content, description
    ("a.img", NIFTI, "voxels without their header (.hdr)"),
    ("t10k-labels-idx1-ubyte.gz", b"\x1f\x8b\x08\0", "labels without their pictures (images-idx3-ubyte)"),
    ("notes.txt", b"BMI 22, " + SECRET, "a text file"),
    ("notes.txt", TEXT, "a text file"),
    ("notes.txt", TEXT.decode().encode("latin-1"), "a text file"),
    ("notes.txt", TEXT.decode().encode("utf-16"), "a text file"),
    ("notes.txt", ("x" * (NUM_BYTES - 1) + "ü").encode(), "a text file"),  # its last letter is cut by the bounded look
    ("README", SECRET, "a text file"),
    ("README.md", SECRET, "a text file"),
    ("patients.csv", SECRET, "a table"),
    ("patients.json", b'{"name": "Jane Doe"}', "a JSON file"),
    ("a.ipynb", b'{"cells": []}', "a notebook"),
    ("figure.svg", b"<svg/>", "an SVG drawing: convert it to PNG"),
    ("weights.pth", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the picture itself"),
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
    ("a.gif", encoded("GIF"), "a GIF picture: convert it to PNG"),
    ("a.webp", encoded("WEBP"), "a WebP picture: convert it to PNG"),
    ("a.jp2", encoded("JPEG2000"), "a JPEG 2000 picture: convert it to PNG"),
    ("a.heic", b"\0\0\0\x18ftypheic", "a HEIC picture: convert it to PNG"),
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
def test_names_and_first_bytes_tell_the_kind(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name) == kind


@pytest.mark.parametrize(("name", "content", "description"), OTHERS)
def test_what_is_no_image_is_named(name: str, content: bytes, description: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert kind_of(path) is None
    assert describe(path).startswith(description)
    for refused in (inspect, open_file, read_image):
        with pytest.raises(UnreadableImage) as caught:
            refused(path, Preprocess())  # type: ignore[operator]
        assert str(caught.value) == describe(path)


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    for name in ("pipe", "pipe.png", "pipe.dcm", "data_batch_1", "train"):
        os.mkfifo(tmp_path / name)  # to open it would wait for its writer for ever
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "link.png").symlink_to("pipe")
    for path in tmp_path.iterdir():
        assert kind_of(path) is None, path
        assert describe(path) == "not a regular file", path


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    expected = {"gone": "a link that leads nowhere", "loop": "a link that leads nowhere"}
    expected |= {"absent": "No such file or directory", "a" * 300: "File name too long"}
    for name, reason in expected.items():
        assert kind_of(tmp_path / name) is None
        assert describe(tmp_path / name) == reason
    for name in ("absent.png", "absent.txt"):  # one by its reader, one by the door
        with pytest.raises(UnreadableImage, match=r"^No such file or directory$"):
            read_image(tmp_path / name, Preprocess())


@pytest.mark.parametrize("name", ["two\nlines", "größe 図", "a\udcff", " ", "-rf", "%s{0}"])
def test_any_name_has_a_kind_and_a_description(name: str, tmp_path: Path) -> None:
    for suffix, content in ((".png", PNG), ("", PNG), (".txt", SECRET)):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        assert kind_of(path) == (None if suffix == ".txt" else "picture")
        assert describe(path) in ("a text file", "a PNG, JPEG, BMP or TIFF picture")


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(
    mark=st.sampled_from([b"", *(content[:64] for _, content, _ in OTHERS if SECRET not in content)]),
    rest=st.binary(max_size=NUM_BYTES),
)
def test_a_description_never_repeats_content(mark: bytes, rest: bytes) -> None:
    start = (mark + rest)[:NUM_BYTES]
    assert kind_of_start(start) in (None, "picture", "dicom", "volume")
    words = {describe_start(content[:NUM_BYTES]) for _, content, _ in OTHERS + KINDS}
    found = describe_start(start)
    assert found in words or found in KNOWN_WORDS


KNOWN_WORDS = {describe_start(mark) for mark in (b"BZh", b"\xff\x4f\xff\x51", PNG, DICOM, NIFTI)}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_read_through_the_door(channels: int, tmp_path: Path) -> None:
    (tmp_path / "a.JPG").write_bytes(PNG)  # the content decides how it is read
    preprocess = Preprocess(channels=channels)  # type: ignore[arg-type]
    assert list(inspect(tmp_path / "a.JPG", preprocess).indices) == [0]
    assert (read_image(tmp_path / "a.JPG", preprocess).pixels == GREY).all()


# real files


@pytest.mark.parametrize(
    ("folder", "name", "num_pictures"),
    [
        ("formats", "dicom/pydicom/CT_small.dcm", 1),
        ("formats", "dicom/pydicom/SC_rgb_rle_2frame.dcm", 2),
        ("formats", "nifti/nibabel/standard.nii.gz", 7),
        ("formats", "torchxrayvision/16747_3_1.jpg", 1),
        ("medmnist", "pneumoniamnist_balanced.npz", None),
        ("mnist_idx", "t10k-images-idx3-ubyte.gz", 10_000),
        ("cifar_format", "test_batch", None),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_is_read_through_the_door(
    shared_data: Callable[[str], Path], folder: str, name: str, num_pictures: int | None, channels: int
) -> None:
    path, preprocess = shared_data(folder) / name, Preprocess(channels=channels)  # type: ignore[arg-type]
    indices = inspect(path, preprocess).indices
    assert num_pictures in (None, len(indices))
    middle = read_image(path, preprocess)
    with open_file(path, preprocess) as file:
        assert (file.read(indices[len(indices) // 2]).pixels == middle.pixels).all()
    assert middle.pixels.ndim == 2 or (channels == 3 and middle.pixels.shape[2] == 3)
    assert to_square(middle.pixels, preprocess).shape == (channels, 64, 64)
    with open_file(path, preprocess, mask=True) as file:
        assert file.read(indices[0]).pixels.ndim == 2


def test_every_real_file_has_a_kind_or_a_description(shared_data: Callable[[str], Path]) -> None:
    for name, expected in {
        "quirks": {"picture": 30, "folder settings of macOS": 1, "a torch checkpoint": 1, "a text file": 1},
        "mnist_idx": {"idx": 1, "labels without their pictures (images-idx3-ubyte)": 2, "a text file": 1},
        "cifar_format": {"cifar": 6, "a text file": 1},
        "medmnist": {"npz": 1, "a text file": 1},
    }.items():
        files = [path for path in sorted(shared_data(name).rglob("*")) if path.is_file()]
        assert Counter(kind_of(path) or describe(path) for path in files) == expected
