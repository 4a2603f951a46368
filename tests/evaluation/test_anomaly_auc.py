"""AUC of the normal class against all others, by patient."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medgen.config import Evaluate, Project
from medgen.data.images import to_floats
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.evaluation import anomaly
from medgen.evaluation.anomaly import evaluate_anomalies, score_anomalies
from medgen.evaluation.context import load_context
from medgen.inference.anomaly import SCORES, find_anomalies
from medgen.models import bundle
from medgen.training.distributed import World

KEYS = {f"anomaly/auc_{name}{end}" for name in SCORES for end in ("", "_ci_low", "_ci_high")}


def context(labels: torch.Tensor, patients: list[str] | None) -> Any:
    held_out, params = SimpleNamespace(name="test"), Evaluate(normal_class="b")
    return SimpleNamespace(labels=labels, normal_class=1, patients=patients, held_out=held_out, params=params)


def test_the_auc_is_scikit_learns_and_patients_widen_its_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4 - 1  # unlabelled, a, b, c
    scores = torch.randn(240, 3, generator=generator).double() + (labels != 1)[:, None] * torch.tensor([0.0, 1.0, -2.0])
    scores[:, 0] = scores[:, 0].round()  # ties
    alone, grouped = (
        evaluate_anomalies(context(labels, patients), scores)
        for patients in (None, [str(number // 12) for number in range(240)])
    )
    assert set(alone) == KEYS
    known = labels >= 0
    for name, column in zip(SCORES, scores.T, strict=True):
        assert alone[f"anomaly/auc_{name}"] == pytest.approx(roc_auc_score(labels[known] != 1, column[known]))
        assert grouped[f"anomaly/auc_{name}"] == alone[f"anomaly/auc_{name}"]
        low, high = (alone[f"anomaly/auc_{name}_ci_{end}"] for end in ("low", "high"))
        assert low < alone[f"anomaly/auc_{name}"] < high
    same = scores[:12].repeat_interleave(20, dim=0)  # a patient's images have one score
    of_patient = torch.arange(12).repeat_interleave(20) % 2
    widths = []
    for patients in (None, [str(number // 20 if number < 240 else number) for number in range(240)]):
        found = evaluate_anomalies(context(of_patient, patients), same)
        widths.append(found.get("anomaly/auc_l1_ci_high", 0.0))
    assert widths[0] > 0.0 and widths[1] == 0.0, "six patients are too few for an interval"


def test_the_metrics_of_an_evaluation(
    patients_store: Path, trained: Callable[..., Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path)
    shutil.copytree(patients_store, project.dataset)
    trained(project)
    store = open_store(project.dataset)
    model, info = bundle.load(project.model)
    world, normal = World(0, 1, torch.device("cpu")), store.classes[0]
    params = Evaluate(num_generated=20, batch_size=7, normal_class=normal)
    loaded = load_context(project, store, model, info, params, world)  # type: ignore[arg-type]
    with torch.no_grad():
        scores = score_anomalies(loaded)
    assert scores is not None
    images = to_floats(torch.from_numpy(store.split("test").images[:]))
    labels = torch.zeros(len(images), dtype=torch.int64)
    whole = find_anomalies(loaded.model, loaded.prior, images, labels, torch.Generator())
    torch.testing.assert_close(scores, whole.scores, rtol=1e-3, atol=1e-4)
    assert evaluate_anomalies(loaded, scores) == {}, "too few patients"
    monkeypatch.setattr(anomaly, "MIN_GROUPS", 4)
    metrics = evaluate_anomalies(loaded, scores)
    assert set(metrics) == KEYS
    truth = np.asarray(store.split("test").labels[:]) != 0
    assert metrics["anomaly/auc_nll"] == pytest.approx(roc_auc_score(truth, scores[:, 2]))
    assert score_anomalies(load_context(project, store, model, info, Evaluate(), world)) is None  # type: ignore[arg-type]
    other = params.model_copy(update={"normal_class": "HEALTHY"})
    with pytest.raises(UserError, match=r"evaluate\.normal_class.*HEALTHY"):
        load_context(project, store, model, info, other, world)  # type: ignore[arg-type]
