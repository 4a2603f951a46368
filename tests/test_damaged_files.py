"""Damaged or forged JSON files of a project: one message that names the file and the command that writes it again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medgen.config import Project, Tracking
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.priors.generator import load_generator
from medgen.registry import artifacts
from medgen.tracking import Tracker, mlflow_sync
from medgen.tracking.compare import compare


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


def with_values(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | values


def with_model(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | {"model": content["model"] | values}


@pytest.fixture(scope="module")
def project(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory, trained: Callable[..., Project]) -> Project:
    root = tmp_path_factory.mktemp("damaged")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "dataset").symlink_to(tiny_store)
    return trained(Project(root))


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "prior: a list": ("prior/prior.json", lambda _: []),
    "prior: a text": ("prior/prior.json", lambda _: "prior"),
    "prior: name a list": ("prior/prior.json", with_values(name=[])),
    "prior: another family": ("prior/prior.json", with_values(name="flow")),
    "prior: model a number": ("prior/prior.json", with_values(model=7)),
    "prior: model missing": ("prior/prior.json", without("model")),
    "prior: another shape": ("prior/prior.json", with_values(latent_shape=[2, 9, 8])),
    "prior: a huge shape": ("prior/prior.json", with_values(latent_shape=[10**9, 10**9])),
    "prior: shape a text": ("prior/prior.json", with_values(latent_shape="288")),
    "refiner: a list": ("refiner/refiner.json", lambda _: [1]),
    "refiner: model a number": ("refiner/refiner.json", with_values(model=7)),
    "model: a list": ("model/model.json", lambda _: [{}]),
    "model: no classes": ("model/model.json", with_values(classes=[])),
    "model: classes a text": ("model/model.json", with_values(classes=7)),
    "model: huge images": ("model/model.json", with_values(image_shape=[1, 10**6, 10**6])),
    "model: other images": ("model/model.json", with_values(image_shape=[3, 32, 32])),
    "model: a million blocks": ("model/model.json", with_model(blocks_per_stage=10**6)),
    "model: many blocks": ("model/model.json", with_model(blocks_per_stage=200)),
    "model: wide": ("model/model.json", with_model(base_channels=65_536, max_channels=65_536)),
    "model: weights a list": ("model/model.json", with_values(sha256=[])),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_part_of_a_model(project: Project, name: str) -> None:
    relative, damage = DAMAGE[name]
    path = project.root / "artifacts" / relative
    before = path.read_bytes()
    path.write_text(json.dumps(damage(json.loads(before))))
    started = time.monotonic()
    try:
        with pytest.raises(UserError) as error:
            load_generator(project.model, project.prior, project.refiner)
    finally:
        path.write_bytes(before)
    assert time.monotonic() - started < 30
    part = relative.partition("/")[0]
    command = {"model": "medgen (train|prior)"}.get(part, f"medgen {part}")
    assert error.match(rf"(?s){path.parent}.*(`{command}`|Known: )")


@pytest.mark.parametrize("content", ["[" * 100_000, "\0", "{", "7"])
def test_a_file_that_is_no_json_object(project: Project, content: str) -> None:
    path = project.prior / "prior.json"
    before = path.read_bytes()
    path.write_text(content)
    try:
        with pytest.raises(UserError, match=r"prior\.json: .*run `medgen prior` again"):
            load_generator(project.model, project.prior, project.refiner)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("key", ["name", "preprocessing", "classes"])
def test_a_dataset_without_a_key(tiny_project: Project, key: str) -> None:
    path = tiny_project.dataset / "dataset.json"
    path.write_text(json.dumps(without(key)(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=rf"dataset\.json: damaged: found no {key}.*Run `medgen preprocess` again"):
        open_store(tiny_project.dataset)


@pytest.mark.parametrize("content", ["[]", "7", "null", "[" * 100_000, "\0"])
def test_a_provenance_of_another_shape_is_of_no_metrics(tmp_path: Path, content: str) -> None:
    (tmp_path / "reports").mkdir()
    for name in ("metrics.json", "provenance.json"):
        (tmp_path / "reports" / name).write_text(content)
    assert artifacts._read_metrics(Project(tmp_path), "content") == ({}, {})


@pytest.mark.parametrize(
    "state", ["[]", '{"run_id": [], "offset": 0}', '{"run_id": "a", "offset": "3"}', "[" * 100_000]
)
def test_what_mlflow_has_received_is_sent_again_if_its_record_is_damaged(tmp_path: Path, state: str) -> None:
    (tmp_path / mlflow_sync.STATE_FILE).write_text(state)
    assert mlflow_sync._read_state(tmp_path) == {}


LINES = [
    "7", "[]", '"text"', "null", "{}", '{"kind": "metrics"}', '{"kind": [], "time": 1, "key": ""}',
    '{"kind": "metrics", "time": 1.0, "step": "x", "values": {"val/loss": 1}}',
    '{"kind": "metrics", "time": 1.0, "step": 1, "values": {"val/loss": []}}',
    '{"kind": "metrics", "time": 1.0, "step": 1, "values": {"val/loss": "high"}}',
    '{"kind": "tags", "time": 1.0, "values": {"mlflow.runName": 7}}',
    '{"kind": "status", "time": 1.0, "key": "", "status": []}',
    '{"kind": "status", "time": "now", "key": "", "status": "FINISHED"}',
    '{"kind": "run", "time": 1.0, "key": "", "id": 7, "name": []}',
    '{"kind": "params", "time": 1.0, "values": 7}',
    "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_record_that_is_no_event_is_ignored(tmp_path: Path, line: str) -> None:
    project, run = Project(tmp_path), tmp_path / "runs" / "aaa"
    with Tracker.open(run, Tracking(enabled=False), project, "vae") as tracker:
        tracker.metrics({"val/loss": 0.5}, step=1)
    path = run / "history.jsonl"
    events = path.read_text().splitlines()
    path.write_text("\n".join([line, *events[:2], line, *events[2:], line]) + "\n")
    (row,) = compare(project)
    assert (row.name, row.status, row.metrics) == ("vae", "finished", {"val/loss": 0.5})
