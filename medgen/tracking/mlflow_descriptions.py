"""The description of an MLflow experiment, and tags that tell generated descriptions from edited ones."""

import hashlib
from collections.abc import Mapping

NOTE_TAG = "mlflow.note.content"  # MLflow shows this tag as the description of an experiment or a run
HASH_TAG = "medgen.about"  # hash of the description that medgen wrote last

EXPERIMENT_DESCRIPTION = """\
Models of medical images, trained by medgen. Each run trains one model.

- **Run names**: a run is named after the parameters that differ from the run before it (tags `differs.in` and \
`differs.from`). The first run, and a run that differs in many parameters, is named after its model and image size. \
The name ends with six letters of the run's folder in `runs/`. A run with child runs is a search (`medgen tune`); the \
children are its trials.
- **Metrics**: `reconstruction/`, `generation/` and `privacy/` (`segmentation/` for models that predict masks) \
describe the finished model on the test split. Names that end in `_floor` or `_real`, and `pca_ssim`, are reference \
values. `train/` and `val/` are curves by epoch.
- **Images**: the chart view shows `samples` and `reconstructions` of all runs by epoch; the artifacts of a run hold \
`figures/`.
- **Lineage**: tags name the commit, the hash of the data and the versions of the software.
- **Which model to use**: see the model registry; `@champion` is the version in use, `@candidate` the one registered \
last.
"""


def hash_tags(text: str) -> dict[str, str]:
    """The tag that marks a description as generated."""
    return {HASH_TAG: hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_replaceable(text: str | None, tags: Mapping[str, str]) -> bool:
    """True if there is no description yet, or nobody has edited the generated one."""
    if not text and HASH_TAG not in tags:
        return True
    return hash_tags(text or "").items() <= tags.items()
