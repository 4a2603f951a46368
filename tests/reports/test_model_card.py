"""MODEL_CARD.md: a header that YAML and Hugging Face can read, and text without markup from outside."""

import pytest
from ruamel.yaml import YAML

from medgen.reports.model_card import ModelCard, render_card

METRICS = {"reconstruction/ssim": 0.9, "segmentation/dice_foreground": 0.8, "other": 1.0}


def card(generative: bool) -> ModelCard:
    sections = {"Data": ["classes <b>: yes, 正常 | `code_x`\nnext"]}
    return ModelCard("vae: x", "a: b", "unknown", generative, ["medical"], sections, {"train.seed": "1"})


@pytest.mark.parametrize(
    ("generative", "task", "metric"),
    [(True, "unconditional-image-generation", ("ssim", 0.9)), (False, "image-segmentation", ("dice", 0.8))],
)
def test_the_header_has_task_data_and_metrics(generative: bool, task: str, metric: tuple[str, float]) -> None:
    header = YAML(typ="safe").load(render_card(card(generative), METRICS).decode().split("---\n")[1])
    assert (header["pipeline_tag"], header["license"], header["library_name"]) == (task, "unknown", "medgen")
    (results,) = header["model-index"][0]["results"]
    assert results["dataset"] == {"name": "a: b", "type": "a: b", "split": "test"}
    assert [(each["type"], each["value"]) for each in results["metrics"]] == [metric]


def test_text_from_outside_is_no_markup() -> None:
    text = render_card(card(True), METRICS).decode()
    assert "- classes \\<b\\>: yes, 正常 \\| `code_x` next\n" in text
    assert "| train.seed | 1 |" in text
