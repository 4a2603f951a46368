"""Fixtures that all tests share."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import servers
from medgen.machine import reduce_garbage_collection

reduce_garbage_collection()
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores. If each, and each process that a test starts, had a thread for every core too, the threads
    # would wait for each other in busy loops: several times slower. Read when torch is first imported, so set here.
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
# Importing torch and MLflow takes several seconds of processor time. One process imports them, and each command of
# medgen runs in a fork of it: the programs below stand before the real ones in PATH.
UV = """#!/bin/sh
# what `make` calls: the environment is ready, so `uv sync` does nothing and `uv run COMMAND` is COMMAND
[ "$1" = run ] || exit 0
shift
[ "$1" = --no-sync ] && shift
exec "$@"
"""
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m medgen" ] && shift 2 && exec medgen "$@"
exec {python} "$@"
"""
MEDGEN = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [request], [0, 1, 2])
sys.exit(ord(server.recv(1) or b"\\1"))
"""
SERVER = """
import atexit, gc, json, os, socket, sys, threading
import alembic.command, matplotlib.backends.backend_agg, mlflow.store.tracking.sqlalchemy_store, optuna
import torch._dynamo, torchmetrics.functional.image
import medgen.cli, medgen.evaluation.evaluate, medgen.registry.promotion, medgen.serving.generate, medgen.tune
from medgen.source import STAGES, stage_hashes
for module in STAGES.values():
    stage_hashes(module)  # which parses all files once
assert threading.active_count() == 1
gc.freeze()  # a collection in a fork would copy the memory of all objects
listener = socket.socket(fileno=int(sys.argv[1]))
while True:
    connection, _ = listener.accept()
    request, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    child = os.fork()
    if not child:
        break
    for file in files:
        os.close(file)
    connection.send(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))
    connection.close()
listener.close()
connection.close()
for number, file in enumerate(files):
    os.dup2(file, number)
arguments, folder, environment = json.loads(request)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.argv = ["medgen", *arguments]
code = 0
try:
    medgen.cli.main()
except SystemExit as stop:
    code = stop.code or 0
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # Python's own end frees every object of every module, which takes two seconds
"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`pytest -n auto`: one worker a core that this process may use; 8 at most, for each takes more than 1 GB."""
    from medgen.machine import num_cores

    return min(num_cores(), 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: started last, one would keep a single worker busy after all others ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget the store of the previous test: `mlflow.set_tracking_uri` sets this variable for the whole process."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Folder of real images by name, from MEDGEN_TEST_DATA or ../shared/data; skips by name where absent."""

    def find(name: str) -> Path:
        base = Path(os.environ.get("MEDGEN_TEST_DATA", ROOT.parent / "shared" / "data"))
        folder = base / name
        if not folder.exists():
            pytest.skip(f"real data {name!r} is not here (set MEDGEN_TEST_DATA)")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Path:
    """artifacts/dataset of 48 drawn chest films at 32 px, three classes; made once, copy it to change it."""
    from medgen.config import Data, Preprocess, Project
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

    root = tmp_path_factory.mktemp("tiny")
    draw(root / "data", num_images=48, size=64, seed=0)
    preprocess.run(Project(root), data=Data(), preprocess=Preprocess(image_size=32, clahe_tiles=2))
    return root / "artifacts" / "dataset"


@pytest.fixture(scope="session")
def patients_store(tmp_path_factory) -> Path:
    """artifacts/dataset as `tiny_store`, with more test images: classifier tests need ten patients."""
    from medgen.config import Data, Preprocess, Project
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

    root = tmp_path_factory.mktemp("patients")
    draw(root / "data", num_images=72, size=64, seed=0)
    sizes = Preprocess(image_size=32, clahe_tiles=2, val_fraction=0.1, test_fraction=0.4)
    preprocess.run(Project(root), data=Data(), preprocess=sizes)
    return root / "artifacts" / "dataset"


@pytest.fixture(scope="session")
def draw_volumes() -> Callable[..., Path]:
    """Function that draws NIfTI volumes of balls and boxes at random places in noise, with masks if it is asked to."""
    import nibabel
    import numpy as np

    def draw(folder: Path, num: int, with_masks: bool = False) -> Path:
        random = np.random.default_rng(0)
        for number in range(num):
            shape = (20, 24, 22)
            places = np.indices(shape) - random.uniform(9, 12, 3)[:, None, None, None]
            inside = (places**2).sum(0) < 36 if number % 2 else np.abs(places).max(0) < 5
            voxels = (1000 * inside + random.normal(100, 30, shape)).astype(np.int16)
            affine = np.diag([1.2, 1.0, 1.1, 1.0])
            kind, name = ("ball", "box")[(number + 1) % 2], f"patient{number:02}.nii.gz"
            path = folder / ("images" if with_masks else kind) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
            if with_masks:
                (folder / "masks").mkdir(exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(inside.astype(np.uint8), affine), folder / "masks" / name)
        return folder

    return draw


@pytest.fixture(scope="session")
def write_series() -> Callable[..., list[Path]]:
    """Function that writes voxels (A, B, C) with a NIfTI affine as a DICOM series, with pydicom alone.

    File names and instance numbers do not follow the slices. `change` gets each slice's number and dataset before it is
    written; None instead of a dataset leaves the file out.
    """
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

    def write(
        folder: Path,
        voxels: Any,
        affine: Any,
        series: str = "1.2.826.0.1.7",
        patient: str = "QZ-7391155",
        intercept: int = -1024,
        change: Callable[[int, Any], Any] = lambda number, dataset: dataset,
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's axes point to the left and to the back
        sizes = np.linalg.norm(lps[:3, :3], axis=0)
        order = np.random.default_rng(0).permutation(voxels.shape[2])
        paths = []
        for number, place in enumerate(order.tolist()):
            meta = FileMetaDataset()
            meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
            meta.MediaStorageSOPInstanceUID = UID(f"{series}.{place + 1}")
            dataset = Dataset()
            dataset.file_meta = meta
            dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
            dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = patient, "Quokka^Zebedee", "19010203"
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1", series
            dataset.InstanceNumber = voxels.shape[2] - number
            dataset.ImagePositionPatient = [float(f"{value:.6f}") for value in (lps @ [0, 0, place, 1])[:3]]
            directions = (lps[:3, :2] / sizes[:2]).T.ravel()
            dataset.ImageOrientationPatient = [float(f"{value:.8f}") for value in directions]
            dataset.PixelSpacing = [float(f"{value:.8f}") for value in (sizes[1], sizes[0])]  # between rows, columns
            dataset.SliceThickness = float(f"{sizes[2]:.8f}")
            dataset.Rows, dataset.Columns = voxels.shape[1], voxels.shape[0]
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
            dataset.RescaleSlope, dataset.RescaleIntercept = 1, intercept
            dataset.WindowCenter, dataset.WindowWidth = 100 + number, 50  # of this slice, which a volume does not use
            dataset.PixelData = (voxels[:, :, place].T - intercept).astype("<i2").tobytes()
            dataset["PixelData"].VR = "OW"
            if (changed := change(place, dataset)) is not None:
                paths.append(folder / f"IM{number:04}")
                changed.save_as(paths[-1], enforce_file_format=True)
        return paths

    return write


@pytest.fixture
def tiny_project(tiny_store: Path, tmp_path: Path):
    """A fresh project folder with the tiny store in it."""
    from medgen.config import Project

    shutil.copytree(tiny_store, tmp_path / "artifacts" / "dataset")
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained() -> Callable[..., Any]:
    """Function that gives a project a model of random weights, a prior over its latents, and an extractor."""
    import torch

    from medgen.config import Features, Model, Prior, Project
    from medgen.data.images import to_floats
    from medgen.data.store import open_store
    from medgen.models import GenerativeModel, build_model, bundle
    from medgen.priors import ANALYTIC, save_prior
    from medgen.priors.refiner import save_disabled
    from medgen.training import extractor

    default = Model(base_channels=8, latent_size=8, latent_channels=2, attention_resolutions=())

    def train(
        project: Project,
        sizes: Model = default,
        prior: str = "gmm",
        conditional: bool = True,
        unrecognised: Sequence[str] = (),
    ) -> Project:
        store = open_store(project.dataset)
        torch.manual_seed(0)
        model = build_model(sizes, store.image_shape, len(store.classes)).eval()
        assert isinstance(model, GenerativeModel)
        data = (store.image_shape, store.classes, store.fingerprint)
        height, width = store.image_shape[1:]
        size = height if height == width else (height, width)
        preprocess = store.preprocess.model_copy(update={"image_size": size})
        info = bundle.BundleInfo(sizes, preprocess, *data, "run0", torch.__version__)
        bundle.save(project.model, model, info)
        split = store.split("train")
        labels = torch.from_numpy(split.labels.copy())
        with torch.no_grad():
            means = model.encode(to_floats(torch.from_numpy(split.images[:])), labels).mean
        params, digest = Prior(conditional=conditional, components=(1,)), bundle.digest(project.model)
        save_prior(project.prior, ANALYTIC[prior].fit(means, labels, len(store.classes), params), digest)
        save_disabled(project.refiner, digest)
        extractor.run(project, features=Features(width=8, epochs=1))
        description = project.features / "extractor.json"  # after one epoch it recognises no class
        stated = {"unrecognised": {"classes": list(unrecognised)}}
        description.write_text(json.dumps(json.loads(description.read_text()) | stated))
        return project

    return train


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT


@pytest.fixture(scope="session")
def small_params() -> dict:
    """A params file for seconds, not minutes."""
    return {
        "data": {"path": "data", "name": "small"},
        "preprocess": {"image_size": 32, "clahe_tiles": 2},
        "features": {"width": 8, "epochs": 1},
        "model": {"base_channels": 8, "latent_size": 8, "latent_channels": 4},
        "loss": {"weights": {"l1": 1.0, "ssim": 0.5}},
        "prior": {"name": "gmm", "components": [1]},
        "refiner": {
            "enabled": True,
            "channels": 8,
            "blocks": 1,
            "epochs": 1,
            "sampling_steps": 2,
            "sampling_noise": 0.0,
        },
        "train": {"batch_size": 8, "sample_every": 1, "phases": {"one": {"epochs": 2, "learning_rate": 1e-3}}},
        "utility": {},
        "evaluate": {"num_generated": 24, "grid_images": 6},
    }


@pytest.fixture(scope="session")
def forked_medgen() -> Callable[[Path, Path], AbstractContextManager[dict[str, str]]]:
    """Context of the environment variables with which `uv`, `python -m medgen` and `medgen` are the programs above.

    Its arguments are the folder with the package and a folder for the programs.
    """

    @contextmanager
    def serve(package: Path, folder: Path) -> Iterator[dict[str, str]]:
        tools = folder / "tools"
        tools.mkdir()
        address, python = str(folder / "server"), sys.executable
        programs = {
            "uv": UV,
            "python": PYTHON.format(python=shlex.quote(python)),
            "medgen": MEDGEN.format(python=python, address=address),
        }
        for name, text in programs.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        path = os.pathsep.join((str(tools), str(Path(python).parent), os.environ["PATH"]))
        variables = os.environ | {"PATH": path, "PYTHONPATH": str(package), "MLFLOW_DISABLE_TELEMETRY": "true"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            number = listener.fileno()
            server = subprocess.Popen([python, "-c", SERVER, str(number)], cwd=folder, env=variables, pass_fds=[number])
        try:
            yield variables
        finally:
            server.kill()
            server.wait()

    return serve


@pytest.fixture(scope="session")
def postgres_programs() -> Path:
    """The folder of initdb, pg_dump and the rest; skips where PostgreSQL is not installed."""
    found = servers.postgres_programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found


@pytest.fixture(scope="session")
def postgres(postgres_programs: Path) -> Iterator[Callable[[], str]]:
    """Makes an empty database at each call and gives its postgresql:// URL; skips where PostgreSQL is not installed.

    The databases are on a server of this session's own (with xdist: of this worker's).
    """
    server = servers.PostgresServer(postgres_programs)
    yield server.new_database
    server.remove()


@pytest.fixture(scope="session")
def compose() -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """compose.yaml as Docker Compose reads it where .env holds these variables."""
    return servers.read_compose


@pytest.fixture(scope="session")
def mlflow_server(
    compose: Callable[[Mapping[str, str]], dict[str, Any]],
) -> Iterator[Callable[..., servers.MlflowServer]]:
    """Starts MLflow's server on a database and an artifacts folder: `mlflow_server(backend_uri, artifacts)`.

    The command and environment are those of compose.yaml, less host, port and paths; `port=None` takes a free one, and
    `variables` are what .env would hold. The result has `uri`, `kill`, `restart` and `stop`; all end with the session.
    """
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="medgen-mlflow-", dir="/tmp"))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)

        def start(
            backend_uri: str, artifacts: Path, port: int | None = None, variables: Mapping[str, str] | None = None
        ) -> servers.MlflowServer:
            services = compose({"POSTGRES_PASSWORD": "unused"} | dict(variables or {}))
            server = servers.MlflowServer(services, backend_uri, artifacts, port, Path(tempfile.mkdtemp(dir=folder)))
            cleanup.callback(server.stop)
            return server

        yield start
