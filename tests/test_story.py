"""The whole story over a real MLflow server: trained, promoted, refused, rolled back, served, rebuilt.

PostgreSQL is behind the server where it is installed, else SQLite.
"""

import base64
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
from typer.testing import CliRunner

from medgen import cli
from medgen.config import Prior
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.models import bundle
from medgen.priors import FITTED, save_prior
from medgen.serving.generate import load_image
from medgen.training.loader import Loader

PARAMS = {
    "data": {"path": "data", "name": "story"},
    "preprocess": {"image_size": 32, "clahe_tiles": 2, "test_fraction": 0.25},
    "features": {"width": 8, "epochs": 3},
    "model": {"name": "autoencoder", "base_channels": 8, "latent_size": 4, "latent_channels": 8},
    "loss": {"weights": {"l1": 1.0, "ssim": 0.5}},
    "train": {
        "batch_size": 16,
        "sample_every": 10,
        "phases": [{"name": "one", "epochs": 20, "learning_rate": 3e-3}],
    },
    "prior": {"name": "gmm", "components": [1]},
    "refiner": {},
    "evaluate": {"num_generated": 100, "grid_images": 12},
    "tune": {},
    "tracking": {},
    "registry": {"model_name": "films"},
}


class Clone:
    """A user's clone of a project, the current folder, and a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PYTHONPATH": str(folder),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "COLUMNS": "120",
        }

    def __call__(self, *command: str, code: int = 0) -> str:
        """What a command prints; it must end with `code`."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def medgen(self, *words: str, code: int = 0) -> str:
        """What `medgen` prints; in this process, as each new one imports for seconds."""
        result = CliRunner().invoke(cli.app, words)
        error = result.exception
        ended = error.exit_code if isinstance(error, UserError) else result.exit_code
        assert ended == code, f"{words}: {ended}\n{result.output}\n{error!r}"
        return result.output + (f"error: {error}" if isinstance(error, UserError) else "")

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
    clone = Clone(folder)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    dvc = (sys.executable, "-m", "dvc")
    clone(*git, "init", "-q")
    clone(*dvc, "init", "-q")
    clone(*dvc, "config", "core.analytics", "false")
    clone(*dvc, "add", "-q", "data")
    clone(*git, "add", ".")
    clone(*git, "commit", "-qm", "start")
    return clone


def replay_train_images(artifacts: Path) -> None:
    """Puts a prior in place that draws the latents of train images, and nothing else."""
    store = open_store(artifacts / "dataset")
    model, _ = bundle.load_generative(artifacts / "model")
    with torch.no_grad():
        batches = list(Loader(store.split("train"), 64, torch.device("cpu")).sequential())
        latents = torch.cat([model.encode(batch.image, batch.label).mean for batch in batches])
    labels = torch.cat([batch.label for batch in batches])
    prior: Any = FITTED["gmm"].fit(latents, labels, len(store.classes), Prior(name="gmm", variance_kept=1.0))
    number, kept = len(latents), prior.centres.shape[1]
    prior.centres = prior.axes.whiten(latents.flatten(1)).float()[:, :kept].contiguous()
    prior.weights, prior.owners = torch.full((number,), 1.0 / number), labels
    prior.factors = 1e-3 * torch.eye(kept).repeat(number, 1, 1)
    shape = number, len(prior.axes.scales) - kept
    prior.residual_means, prior.residual_scales = torch.zeros(shape), torch.ones(shape)
    save_prior(artifacts / "prior", prior, bundle.digest(artifacts / "model"))


def trained(epochs: int, learning_rate: float) -> list[str]:
    phases = [{"name": "one", "epochs": epochs, "learning_rate": learning_rate}]
    return ["--set", f"train.phases={json.dumps(phases)}"]


def invoke(port: int, record: dict[str, Any]) -> np.ndarray:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"dataframe_records": [record]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return np.array(json.load(answer)["predictions"], np.uint8)


@pytest.mark.slow
def test_the_story(clone: Clone, tmp_path: Path) -> None:
    # a good model: trained by the pipeline, registered by it, and the first champion
    clone(sys.executable, "-m", "dvc", "repro")
    clone.medgen("promote")
    assert clone.champion() == 1
    assert "champion already" in clone.medgen("promote")

    # a worse one: hardly trained
    clone.medgen("train", *trained(1, 1e-4))
    clone.medgen("prior")
    clone.medgen("refiner")
    clone.medgen("evaluate")
    told = clone.medgen("promote", code=3)
    assert re.search(r"films/2 is not promoted: ssim\S* .*failed; version 1 stays champion", told), told
    assert clone.champion() == 1

    # a better one
    clone.medgen("train", *trained(60, 4e-3))
    clone.medgen("prior")
    clone.medgen("refiner")
    clone.medgen("evaluate")
    clone.medgen("promote")
    assert clone.champion() == 3

    # the same, with a prior that gives the train images back, made outside of the pipeline: as sharp and as near
    replay_train_images(clone.folder / "artifacts")
    clone.medgen("evaluate")
    told = clone.medgen("promote", code=3)
    failed = "git commit, copy_rate, nearest_over_limit"
    assert f"films/4 is not promoted: {failed} failed; version 3 stays champion" in told
    assert clone.champion() == 3

    # judged through another extractor the two cannot be compared, until the champion is judged alike
    clone.medgen("features", "--set", "features.epochs=1")
    clone.medgen("prior")
    clone.medgen("evaluate")  # the model of version 3 again: the same content is the same version
    clone.medgen("promote", "--version", "1", code=3)
    told = clone.medgen("promote", "--version", "1", code=3)
    assert "`medgen evaluate --model models:/films/3` and `medgen evaluate --model models:/films/1`" in told
    clone.medgen("evaluate", "--model", "models:/films/1")
    assert "`medgen evaluate" not in clone.medgen("promote", "--version", "4", "--force", "to see it rolled back")

    # back again, with the reason on record
    clone.medgen("rollback", "--why", "it gave back a patient's film")
    history = json.loads(clone.medgen("history", "--json"))
    assert history["aliases"] == {"candidate": 3, "champion": 3, "previous": 1}
    actions = [(one["action"], one["before"], one["after"], one["forced"]) for one in history["promotions"]]
    assert actions == [
        ("promote", None, 1, False),
        ("promote", 1, 3, False),
        ("promote", 3, 4, True),
        ("rollback", 4, 3, False),
    ]
    assert history["promotions"][-1]["why"] == "it gave back a patient's film"
    lines = (clone.folder / "reports" / "promotions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history["promotions"]
    dataset = history["versions"][0]["dataset"]
    trained_on_it = json.loads(clone.medgen("history", "--dataset", dataset[:8], "--json"))
    assert [version["version"] for version in trained_on_it["versions"]] == [1, 2, 3, 4]

    serves_the_champion(clone, tmp_path)

    # from the version back to the commit, data and parameters; those of version 3 were given with --set
    assert "params.json" in clone.medgen("history", "--reproduce", "3")
    told = clone.medgen("history", "--reproduce", "1", "--run")
    assert "The same model, prior and refiner, byte for byte" in told
    assert clone("git", "worktree", "list").count("\n") == 1
    assert len(json.loads(clone.medgen("history", "--json"))["versions"]) == 4  # what is rebuilt is not registered


def serves_the_champion(clone: Clone, tmp_path: Path) -> None:
    clone.medgen("generate", "--n", "3", "--seed", "5", "--model", "models:/films@champion", "--out", "outputs/new")
    from PIL import Image

    files = sorted(path for path in (clone.folder / "outputs" / "new").glob("*.png") if path.name != "grid.png")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "medgen", "serve", "--port", str(port)]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=clone.folder, env=clone.environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "serve.log")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=30) as answer:
            assert "3" in answer.read().decode()
        images = invoke(port, {"n": 3, "seed": 5})
        written = sorted(np.array(Image.open(path)).tobytes() for path in files)
        assert sorted(image[..., 0].tobytes() for image in images) == written
        film = next((clone.folder / "data").rglob("*.jpg"), None) or next((clone.folder / "data").rglob("*.png"))
        rebuilt = invoke(port, {"image": base64.b64encode(film.read_bytes()).decode()})
        assert rebuilt.shape == (1, 32, 32, 1)
        expected = reconstruction(clone, film)
        np.testing.assert_allclose(rebuilt[0, ..., 0].astype(int), expected, atol=1)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) in (0, -signal.SIGTERM, 143)


def reconstruction(clone: Clone, film: Path) -> np.ndarray:
    """The champion's, in this process: it is what stands in artifacts/."""
    model, info = bundle.load_generative(clone.folder / "artifacts" / "model")
    with torch.no_grad():
        result = model.reconstruct(load_image(film, info.preprocess), None)
    return (result[0, 0] * 255).round().numpy().astype(int)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)  # between two looks; the deadline decides
    raise AssertionError(f"{url} does not answer\n{log.read_text()}")
