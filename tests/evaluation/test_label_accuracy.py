"""Label accuracy: wrong labels are uniform, balanced accuracy has intervals by patient; the figure."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medgen.config import Evaluate, Model, Project, Tracking
from medgen.data.store import open_store
from medgen.evaluation import evaluate, label_accuracy
from medgen.evaluation.context import proportional_labels
from medgen.metrics.features import load_extractor
from medgen.metrics.latent import codebook_use
from medgen.models import GenerativeModel, bundle
from medgen.models.base import Latent
from medgen.priors import load_prior, sample_images

Evaluated = Callable[..., tuple[Project, dict[str, float], GenerativeModel]]

OFF = Tracking(enabled=False)
SMALL = Evaluate(num_generated=12, batch_size=7, grid_images=6, seed=1)  # this seed draws wrong labels of every class


CVAE = Model(name="cvae", base_channels=4, latent_channels=4)


@pytest.fixture
def evaluated(tiny_project: Project, trained: Callable[..., Project]) -> Evaluated:
    """Function that evaluates a model of random weights."""

    def run(sizes: Model, unrecognised: Sequence[str] = ()) -> tuple[Project, dict[str, float], GenerativeModel]:
        trained(tiny_project, sizes, prior="gaussian", unrecognised=unrecognised)
        metrics = evaluate.run(tiny_project, evaluate=SMALL, tracking=OFF)
        return tiny_project, metrics, bundle.load_generative(tiny_project.model)[0]

    return run


def test_label_accuracy_of_a_conditional_model(evaluated: Evaluated) -> None:
    """Computed again image by image from the saved files."""
    project, metrics, model = evaluated(CVAE)
    store = open_store(project.dataset)
    extractor, _ = load_extractor(project.features)
    test = store.split("test")

    def share(images: Sequence[Tensor], labels: Sequence[int], wanted: int) -> float:
        predicted = [int(extractor.logits(image[None].float())[0].argmax()) for image in images]
        correct = [one == label for one, label in zip(predicted, labels, strict=True) if label == wanted]
        return sum(correct) / len(correct)

    labels = test.labels.tolist()
    real = sum(share(torch.from_numpy(test.images[:] / 255), labels, wanted) for wanted in range(3)) / 3
    assert metrics["generation/label_accuracy_real"] == pytest.approx(real, rel=1e-5)
    prior = load_prior(project.prior, bundle.digest(project.model))
    asked = proportional_labels(prior.frequencies, 12)
    samples = (255 * sample_images(prior, model, 12, asked, SMALL.seed, 7)).round() / 255
    agreed = sum(share(samples, asked.tolist(), wanted) for wanted in range(3)) / 3
    assert metrics["generation/label_accuracy"] == pytest.approx(agreed, rel=1e-5)
    for of in ("", "_real", "_wrong"):
        value = metrics[f"generation/label_accuracy{of}"]
        assert (
            metrics[f"generation/label_accuracy{of}_ci_low"] < value < metrics[f"generation/label_accuracy{of}_ci_high"]
        )
    assert not [key for key in metrics if "label_agreement" in key]
    page = (project.reports / "index.html").read_text()
    assert "Label accuracy of samples" in page and "with a wrong label" in page and page.count("<img") == 6
    with Image.open(project.figures / "wrong_labels.png") as image:
        assert image.height > 2 * 96


@pytest.mark.parametrize(
    ("unrecognised", "num_left"), [(("PNEUMONIA",), 2), (("PNEUMONIA", "NORMAL"), 0)], ids=["one", "all but one"]
)
def test_unrecognised_classes_are_reported_and_left_out(
    unrecognised: tuple[str, ...], num_left: int, evaluated: Evaluated
) -> None:
    project, metrics, _ = evaluated(CVAE, unrecognised)
    assert f"does not recognise {', '.join(unrecognised)}" in (project.reports / "index.html").read_text()
    assert bool([key for key in metrics if "label_accuracy" in key]) == bool(num_left)
    if num_left:
        store, (extractor, _) = open_store(project.dataset), load_extractor(project.features)
        test, left = store.split("test"), [store.classes.index(name) for name in ("COVID19", "NORMAL")]
        labels = torch.from_numpy(test.labels.copy())
        correct = label_accuracy.is_correct(extractor, torch.from_numpy(test.images[:]), labels, 7)
        expected = sum(float(correct[labels == label].double().mean()) for label in left) / 2
        assert metrics["generation/label_accuracy_real"] == pytest.approx(expected, rel=1e-5)


def test_codebook_metrics_and_deletion_of_an_earlier_models_figure(evaluated: Evaluated, tmp_path: Path) -> None:
    stale = tmp_path / "reports" / "figures" / "wrong_labels.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    sizes = Model(name="vqvae", base_channels=8, latent_channels=4, latent_size=8, num_embeddings=16)
    project, metrics, model = evaluated(sizes)
    images = torch.from_numpy(open_store(project.dataset).split("test").images[:]).float() / 255
    with torch.no_grad():
        used = torch.cat([model.encode(image[None]).codes.flatten() for image in images])  # type: ignore[union-attr]
    assert metrics["latent/codebook_usage"] == pytest.approx(len(set(used.tolist())) / 16)
    expected = codebook_use(used, 16)["codebook_perplexity"]
    assert metrics["latent/codebook_perplexity"] == pytest.approx(expected, rel=1e-5)
    page = (project.reports / "index.html").read_text()
    assert "Codebook usage" in page and "Codebook perplexity" in page
    assert "64 latent dimensions" in page, "an 8x8 grid of codes"
    assert "latent/active_units" not in metrics and "medgen generate" in page
    assert not stale.exists() and "generation/label_accuracy" not in metrics


class Painter(GenerativeModel):
    """Decodes a brightness proportional to the label, and records the labels it encodes."""

    conditional = True
    latent_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shown: list[int] = []

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Any = None) -> Latent:
        assert label is not None
        self.shown += label.tolist()
        return Latent(value=image[:, 0, 0, :1], mean=image[:, 0, 0, :1])

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Any = None) -> Tensor:
        assert label is not None
        return (label / 10)[:, None, None, None].expand(-1, 1, 4, 4)


class Reader(nn.Module):
    """Recognises the label by the brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def logits(self, image: Tensor) -> Tensor:
        return -(image.mean(dim=(1, 2, 3))[:, None] - torch.arange(5) / 10).abs()


class Labelled:
    """The parts of a split that the tested functions use."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels)
        self.images = np.full((len(labels), 1, 4, 4), 255, dtype=np.uint8) * (self.labels == 0)[:, None, None, None]


def test_images_are_encoded_with_their_label_and_decoded_with_a_wrong_one() -> None:
    """Class 3 has no train image, and one image has no label: neither is used."""
    model, test = Painter(), Labelled([0, 1, 2, 4, -1, 3] * 30)
    swap = label_accuracy.decode_with_wrong_labels(model, test, torch.tensor([1, 1, 1, 0, 1]).bool(), 7, seed=3)  # type: ignore[arg-type]
    again = label_accuracy.decode_with_wrong_labels(model, test, torch.tensor([1, 1, 1, 0, 1]).bool(), 7, seed=3)  # type: ignore[arg-type]
    assert swap is not None and again is not None and torch.equal(again.given, swap.given)
    assert model.shown[: len(swap.true)] == swap.true.tolist() == [0, 1, 2, 4, 3] * 30
    assert (swap.given != swap.true).all() and set(swap.given.tolist()) == {0, 1, 2, 4}
    assert torch.equal(swap.decoded[:, 0, 0, 0], swap.given / 10)
    assert swap.rows.tolist() == [row for row in range(180) if row % 6 != 4]

    def share(images: Tensor, labels: Tensor) -> float:
        return float(label_accuracy.is_correct(Reader(), images, labels, 7).double().mean())  # type: ignore[arg-type]

    assert share(swap.decoded, swap.given) == 1.0
    assert share(swap.decoded, swap.true) == 0.0
    # class 0 is white and recognised as class 4, the others are black and recognised as class 0
    images = torch.from_numpy(test.images)
    assert share(images, torch.from_numpy(test.labels)) == 0.0
    assert share(images, torch.zeros(180, dtype=torch.int64)) == pytest.approx(5 / 6)


def test_balanced_accuracy_does_not_depend_on_class_proportions() -> None:
    correct = torch.tensor([True, True, True, False] + [True] + [False] * 4)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1])
    found = label_accuracy.balanced_accuracy(correct, labels, [0, 1])
    more = label_accuracy.balanced_accuracy(torch.cat([correct, correct[:4]]), torch.cat([labels, labels[:4]]), [0, 1])
    assert found.value == pytest.approx(more.value) == pytest.approx(0.5)
    assert label_accuracy.balanced_accuracy(correct, labels, [1]).value == pytest.approx(0.25)


def test_the_interval_is_not_empty_if_all_answers_are_correct() -> None:
    found = label_accuracy.balanced_accuracy(torch.ones(30).bool(), torch.arange(30) % 3, [0, 1, 2])
    assert found.value == 1.0
    assert 0.85 < found.low < 0.95


@pytest.mark.parametrize(("labels", "known"), [([-1, -1], [1, 1]), ([0, 0], [1, 0]), ([0, 1], [0, 0])])
def test_there_is_no_swap_without_another_class(labels: list[int], known: list[int]) -> None:
    found = label_accuracy.decode_with_wrong_labels(Painter(), Labelled(labels), torch.tensor(known).bool(), 2, seed=0)  # type: ignore[arg-type]
    assert found is None


def test_at_most_1000_images_spread_over_the_split_are_used() -> None:
    test = Labelled([0] * 1500 + [1] * 500)
    swap = label_accuracy.decode_with_wrong_labels(Painter(), test, torch.tensor([True, True]), 512, seed=0)  # type: ignore[arg-type]
    assert swap is not None
    assert torch.bincount(swap.true).tolist() == [750, 250]


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    true = torch.arange(4).repeat(3000)
    given = label_accuracy.draw_wrong_labels(true, torch.tensor([1, 1, 1, 1]).bool(), torch.Generator().manual_seed(0))
    counts = torch.bincount(4 * true + given, minlength=16).view(4, 4)
    assert (counts.diagonal() == 0).all()
    # expected 1000 each; four standard deviations of 26
    assert ((counts + 1000 * torch.eye(4)) - 1000).abs().max() < 104
