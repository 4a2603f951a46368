"""End-to-end test with a real MLflow server: train, promote, refuse, roll back, serve and reproduce.

The server uses PostgreSQL if it is installed, else SQLite. Commands run in this process, because a new process imports
torch and MLflow for seconds; `medgen serve` and the DVC pipeline of `medgen history --reproduce --run` have processes.
"""

import base64
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medgen import cli
from medgen.config import Prior
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.metrics.comparison import compare
from medgen.models import bundle
from medgen.priors import ANALYTIC, save_prior
from medgen.registry import evaluations
from medgen.serving.generate import load_image
from medgen.training.loader import Loader

PARAMS = {
    "data": {"path": "data", "name": "story"},
    "preprocess": {"image_size": 32, "clahe_tiles": 2, "test_fraction": 0.25},
    "features": {"width": 8, "epochs": 3},
    "model": {"name": "autoencoder", "base_channels": 8, "latent_size": 8, "latent_channels": 8},
    "loss": {"weights": {"l1": 1.0, "ssim": 0.5}},
    "train": {
        "batch_size": 16,
        "sample_every": 10,
        "phases": {"one": {"epochs": 10, "learning_rate": 4e-3}},
    },
    "prior": {"name": "gmm", "components": [1]},
    "refiner": {},
    "utility": {},
    "evaluate": {"num_generated": 100, "grid_images": 12},
    "tune": {},
    "tracking": {},
    "registry": {"model_name": "xrays"},
}


STAGES = ("preprocess", "features", "train", "prior", "refiner", "evaluate")


class Clone:
    """A clone of a project; its folder is the current directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PYTHONPATH": str(folder),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "COLUMNS": "120",
        }

    def __call__(self, *command: str) -> str:
        """Run a command in a process of its own and return its output; it must succeed."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def medgen(self, *arguments: str, code: int = 0) -> str:
        """Run `medgen` in this process and return its output; its exit code must be `code`."""
        result = CliRunner().invoke(cli.app, arguments)
        error = result.exception
        exit_code = error.exit_code if isinstance(error, UserError) else result.exit_code
        assert exit_code == code, f"{arguments}: {exit_code}\n{result.output}\n{error!r}"
        return result.output + (f"error: {error}" if isinstance(error, UserError) else "")

    def train_and_evaluate(self, epochs: int, learning_rate: float) -> None:
        phase = {"epochs": epochs, "learning_rate": learning_rate}
        options = [f"train.phases.one.{key}={value}" for key, value in phase.items()]
        self.medgen("train", "--set", options[0], "--set", options[1])
        for stage in ("prior", "refiner", "evaluate"):
            self.medgen(stage)

    def champion(self) -> int | None:
        return json.loads(self.medgen("history", "--json"))["aliases"].get("champion")


@pytest.fixture
def clone(
    root: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_server: Any,
) -> Clone:
    from medgen.datasets.sample import draw

    try:
        database = request.getfixturevalue("postgres")()
    except pytest.skip.Exception:
        database = f"sqlite:///{tmp_path}/server.db"
    server = mlflow_server(database, tmp_path / "server-artifacts")
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("medgen", "dvc.yaml", ".dvcignore", ".gitignore"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name)
    (folder / "params.yaml").write_text(json.dumps(PARAMS))
    draw(folder / "data", num_images=160, size=64, seed=1)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    # the same paired tests with a coarser p-value; 999 permutations take 3 s each time
    monkeypatch.setattr(evaluations, "compare", functools.partial(compare, num_permutations=199))
    clone = Clone(folder)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    dvc = (sys.executable, "-m", "dvc")
    clone(*git, "init", "-q")
    clone(*dvc, "init", "-q")
    clone(*dvc, "add", "-q", "data")
    clone(*git, "add", ".")
    clone(*git, "commit", "-qm", "start")
    return clone


def replay_train_images(artifacts: Path) -> None:
    """Write a prior that samples the latents of train images and nothing else."""
    store = open_store(artifacts / "dataset")
    model, _ = bundle.load_generative(artifacts / "model")
    with torch.no_grad():
        batches = list(Loader(store.split("train"), 64, torch.device("cpu")).sequential())
        latents = torch.cat([model.encode(batch.image, batch.label).mean for batch in batches])
    labels = torch.cat([batch.label for batch in batches])
    prior: Any = ANALYTIC["gmm"].fit(latents, labels, len(store.classes), Prior(name="gmm", variance_kept=1.0))
    num_latents, num_kept = len(latents), prior.centres.shape[1]
    prior.centres = prior.axes.whiten(latents.flatten(1)).float()[:, :num_kept].contiguous()
    prior.weights, prior.owners = torch.full((num_latents,), 1.0 / num_latents), labels
    prior.factors = 1e-3 * torch.eye(num_kept).repeat(num_latents, 1, 1)
    shape = num_latents, len(prior.axes.scales) - num_kept
    prior.residual_means, prior.residual_scales = torch.zeros(shape), torch.ones(shape)
    save_prior(artifacts / "prior", prior, bundle.digest(artifacts / "model"))


def invoke(port: int, record: dict[str, Any]) -> np.ndarray:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"dataframe_records": [record]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return np.array(json.load(response)["predictions"], np.uint8)


@pytest.mark.slow
def test_train_promote_roll_back_serve_and_reproduce(clone: Clone, tmp_path: Path) -> None:
    # 1. A good model becomes the first champion.
    for stage in STAGES:
        clone.medgen(stage)
    clone.medgen("promote")
    assert clone.champion() == 1
    assert "champion already" in clone.medgen("promote")

    # 2. A worse model, trained for one epoch, is refused.
    clone.train_and_evaluate(epochs=1, learning_rate=1e-4)
    output = clone.medgen("promote", code=3)
    assert re.search(r"xrays/2 is not promoted: ssim\S* .*failed; version 1 stays champion", output), output
    assert clone.champion() == 1

    # 3. A better model is promoted.
    clone.train_and_evaluate(epochs=44, learning_rate=6e-3)
    clone.medgen("promote")
    assert clone.champion() == 3

    # 4. The same model with a prior that replays train images, written outside the pipeline, is refused.
    replay_train_images(clone.folder / "artifacts")
    clone.medgen("evaluate")
    output = clone.medgen("promote", code=3)
    failed = "git commit, copy_rate, nearest_over_limit"
    assert f"xrays/4 is not promoted: {failed} failed; version 3 stays champion" in output
    assert clone.champion() == 3

    # After an evaluation with another extractor the two cannot be compared, until the other is evaluated with it too.
    clone.medgen("features", "--set", "features.epochs=1")
    clone.medgen("prior")
    clone.medgen("evaluate")  # the model of version 3 again: the same content is the same version
    output = clone.medgen("promote", "--version", "1", code=3)
    assert "`medgen evaluate --model models:/xrays/3` and `medgen evaluate --model models:/xrays/1`" in output
    clone.medgen("evaluate", "--model", "models:/xrays/1")
    assert "`medgen evaluate" not in clone.medgen("promote", "--version", "4", "--force", "to test the rollback")

    # A rollback restores version 3; the ledger has all changes with their reasons.
    clone.medgen("rollback", "--why", "it reproduces a patient's X-ray")
    history = json.loads(clone.medgen("history", "--json"))
    assert history["aliases"] == {"candidate": 3, "champion": 3, "previous": 1}
    actions = [(one["action"], one["before"], one["after"], one["forced"]) for one in history["promotions"]]
    assert actions == [
        ("promote", None, 1, False),
        ("promote", 1, 3, False),
        ("promote", 3, 4, True),
        ("rollback", 4, 3, False),
    ]
    assert history["promotions"][-1]["why"] == "it reproduces a patient's X-ray"
    lines = (clone.folder / "reports" / "promotions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history["promotions"]
    dataset = history["versions"][0]["dataset"]
    of_dataset = json.loads(clone.medgen("history", "--dataset", dataset[:8], "--json"))
    assert [version["version"] for version in of_dataset["versions"]] == [1, 2, 3, 4]

    check_serving_of_the_champion(clone, tmp_path)

    # Version 1 is rebuilt from its commit, data and parameters; the parameters of version 3 were set with --set.
    assert "params.json" in clone.medgen("history", "--reproduce", "3")
    output = clone.medgen("history", "--reproduce", "1", "--run")
    assert "The same model, prior and refiner, byte for byte" in output
    assert clone("git", "worktree", "list").count("\n") == 1
    assert len(json.loads(clone.medgen("history", "--json"))["versions"]) == 4  # the rebuilt model is not registered


def check_serving_of_the_champion(clone: Clone, tmp_path: Path) -> None:
    clone.medgen("generate", "--n", "3", "--seed", "5", "--model", "models:/xrays@champion", "--out", "outputs/new")
    files = sorted(path for path in (clone.folder / "outputs" / "new").glob("*.png") if path.name != "grid.png")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "medgen", "serve", "--port", str(port)]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=clone.folder, env=clone.environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "serve.log")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=30) as response:
            assert json.load(response)["uri"] == "models:/xrays/3"
        images = invoke(port, {"n": 3, "seed": 5})
        written = sorted(np.array(Image.open(path)).tobytes() for path in files)
        assert sorted(image[..., 0].tobytes() for image in images) == written
        xray = next(path for path in (clone.folder / "data").rglob("*") if path.suffix in (".jpg", ".png"))
        reconstructed = invoke(port, {"image": base64.b64encode(xray.read_bytes()).decode()})
        assert reconstructed.shape == (1, 32, 32, 1)
        np.testing.assert_allclose(reconstructed[0, ..., 0].astype(int), reconstruction(clone, xray), atol=1)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) in (0, -signal.SIGTERM, 143)


def reconstruction(clone: Clone, file: Path) -> np.ndarray:
    """The champion's reconstruction, computed in this process: artifacts/ holds its model."""
    model, info = bundle.load_generative(clone.folder / "artifacts" / "model")
    with torch.no_grad():
        result = model.reconstruct(load_image(file, info.preprocess), None)
    return (result[0, 0] * 255).round().numpy().astype(int)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer\n{log.read_text()}")
