"""The model card reports/MODEL_CARD.md, in the format of Hugging Face: a YAML header, then Markdown.

https://huggingface.co/docs/hub/model-cards describes the header's keys.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ruamel.yaml import YAML

MODEL_CARD = "MODEL_CARD.md"
# key of metrics.json -> type and name in the card; types are those of Hugging Face's metrics where there is one
GENERATION_METRICS = {
    "reconstruction/ssim": ("ssim", "SSIM of reconstructions"),
    "reconstruction/psnr": ("psnr", "PSNR of reconstructions (dB)"),
    "generation/mmd_domain": ("mmd", "Squared MMD of samples by domain features"),
    "generation/kid_domain": ("kid", "KID of samples by domain features"),
    "generation/fd_domain": ("frechet_distance", "Fréchet distance of samples by domain features"),
    "generation/fd_inception": ("fid", "FID"),
    "generation/c2st_auc": ("roc_auc", "AUC of classifiers of samples and test images"),
    "generation/label_accuracy": ("accuracy", "Label accuracy of samples"),
    "privacy/copy_rate": ("copy_rate", "Share of samples that count as copies of train images"),
}
MASK_METRICS = {
    "segmentation/dice_foreground": ("dice", "Dice of masks"),
    "segmentation/iou_foreground": ("mean_iou", "IoU of masks"),
}


class ModelCard(NamedTuple):
    """The content of a model card."""

    name: str  # of the model
    dataset: str  # its name
    license: str  # identifier of Hugging Face, or "unknown"
    generative: bool  # False for a model that predicts masks
    tags: Sequence[str]
    sections: Mapping[str, Sequence[str]]  # sentences by heading
    training: Mapping[str, str]  # values by name


def render_card(card: ModelCard, metrics: Mapping[str, float]) -> bytes:
    """MODEL_CARD.md, the same bytes for the same values; `metrics` is the content of metrics.json."""
    listed = GENERATION_METRICS if card.generative else MASK_METRICS
    known = {key: names for key, names in listed.items() if key in metrics}
    task = "unconditional-image-generation" if card.generative else "image-segmentation"
    results = {
        "task": {"type": task},
        "dataset": {"name": card.dataset, "type": card.dataset, "split": "test"},
        "metrics": [{"type": kind, "name": name, "value": metrics[key]} for key, (kind, name) in known.items()],
    }
    header: dict[str, Any] = {
        "license": card.license,
        "library_name": "medgen",
        "pipeline_tag": task,
        "tags": list(card.tags),
        "metrics": [kind for kind, _ in known.values()],
        "model-index": [{"name": card.name, "results": [results]}],
    }
    lines = ["---", _yaml(header), "---", "", f"# {escaped(card.name)}"]
    for title, sentences in card.sections.items():
        lines += ["", f"## {title}", *(f"- {escaped(text)}" for text in sentences)]
    rows = {name: f"{metrics[key]:.4g}" for key, (_, name) in known.items()}
    for title, head, values in (("Metrics", "metric", rows), ("Training", "setting", card.training)):
        lines += ["", f"## {title}", f"| {head} | value |", "|---|---|"]
        lines += [f"| {escaped(name)} | {escaped(value)} |" for name, value in values.items()]
    return "\n".join([*lines, ""]).encode()


def escaped(text: str) -> str:
    """Text on one line, in which no character is Markdown or HTML, except for `code`."""
    parts = " ".join(text.split()).split("`")
    plain = [re.sub(r"([\\*_\[\]|<>#])", r"\\\1", part) if at % 2 == 0 else part for at, part in enumerate(parts)]
    return "`".join(plain)


def _yaml(header: Mapping[str, Any]) -> str:
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    buffer = io.StringIO()
    yaml.dump(dict(header), buffer)
    return buffer.getvalue().rstrip("\n")
