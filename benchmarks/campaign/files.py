"""Mutated files of every format that medgen reads: never a traceback, a hang, a program that runs or a file outside.

A round takes one kind of file and reads many mutations of it in one fork, which has a limit of memory, and a limit of
time for each file. Errors other than those that a reader documents are violations, and so is the end of the fork.
"""

import gzip
import hashlib
import io
import json
import random
import re
import resource
import signal
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.campaign.lab import Lab
from benchmarks.campaign.mutations import (
    CANARY,
    hostile_archive,
    hostile_array,
    hostile_checkpoint,
    hostile_pickle,
    mutate,
)
from benchmarks.campaign.process import Violation, start_function

ROUND_SECONDS = 10.0
FILE_SECONDS = 20  # for one file; longer is a hang
MEMORY = 3 << 30  # address space beyond that of the imports
SHA256 = re.compile(rb'("sha256": ")[0-9a-f]{64}')


@dataclass(frozen=True)
class Kind:
    """A kind of file: valid ones by name, and the function that reads one of them in the current folder."""

    files: Callable[[Lab], Mapping[str, bytes]]
    read: Callable[[Path], object]
    hostile: Callable[[], list[bytes]] = list
    finish: Callable[[Path], None] = lambda path: None  # repairs the checksums that would hide what is behind them


def read_mutated(lab: Lab, draws: random.Random) -> None:
    """Mutations of one kind of file, for some seconds."""
    name = draws.choice(sorted(KINDS))
    kind = KINDS[name]
    folder = lab.project
    lab.restore("done")
    log, seed = lab.log(name), draws.random()
    files = kind.files(lab)
    start_function(lambda: read_many(kind, files, random.Random(seed)), log, folder).wait(
        ROUND_SECONDS + 3 * FILE_SECONDS
    )
    output = log.read_text(errors="replace")
    found = re.findall(r"^CASE (\d+) (\S+)", output, re.M)
    lab.counts["files"] += len(found)
    if (folder / CANARY).exists() or (lab.work / CANARY).exists():
        raise Violation("code run", f"{name}: {found[-1:]}, kept in {folder}")
    if "\nFINISHED" not in output:
        text = re.sub(r"^CASE .*\n", "", output, flags=re.M)
        raise Violation("crashed", f"{name}: {found[-1:]}, kept in {folder}\n{text[-6000:]}")


def read_many(kind: Kind, files: Mapping[str, bytes], draws: random.Random) -> None:
    """Read mutations of the files until the time is over; the log has a line for each, and "FINISHED" at the end."""
    from medgen.errors import UserError
    from medgen.ingest.formats.raw import UnreadableImage

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even in native code
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    begin, number = time.monotonic(), 0
    hostile = kind.hostile()
    while time.monotonic() - begin < ROUND_SECONDS:
        name = draws.choice(sorted(files))
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = draws.choice(hostile) if hostile and draws.random() < 0.05 else mutate(files[name], draws)
        path.write_bytes(content)
        if draws.random() < 0.7:
            kind.finish(path)
        print(f"CASE {number} {name}", flush=True)
        signal.alarm(FILE_SECONDS)
        try:
            kind.read(path)
        except (UserError, UnreadableImage) as error:
            if len(str(error)) > 20_000:
                raise AssertionError(f"a message of {len(str(error))} characters") from error
        signal.alarm(0)
        path.write_bytes(files[name])
        kind.finish(path)
        number += 1
    print("FINISHED", flush=True)


# Readers, as the commands call them


def read_images(path: Path) -> None:
    """Metadata and all images of a file, at most 20."""
    from medgen.config import Preprocess
    from medgen.ingest import images

    settings = Preprocess(image_size=32)
    images.file_kind(path), images.describe_file(path)
    contents = images.inspect(path, settings)
    with images.open_file(path, settings) as file:
        for index in list(contents.indices)[:20]:
            file.read(index)


def import_archive(path: Path) -> None:
    """Unpack as `medgen data import` does."""
    from medgen.datasets.archives import is_archive, unpack

    if is_archive(path):
        unpack(path, Path("unpacked"))


def load_params(path: Path) -> None:
    """Parameters as every command reads them."""
    from medgen.config import load

    load(path)


def scan_folder(path: Path) -> None:
    """The list of images of the folder that a manifest is in."""
    from medgen.config import Data, Preprocess
    from medgen.ingest.dataset_scan import scan

    scan(path.parent, Data(), Preprocess(image_size=32))


def open_dataset(path: Path) -> None:
    """The preprocessed dataset, and one image of each split."""
    from medgen.data.store import open_store

    Path("artifacts/dataset.checked.json").unlink(missing_ok=True)
    store = open_store(Path("artifacts/dataset"))
    for name in ("train", "val", "test"):
        split = store.split(name)
        np.asarray(split.images[:1]), split.paths, split.patients, list(split.rows())


def load_model(path: Path) -> None:
    """The model with its prior and refiner, and a sample."""
    from medgen.priors.generator import load_generator

    artifacts = Path("artifacts")
    load_generator(artifacts / "model", artifacts / "prior", artifacts / "refiner")


def load_features(path: Path) -> None:
    """The domain extractor."""
    from medgen.metrics.features import load_extractor

    load_extractor(Path("artifacts/features"))


def load_values(path: Path) -> None:
    """The values of an evaluation."""
    from medgen.evaluation.data import load_evaluation

    load_evaluation(Path("artifacts/evaluation"))


def load_checkpoint(path: Path) -> None:
    """The checkpoint of a run."""
    from medgen.training import checkpoint

    checkpoint.load(path.parent)


def read_record(path: Path) -> None:
    """A run's record, and all runs side by side."""
    from medgen.config import Project
    from medgen.tracking import read_run
    from medgen.tracking.compare import compare

    read_run(path.parent)
    compare(Project(Path.cwd()), as_json=True)


# Valid files


def rasters(_: Lab | None = None) -> dict[str, bytes]:
    """Small images of Pillow's and OpenCV's formats."""
    from PIL import Image

    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48), np.uint8))
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65535, (40, 48), np.uint16))
    colour = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "a.png": (grey, {}),
        "deep.png": (deep, {}),
        "palette.png": (colour.convert("P"), {}),
        "a.jpg": (grey, {"exif": exif}),
        "progressive.jpeg": (colour, {"progressive": True}),
        "a.bmp": (colour, {}),
        "a.tif": (deep, {}),
        "packed.tiff": (grey, {"compression": "tiff_lzw"}),
        "a.gif": (grey, {}),
        "a.webp": (colour, {}),
    }
    found = {}
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(
            buffer,
            {"jpg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2], name.rpartition(".")[2].upper()),
            **options,
        )
        found[name] = buffer.getvalue()
    return found


def dicoms(_: Lab) -> dict[str, bytes]:
    """A radiograph, and a CT of four slices."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    found = {}
    for name, frames in (("a.dcm", 1), ("ct.dcm", 4)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
            CTImageStorage,
            generate_uid(entropy_srcs=[name]),
        )
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(name, {}, file_meta=meta, preamble=b"\0" * 128)
        data.PatientID, data.Modality, data.SOPClassUID = "P1", "CT", CTImageStorage
        data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        data.Rows, data.Columns, data.SamplesPerPixel = 40, 48, 1
        data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
        data.RescaleSlope, data.RescaleIntercept, data.WindowCenter, data.WindowWidth = "1", "-1024", "40", "400"
        if frames > 1:
            data.NumberOfFrames = frames
        data.PixelData = np.random.default_rng(0).integers(0, 2000, (frames, 40, 48), np.int16).tobytes()
        buffer = io.BytesIO()
        data.save_as(buffer, enforce_file_format=True)
        found[name] = buffer.getvalue()
    return found


def volumes(_: Lab) -> dict[str, bytes]:
    """NIfTI, packed and plain, and FreeSurfer's format."""
    import nibabel

    voxels = np.random.default_rng(0).integers(0, 900, (16, 18, 6), np.int16)
    plain = nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes()
    surfer = nibabel.MGHImage(voxels.astype(np.int32), np.eye(4)).to_bytes()
    return {"a.nii": plain, "a.nii.gz": gzip.compress(plain, mtime=0), "a.mgh": surfer}


def arrays(_: Lab) -> dict[str, bytes]:
    """An .npz as MedMNIST has it, and MNIST's format."""
    draws = np.random.default_rng(0)
    buffer = io.BytesIO()
    splits = {}
    for split in ("train", "val", "test"):
        splits[f"{split}_images"] = draws.integers(0, 255, (5, 28, 28), np.uint8)
        splits[f"{split}_labels"] = draws.integers(0, 2, (5, 1), np.uint8)
    np.savez(buffer, **splits)
    images = struct.pack(">IIII", 0x803, 5, 28, 28) + draws.integers(0, 255, 5 * 784, np.uint8).tobytes()
    return {
        "set.npz": buffer.getvalue(),
        "train-images-idx3-ubyte": images,
        "train-labels-idx1-ubyte": struct.pack(">II", 0x801, 5) + bytes(5),
        "t10k-images-idx3-ubyte.gz": gzip.compress(images, mtime=0),
    }


def archives(lab: Lab) -> dict[str, bytes]:
    """The project's images as zip, tar and tar.gz."""
    paths = sorted(path for path in lab.snapshot("preprocess").glob("data/**/*") if path.is_file())[:8]
    packed, plain = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for path in paths:
            target.write(path, f"a/{path.name}")
    with tarfile.open(fileobj=plain, mode="w") as members:
        for path in paths:
            members.add(path, f"a/{path.name}")
    return {"a.zip": packed.getvalue(), "a.tar": plain.getvalue(), "a.tar.gz": gzip.compress(plain.getvalue(), mtime=0)}


def manifests(lab: Lab) -> dict[str, bytes]:
    """A manifest of the project's images."""
    folder = lab.snapshot("preprocess") / "data"
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg")
    )
    lines = [f"{name},{'AB'[number % 2]},p{number // 2},train" for number, name in enumerate(names)]
    return {"data/manifest.csv": "\n".join(["path,label,patient,split", *lines]).encode()}


def parameters(_: Lab) -> dict[str, bytes]:
    """params.yaml of the sample project, and the campaign's."""
    root = Path(__file__).resolve().parents[2]
    recipe = min((root / "recipes").glob("*.yaml"))
    return {"params.yaml": (root / "params.yaml").read_bytes(), "recipe.yaml": recipe.read_bytes()}


def of_project(*patterns: str) -> Callable[[Lab], dict[str, bytes]]:
    """Files of the finished project by patterns."""

    def find(lab: Lab) -> dict[str, bytes]:
        folder = lab.snapshot("done")
        found = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in folder.glob(pattern)}
        return {name: path.read_bytes() for name, path in found.items() if path.is_file()}

    return find


def sign_checkpoint(path: Path) -> None:
    """Put the right hash at the end of a checkpoint."""
    content = path.read_bytes()[:-32]
    path.write_bytes(content + hashlib.sha256(content).digest())


def sign_tensors(path: Path) -> None:
    """Write the hash of changed tensors into their description."""
    description = path.with_suffix(".json")
    if path.suffix == ".safetensors" and description.exists():
        digest = hashlib.sha256(path.read_bytes()).hexdigest().encode()
        description.write_bytes(SHA256.sub(rb"\g<1>" + digest, description.read_bytes()))


def sign_store(path: Path) -> None:
    """Write the hash and size of a changed file into dataset.json, and the fingerprint of that."""
    from medgen.config import fingerprint

    folder = Path("artifacts/dataset")
    description, name = folder / "dataset.json", path.relative_to(folder).as_posix()
    if path != description and name in (content := json.loads(description.read_text()))["files"]:
        content["files"][name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        parts = [content[key] for key in ("schema", "classes", "image_shape", "files")]
        description.write_text(json.dumps(content | {"fingerprint": fingerprint(*parts)}))


ANY_PICKLE: Callable[[], list[bytes]] = lambda: [hostile_pickle(), hostile_checkpoint(), hostile_array()]  # noqa: E731
KINDS = {
    "images": Kind(rasters, read_images, ANY_PICKLE),
    "dicom": Kind(dicoms, read_images, ANY_PICKLE),
    "nifti": Kind(volumes, read_images, ANY_PICKLE),
    "arrays": Kind(arrays, read_images, ANY_PICKLE),
    "archives": Kind(archives, import_archive, lambda: [hostile_archive()]),
    "manifest": Kind(manifests, scan_folder),
    "params": Kind(parameters, load_params),
    "store": Kind(of_project("artifacts/dataset/**/*"), open_dataset, ANY_PICKLE, sign_store),
    "model": Kind(
        of_project("artifacts/model/*", "artifacts/prior/*", "artifacts/refiner/*"),
        load_model,
        ANY_PICKLE,
        sign_tensors,
    ),
    "extractor": Kind(of_project("artifacts/features/*"), load_features, ANY_PICKLE, sign_tensors),
    "evaluation": Kind(of_project("artifacts/evaluation/*"), load_values, ANY_PICKLE, sign_tensors),
    "checkpoint": Kind(of_project("runs/*/checkpoint.pt"), load_checkpoint, ANY_PICKLE, sign_checkpoint),
    "history": Kind(of_project("runs/*/history.jsonl"), read_record),
}
