"""Write the results of an evaluation, and add them to the run that trained the model."""

import json
import math
from collections.abc import Mapping

from medgen.config import Evaluate, Project, Tracking
from medgen.data.store import Store
from medgen.errors import UserError
from medgen.evaluation.data import EvaluationData, save_evaluation
from medgen.io import hash_file, write_atomic
from medgen.models import bundle
from medgen.models.bundle import BundleInfo
from medgen.priors.generator import content_hash
from medgen.reports.evaluation import OPTIONAL_FIGURES
from medgen.tracking import Tracker, history, lineage
from medgen.training.distributed import pick_device

SIGNIFICANT_DIGITS = 6


def write_results(
    project: Project,
    store: Store,
    info: BundleInfo,
    params: Evaluate,
    metrics: Mapping[str, float],
    data: EvaluationData,
    hashes: Mapping[str, str],
) -> dict[str, float]:
    """Write metrics.json, artifacts/evaluation and provenance.json; the metrics as written, sorted and rounded.

    provenance.json differs between machines, metrics.json does not. In it `content` is the SHA-256 of all evaluated
    parts, `metrics` that of metrics.json, `extractors` have those of their weights, and `evaluation` is that of the
    per-image values.

    Raises:
        UserError: a metric is not finite.
    """
    if invalid := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
        raise UserError(f"{project.model}: {', '.join(invalid)} not finite; train the model again")
    rounded = {name: float(f"{metrics[name]:.{SIGNIFICANT_DIGITS}g}") for name in sorted(metrics)}
    _write_json(project, "metrics.json", rounded)
    device = str(pick_device("auto"))
    provenance = {
        "model": bundle.digest(project.model),
        "content": content_hash(project.model, project.prior, project.refiner),
        "metrics": hash_file(project.reports / "metrics.json"),
        "run": info.run,
        "dataset": store.fingerprint,
        "extractors": {name: {"sha256": digest} for name, digest in hashes.items()},
        "evaluate": params.model_dump(mode="json"),
        "evaluation": save_evaluation(project.evaluation, data),
        "lineage": lineage(project, params, device=device, precision="fp32"),
    }
    _write_json(project, "provenance.json", provenance)
    return rounded


def _write_json(project: Project, name: str, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    write_atomic(project.reports / name, f"{text}\n".encode())


def record_results(
    project: Project, info: BundleInfo, params: Evaluate, tracking: Tracking, metrics: dict[str, float]
) -> None:
    """Add parameters, metrics, figures and reports to the run that trained the model."""
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({"evaluate": params})
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        for name in ("samples.png", "reconstructions.png", *OPTIONAL_FIGURES):
            if (project.figures / name).exists():
                tracker.artifact(project.figures / name, "figures")
        for name in ("metrics.json", "provenance.json", "index.html"):
            tracker.artifact(project.reports / name, "reports")
