"""The per-image values of a version's evaluation: kept with it in MLflow, and compared with another version's."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.evaluation.data import EvaluationData, load_evaluation
from medgen.metrics.comparison import Comparison, compare, compare_means
from medgen.registry.versions import EVALUATION, NoSuchVersion, Version, fetch

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

FOLDER = "evaluation"  # of a version's artifacts


def keep_evaluation(client: "MlflowClient", version: "ModelVersion", project: Project) -> None:
    """Copies artifacts/evaluation to a version's artifacts; the tag that names it is set with the metrics."""
    assert version.source
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(project.evaluation, Path(folder, FOLDER))
        client.log_model_artifacts(version.source.removeprefix("models:/"), folder)


def read_evaluation(version: Version, project: Project, tracking: Tracking) -> EvaluationData | None:
    """Fetches the evaluation that a version's metrics come from; None where it was not kept or is damaged.

    Raises:
        UserError: the store does not answer.
    """
    digest = version.tags.get(EVALUATION)
    if digest is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            kept = fetch(version.uri, FOLDER, Path(folder), project, tracking)
        except NoSuchVersion:
            return None
        try:
            data = load_evaluation(kept)
        except UserError:
            return None
    return data if data.digest == digest else None


def compare_versions(candidate: EvaluationData, reference: EvaluationData) -> list[Comparison] | None:
    """How much worse the candidate is in each statistic: Dice of masks; else SSIM, MMD, spectrum, C2ST and recall.

    None where the two were not evaluated alike: other held-out images, another extractor or number of samples.
    """
    if candidate.info != reference.info:
        return None
    groups = reference.groups.tolist()
    if candidate.samples is None or reference.samples is None or reference.held_out is None:
        return [compare_means("dice", candidate.similarity, reference.similarity, groups)]
    ssim = compare_means("ssim", candidate.similarity, reference.similarity, groups)
    tests = compare(candidate.samples, reference.samples, reference.held_out, reference.info.bandwidth, groups)
    return [ssim, *tests]
