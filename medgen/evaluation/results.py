"""Write the results of an evaluation, and add them to the run that trained the model."""

import math
from collections.abc import Mapping

from medgen.config import Evaluate, Project, Tracking
from medgen.data.store import Store
from medgen.errors import UserError
from medgen.evaluation.data import EvaluationData, save_evaluation
from medgen.io import hash_file, to_json, write_atomic
from medgen.metrics.summary import summarize
from medgen.models import bundle
from medgen.models.bundle import BundleInfo
from medgen.priors.generator import content_hash
from medgen.tracking import EVALUATION_ORIGIN, Tracker, history, lineage
from medgen.training.distributed import pick_device

REPORTS = ("summary.json", "metrics.json", "provenance.json", "index.html", "MODEL_CARD.md")
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
    """Write metrics.json, summary.json, artifacts/evaluation and provenance.json; the metrics as written.

    summary.json has the main metrics, which DVC shows. In provenance.json `content` is the SHA-256 of all evaluated
    parts, `metrics` that of metrics.json, `extractors` have those of their weights, and `evaluation` is that of the
    per-image values.

    Raises:
        UserError: a metric is not finite.
    """
    if invalid := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
        raise UserError(f"{project.model}: {', '.join(invalid)} not finite; train the model again")
    rounded = {name: float(f"{metrics[name]:.{SIGNIFICANT_DIGITS}g}") for name in sorted(metrics)}
    write_atomic(project.reports / "metrics.json", to_json(rounded))
    write_atomic(project.reports / "summary.json", to_json(summarize(rounded)))
    provenance = {
        "model": bundle.digest(project.model),
        "content": content_hash(project.model, project.prior, project.refiner),
        "metrics": hash_file(project.reports / "metrics.json"),
        "run": info.run,
        "dataset": store.fingerprint,
        "extractors": {name: {"sha256": digest} for name, digest in hashes.items()},
        "evaluate": params.model_dump(mode="json"),
        "evaluation": save_evaluation(project.evaluation, data),
    }
    write_atomic(project.reports / "provenance.json", to_json(provenance))
    return rounded


def record_results(
    project: Project, info: BundleInfo, params: Evaluate, tracking: Tracking, metrics: dict[str, float]
) -> None:
    """Add parameters, metrics, figures, reports and lineage to the run that trained the model."""
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({"evaluate": params})
        for name in ("samples", "reconstructions"):  # of the finished model, where MLflow's charts of images begin
            tracker.image(name, project.figures / f"{name}.png", step=0)
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        for path in sorted(project.figures.iterdir()):
            tracker.artifact(path, "figures")
        for name in REPORTS:
            tracker.artifact(project.reports / name, "reports")
    origin = {
        "sha256": hash_file(project.reports / "provenance.json"),
        "lineage": lineage(project, params, stage="evaluate", device=str(pick_device("auto")), precision="fp32"),
    }
    write_atomic(scratch / EVALUATION_ORIGIN, to_json(origin))
