"""A project in which a trial takes a second."""

import copy
import shutil

import pytest
from ruamel.yaml import YAML

from medgen.config import Features, Project, load
from medgen.training import extractor

SPACE = {
    "train.phases.0.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "train.phases.0.beta.end": {"low": 1e-3, "high": 1.0, "log": True},
}


@pytest.fixture(scope="session")
def tiny_features(tiny_store, tmp_path_factory):
    """artifacts/features of the tiny store."""
    root = tmp_path_factory.mktemp("features")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "dataset").symlink_to(tiny_store)
    extractor.run(Project(root), features=Features(width=8, epochs=1))
    return root / "artifacts" / "features"


@pytest.fixture
def search_project(tiny_store, tiny_features, small_params, tmp_path, monkeypatch):
    """A function: a project folder with store, extractor and params.yaml whose tune section is as given."""

    def make(tracking=False, phases=None, sections=None, **tune):
        root = tmp_path / "project"
        if not root.exists():
            shutil.copytree(tiny_store, root / "artifacts" / "dataset")
            shutil.copytree(tiny_features, root / "artifacts" / "features")
        plain = copy.deepcopy(small_params)
        phase = {"name": "one", "epochs": 2, "learning_rate": 1e-3, "beta": {"end": 0.1}}
        plain["train"] |= {"batch_size": 16, "phases": phases or [phase]}
        plain["refiner"] = {}  # half a trial's time
        plain["tune"] = {"space": SPACE, "trial": {"num_generated": 16}} | tune
        plain |= sections or {}
        plain["tracking"] = {"enabled": tracking, "system_metrics": False}
        with (root / "params.yaml").open("w") as file:
            YAML().dump(plain, file)
        return Project(root), load(root / "params.yaml")

    return make
