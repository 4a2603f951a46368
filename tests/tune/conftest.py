"""Projects whose trials take a second, and `medgen tune` commands that start at once."""

import copy
import multiprocessing
import shutil

import pytest
from ruamel.yaml import YAML

from medgen.config import Features, Project, load
from medgen.training import extractor

SPACE = {
    "train.phases.one.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "train.phases.one.beta.end": {"low": 1e-3, "high": 1.0, "log": True},
}
# Runs in a fork of a process that has imported medgen: an import takes longer than a small search.
COMMAND = """
import multiprocessing, os, signal, sys
os.chdir({folder!r})
sys.argv = ["medgen", *{arguments!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
for number in (1, 2):
    os.dup2(os.open({output!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
if {fork_workers}:
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork")
from medgen.cli import main
main()
"""


@pytest.fixture(scope="session")
def tiny_features(tiny_store, tmp_path_factory):
    """artifacts/features of the tiny store."""
    root = tmp_path_factory.mktemp("features")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "dataset").symlink_to(tiny_store)
    extractor.run(Project(root), features=Features(width=8, epochs=1))
    return root / "artifacts" / "features"


@pytest.fixture(scope="session")
def make_project(tiny_store, tiny_features, small_params):
    """A function that creates a project with store, extractor and params.yaml, and returns it with its parameters."""

    def make(root, tracking=False, epochs=1, sections=None, **tune):
        shutil.copytree(tiny_store, root / "artifacts" / "dataset")
        shutil.copytree(tiny_features, root / "artifacts" / "features")
        plain = copy.deepcopy(small_params)
        phase = {"epochs": epochs, "learning_rate": 1e-3, "beta": {"end": 0.1}}
        plain["train"] |= {"batch_size": 16, "phases": {"one": phase}}
        plain["refiner"] = {}  # it takes half the time of a trial
        plain["tune"] = {"space": SPACE, "trial": {"num_generated": 16}} | tune
        plain |= sections or {}
        plain["tracking"] = {"enabled": tracking, "system_metrics": False}
        with (root / "params.yaml").open("w") as file:
            YAML().dump(plain, file)
        return Project(root), load(root / "params.yaml")

    return make


@pytest.fixture
def search_project(make_project, tmp_path):
    """`make_project` in the test's own folder."""
    return lambda **settings: make_project(tmp_path / "project", **settings)


@pytest.fixture
def start_tune():
    """A function that starts `medgen tune` in a project; returns the process and the file of its output."""
    context, processes = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["mlflow.tracking", "medgen.cli", "medgen.tune"])

    def start(project, *arguments, fork_workers=True):
        output = project.root / f"output_{len(processes)}.txt"
        values = {"folder": str(project.root), "arguments": ["tune", *arguments], "output": str(output)}
        process = context.Process(target=exec, args=(COMMAND.format(**values, fork_workers=fork_workers), {}))
        process.start()
        processes.append(process)
        return process, output

    yield start
    for process in processes:
        process.kill()
