"""What MLflow's page says of an experiment, and whose words a description holds: ours, or a person's."""

import hashlib
from collections.abc import Mapping

NOTE = "mlflow.note.content"  # the tag that MLflow shows as the description of an experiment or a run
MARK = "medgen.about"  # hash of the description that we wrote last

EXPERIMENT = """\
Models of medical images, made by medgen: one run, one model.

- **Which run is which**: a run is named after what was changed since the run before it (`differs.in` and \
`differs.from` among its tags), a first one and one that is another thing altogether after its model and image size. \
Six letters of its folder in `runs/` end the name. A run that opens to others is a search (`medgen tune`), and those \
are its trials.
- **What came out**: `reconstruction/`, `generation/` and `privacy/` (of models that find masks `segmentation/`) judge \
the finished model on the test split; names that end in `_floor` or `_real`, and `pca_ssim`, are what to hold them \
against. `train/` and `val/` are curves by epoch.
- **Pictures**: the chart view shows `samples` and `reconstructions` of all runs by epoch; a run's artifacts hold \
`figures/`.
- **Where it comes from**: the tags name the commit, the data's hash and the versions of what was used.
- **What to use**: the model registry; `@champion` is the version in use, `@candidate` the one registered last.
"""


def marked(text: str) -> dict[str, str]:
    """The tag that says the description is ours."""
    return {MARK: hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_ours(text: str | None, tags: Mapping[str, str]) -> bool:
    """Whether a description may be replaced: there is none yet, or nobody has changed what we wrote."""
    if not text and MARK not in tags:
        return True
    return marked(text or "").items() <= tags.items()
