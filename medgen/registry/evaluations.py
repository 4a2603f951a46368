"""Per-image values of a version's evaluation: stored with the version in MLflow and compared with another version's."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.evaluation.data import EvaluationData, load_evaluation
from medgen.metrics.comparison import Comparison, compare, compare_means
from medgen.registry.versions import EVALUATION_DIGEST, NoSuchVersion, Version, download_files

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

FOLDER = "evaluation"  # in a version's artifacts


def upload_evaluation(client: "MlflowClient", version: "ModelVersion", project: Project) -> None:
    """Copy artifacts/evaluation, without images, to a version's artifacts; its digest is a tag set with the metrics."""
    assert version.source
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(project.evaluation, Path(folder, FOLDER), ignore=lambda *_: {project.images.name})
        client.log_model_artifacts(version.source.removeprefix("models:/"), folder)


def download_evaluation(version: Version, project: Project, tracking: Tracking) -> EvaluationData | None:
    """The evaluation that a version's metrics come from; None if it was not stored or is damaged.

    Raises:
        UserError: the MLflow store does not answer.
    """
    digest = version.tags.get(EVALUATION_DIGEST)
    if digest is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = download_files(version.uri, FOLDER, Path(folder), project, tracking)
        except NoSuchVersion:
            return None
        try:
            data = load_evaluation(files)
        except UserError:
            return None
    return data if data.digest == digest else None


def compare_versions(candidate: EvaluationData, reference: EvaluationData) -> list[Comparison] | None:
    """Significance tests for a worse candidate: in Dice for masks, else in SSIM, MMD, spectrum, C2ST and recall.

    Returns:
        None if the two used other held-out images, another extractor or another number of samples.
    """
    if candidate.info != reference.info:
        return None
    groups = reference.groups.tolist()
    if candidate.samples is None or reference.samples is None or reference.held_out is None:
        return [compare_means("dice", candidate.similarity, reference.similarity, groups)]
    ssim = compare_means("ssim", candidate.similarity, reference.similarity, groups)
    groups = reference.held_out_groups.tolist()
    tests = compare(candidate.samples, reference.samples, reference.held_out, reference.info.bandwidth, groups)
    return [ssim, *tests]
