"""The description and the saved view of an MLflow experiment, and tags that tell generated texts from edited ones."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from medgen.metrics.summary import SUMMARY

NOTE_TAG = "mlflow.note.content"  # MLflow shows this tag as the description of an experiment or a run
HASH_TAG = "medgen.about"  # hash of the description that medgen wrote last

EXPERIMENT_DESCRIPTION = """\
Models of medical images, trained by medgen. Each run trains one model.

- **Run names**: a run is named after the parameters that differ from the run before it (tags `differs.in` and \
`differs.from`). The first run, and a run that differs in many parameters, is named after its model and image size. \
The name ends with six letters of the run's folder in `runs/`. A run with child runs is a search (`medgen tune`); the \
children are its trials.
- **Metrics**: `reconstruction/`, `generation/` and `privacy/` (`segmentation/` for models that predict masks) \
describe the finished model on the test split; a run's description compares them with reference values, and its \
artifact `reports/metrics.json` also holds their intervals. `train/` and `val/` are curves by epoch.
- **Table and images**: *Views* → *Summary and images* shows the main metrics as columns, and in the chart view \
`samples` and `reconstructions` of all runs by epoch; step 0 is the finished model. The artifacts of a run hold \
`figures/`.
- **Lineage**: tags name the commit, the hash of the data and the versions of the software.
- **Which model to use**: see the model registry; `@champion` is the version in use, `@candidate` the one registered \
last.
"""

VIEW = "medgen"  # ID of the saved view: viewStateShareKey in the address of MLflow's page
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"  # MLflow lists the experiment's tags of this form under *Views*
VIEW_HASH_TAG = "medgen.view"  # hash of the view that medgen wrote last


def _saved_view() -> str:
    """A saved view as MLflow's page stores it: the main metrics as columns, and charts of images by step."""

    def chart(images: str) -> dict[str, Any]:
        return {
            **{"type": "IMAGE", "uuid": images, "metricSectionId": "images", "deleted": False, "isGenerated": False},
            **{"imageKeys": [images], "step": 0, "runsCountToCompare": 10, "showRunParams": False},
        }

    section = {"uuid": "images", "name": "Images", "display": True, "columns": 1, "cardHeight": 380}
    state = {
        "selectedColumns": [f"metrics.`{name}`" for name in SUMMARY],
        "compareRunCharts": [chart("samples"), chart("reconstructions")],
        "compareRunSections": [section | {"isReordered": False, "deleted": False, "isGenerated": False}],
        "isAccordionReordered": True,
    }
    return json.dumps({"name": "Summary and images", "createdAt": 0, "state": json.dumps(state)})


EXPERIMENT_VIEW = _saved_view()


def escape(text: str) -> str:
    """Text from users on one line that Markdown and HTML show literally."""
    return re.sub(r"[^\w .-]|\b_|_\b", lambda found: f"&#{ord(found[0])};", text)


def hash_tags(text: str, hash_tag: str = HASH_TAG) -> dict[str, str]:
    """The tag that marks a text as generated."""
    return {hash_tag: hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_replaceable(text: str | None, tags: Mapping[str, str], hash_tag: str = HASH_TAG) -> bool:
    """True if there is no such text yet, or nobody has edited or deleted the generated one."""
    if not text and hash_tag not in tags:
        return True
    return hash_tags(text or "", hash_tag).items() <= tags.items()
