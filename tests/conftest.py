"""Fixtures every room shares."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores. If each, and each process that a test starts, had a thread for every core too, the threads
    # would wait for each other in busy loops: several times slower. Read when torch is first imported, so set here.
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`pytest -n auto`: one worker a core that this process may use; 8 at most, for each takes more than 1 GB."""
    from medgen.machine import num_cores

    return min(num_cores(), 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one of them would keep a single worker busy after all others ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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
    from medgen import preprocess
    from medgen.config import Data, Preprocess, Project
    from medgen.data.phantom import draw

    root = tmp_path_factory.mktemp("tiny")
    draw(root / "data", num_images=48, size=64, seed=0)
    preprocess.run(Project(root), data=Data(), preprocess=Preprocess(image_size=32, clahe_tiles=2))
    return root / "artifacts" / "dataset"


@pytest.fixture
def tiny_project(tiny_store: Path, tmp_path: Path):
    """A fresh project folder with the tiny store in it."""
    from medgen.config import Project

    shutil.copytree(tiny_store, tmp_path / "artifacts" / "dataset")
    return Project(tmp_path)


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
        "train": {"batch_size": 8, "sample_every": 1, "phases": [{"name": "one", "epochs": 2, "learning_rate": 1e-3}]},
        "evaluate": {"num_generated": 24, "grid_images": 6},
    }
