"""The content of a registered version: the model in artifacts/, its prior, its refiner and its last evaluation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgen import config
from medgen.config import Params, Project
from medgen.errors import UserError
from medgen.evaluation.data import load_evaluation
from medgen.io import hash_file, read_description
from medgen.models import bundle
from medgen.models.bundle import BundleInfo
from medgen.priors.generator import content_hash
from medgen.priors.refiner import load_refiner
from medgen.registry.origin import origin_tags
from medgen.registry.versions import PARAMS_TAG, metric_tags
from medgen.tracking import EVALUATION_ORIGIN, PRIOR_ORIGIN, REFINER_ORIGIN, RunRecord


@dataclass(frozen=True)
class Artifacts:
    """Description of the artifacts of a project, and their evaluation."""

    project: Project
    info: BundleInfo
    prior: str | None  # its name; None for a segmentation model, which needs none
    refiner: config.Refiner | None  # its parameters; None if there is none
    content: str = ""  # hash of all files
    metrics: Mapping[str, float] = field(default_factory=dict)  # of an evaluation of this content; empty without one
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of the metrics

    @classmethod
    def load(cls, project: Project) -> "Artifacts":
        """Read the artifacts and the reports of a project.

        Raises:
            UserError: the model, prior or refiner is missing or damaged.
        """
        info = bundle.load_info(project.model)
        prior = read_description(project.prior, "prior", "medgen prior")["name"]
        refiner = load_refiner(project.refiner, bundle.digest(project.model))
        content = content_hash(project.model, project.prior, project.refiner)
        refiner_params = None if refiner is None else refiner.params
        return cls(project, info, prior, refiner_params, content, *_read_metrics(project, content))

    @property
    def samples(self) -> Path | None:
        """The image of samples that the evaluation wrote; None without one."""
        path = self.project.figures / "samples.png"
        return path if self.metrics and path.exists() else None

    def metric_tags(self) -> dict[str, str]:
        """The metrics as tags of a version, with tags that say what they were measured with."""
        return metric_tags(self.metrics, self.provenance)

    def lineage_tags(self, record: RunRecord) -> dict[str, str]:
        """The tags of the training, with the origin of all parts and of the metrics.

        The hash of the training's parameters is left out, because a version has the hash of all parameters.
        """
        tags = {key: value for key, value in record.tags.items() if not key.startswith("mlflow.") and key != PARAMS_TAG}
        stages = [tags]
        if self.prior is not None:
            stages.append(self._prior_origin().get("lineage", {}))
        if self.refiner is not None:
            refiner = self._origin(REFINER_ORIGIN, self.project.refiner / "refiner.json")
            stages.append(refiner.get("lineage", {}))
        if self.provenance:
            evaluation = self._origin(EVALUATION_ORIGIN, self.project.reports / "provenance.json")
            stages.append(evaluation.get("lineage", {}))
        origin = origin_tags(self.project.root, stages)
        return tags | origin | {"run": self.info.run, "dataset.fingerprint": self.info.dataset}

    def params_made_with(self, params: Params) -> Params:
        """The parameters of each part: params.yaml may have changed since, or been overridden with `--set`."""
        values = params.model_dump(mode="json")
        values |= _read_json(self.project.runs / self.info.run / "params.json")
        values["prior"] = self._prior_origin().get("prior") or values["prior"]
        values["refiner"] = self.refiner or {**values["refiner"], "enabled": False}
        values["utility"] = _read_json(self.project.utility / "utility.json").get("utility", values["utility"])
        values["evaluate"] = self.provenance.get("evaluate", values["evaluate"])
        values["features"] = _read_json(self.project.features / "extractor.json").get("features", values["features"])
        values["model"] = self.info.model.model_dump(mode="json")
        values["preprocess"] = self.info.preprocess.model_dump(mode="json")
        return Params.model_validate(values)

    def _prior_origin(self) -> dict[str, Any]:
        return self._origin(PRIOR_ORIGIN, self.project.prior / "prior.json")

    def _origin(self, name: str, artifact: Path) -> dict[str, Any]:
        """The origin of a prior, refiner or evaluation in the run's folder; {} if it describes another artifact."""
        found = _read_json(self.project.runs / self.info.run / name)
        return found if found and found["sha256"] == hash_file(artifact) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} if there is no file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _read_metrics(project: Project, content: str) -> tuple[dict[str, float], dict[str, Any]]:
    """metrics.json and provenance.json of the reports; both empty if they do not belong to this content."""
    path = project.reports / "metrics.json"
    try:
        provenance: dict[str, Any] = json.loads((project.reports / "provenance.json").read_text(encoding="utf-8"))
        if (provenance.get("content"), provenance.get("metrics")) != (content, hash_file(path)):
            return {}, {}
        if "evaluation" in provenance and load_evaluation(project.evaluation).digest != provenance["evaluation"]:
            return {}, {}
        return json.loads(path.read_text(encoding="utf-8")), provenance
    except (OSError, ValueError, AttributeError, RecursionError, UserError):  # missing or damaged
        return {}, {}
