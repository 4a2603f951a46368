"""Labels: wrong ones drawn evenly, balanced accuracy with intervals by patient, the picture, the findings."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medgen.config import Evaluate, Features, Model, Preprocess, Prior, Project, Tracking
from medgen.data.store import open_store
from medgen.evaluation import evaluate, label_accuracy
from medgen.metrics.features import load_extractor
from medgen.metrics.latent import codebook_use
from medgen.models import GenerativeModel, build_model, bundle
from medgen.models.base import Latent
from medgen.priors import FITTED, load_prior, sample_images, save_prior
from medgen.priors.refiner import save_none
from medgen.reports.evaluation import findings
from medgen.training import extractor

OFF = Tracking(enabled=False)
SMALL = Evaluate(num_generated=12, batch_size=7, grid_images=6, seed=1)  # wrong labels of every class
GOOD = {
    "reconstruction/ssim": 0.9,
    "reconstruction/pca_ssim": 0.8,
    **{f"{group}/spectrum_ratio_5": 1.0 for group in ("generation", "reconstruction")},
    **{f"generation/mmd_domain{end}": value for end, value in (("", 0.0), ("_ci_low", -0.1), ("_ci_high", 0.1))},
    "generation/mmd_domain_floor": 0.0,
    "generation/ms_ssim_diversity": 0.3,
    "generation/ms_ssim_diversity_real": 0.3,
    "privacy/copy_rate": 0.01,
    "privacy/copy_rate_plausible": 0.05,
    "privacy/nearest_over_limit": 0.9,
    "privacy/held_out_limit": 0.5,
    "run/num_test": 300,
    "run/num_generated": 500,
    "latent/codebook_usage": 0.9,
    "generation/label_accuracy": 0.96,
    "generation/label_accuracy_ci_high": 0.98,
    "generation/label_accuracy_wrong": 0.95,
    "generation/label_accuracy_wrong_ci_high": 0.97,
    "generation/label_accuracy_real": 0.98,
    "generation/label_accuracy_real_ci_low": 0.93,
}


def judge(
    store_folder: Path, root: Path, sizes: Model, unrecognised: Sequence[str] = ()
) -> tuple[Project, dict[str, float], GenerativeModel]:
    """A project after an evaluation of a model of random weights; `unrecognised` is what extractor.json says."""
    project = Project(root)
    shutil.copytree(store_folder, project.dataset)
    store = open_store(project.dataset)
    torch.manual_seed(0)
    model = build_model(sizes, store.image_shape, len(store.classes)).eval()
    assert isinstance(model, GenerativeModel)
    info = bundle.BundleInfo(
        sizes, Preprocess(image_size=32), store.image_shape, store.classes, store.fingerprint, "run0", torch.__version__
    )
    bundle.save(project.model, model, info)
    train = store.split("train")
    labels = torch.from_numpy(train.labels.copy())
    with torch.no_grad():
        means = model.encode(torch.from_numpy(train.images.copy()).float() / 255, labels).mean
    prior = FITTED["gaussian"].fit(means, labels, len(store.classes), Prior())
    save_prior(project.prior, prior, bundle.digest(project.model))
    save_none(project.refiner, bundle.digest(project.model))
    extractor.run(project, features=Features(width=8, epochs=1))
    description = project.features / "extractor.json"
    stated = {"unrecognised": {"classes": list(unrecognised)}}
    description.write_text(json.dumps(json.loads(description.read_text()) | stated))
    return project, evaluate.run(project, evaluate=SMALL, tracking=OFF), model


def test_a_conditional_model_is_held_to_its_labels(tiny_store: Path, tmp_path: Path) -> None:
    """Counted again by hand: every image on its own, through the exported files."""
    project, metrics, model = judge(tiny_store, tmp_path, Model(name="cvae", base_channels=4, latent_channels=4))
    store = open_store(project.dataset)
    extractor, _ = load_extractor(project.features)
    test = store.split("test")

    def share(images: Sequence[Tensor], labels: Sequence[int], wanted: int) -> float:
        answers = [int(extractor.logits(image[None].float())[0].argmax()) for image in images]
        hits = [answer == label for answer, label in zip(answers, labels, strict=True) if label == wanted]
        return sum(hits) / len(hits)

    labels = test.labels.tolist()
    real = sum(share(torch.from_numpy(test.images / 255), labels, wanted) for wanted in range(3)) / 3
    assert metrics["generation/label_accuracy_real"] == pytest.approx(real, rel=1e-5)
    prior = load_prior(project.prior, bundle.digest(project.model))
    asked = evaluate.proportional_labels(prior.frequencies, 12)
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
    assert "Label accuracy of samples" in page and "with a wrong label" in page and page.count("<img") == 4
    with Image.open(project.figures / "wrong_labels.png") as picture:
        assert picture.height > 2 * 96


@pytest.mark.parametrize(
    ("unrecognised", "num_left"), [(("PNEUMONIA",), 2), (("PNEUMONIA", "NORMAL"), 0)], ids=["one", "all but one"]
)
def test_classes_that_the_extractor_does_not_recognise_are_named_and_left_out(
    unrecognised: tuple[str, ...], num_left: int, tiny_store: Path, tmp_path: Path
) -> None:
    sizes = Model(name="cvae", base_channels=4, latent_channels=4)
    project, metrics, _ = judge(tiny_store, tmp_path, sizes, unrecognised)
    assert f"does not recognise {', '.join(unrecognised)}" in (project.reports / "index.html").read_text()
    assert bool([key for key in metrics if "label_accuracy" in key]) == bool(num_left)
    if num_left:
        store, (extractor, _) = open_store(project.dataset), load_extractor(project.features)
        test, left = store.split("test"), [store.classes.index(name) for name in ("COVID19", "NORMAL")]
        labels = torch.from_numpy(test.labels.copy())
        correct = label_accuracy.answers(extractor, torch.from_numpy(test.images.copy()), labels, 7)
        expected = sum(float(correct[labels == label].double().mean()) for label in left) / 2
        assert metrics["generation/label_accuracy_real"] == pytest.approx(expected, rel=1e-5)


def test_a_codebook_is_judged_and_a_picture_of_an_earlier_model_goes(tiny_store: Path, tmp_path: Path) -> None:
    stale = tmp_path / "reports" / "figures" / "wrong_labels.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    sizes = Model(name="vqvae", base_channels=8, latent_channels=4, latent_size=8, num_codes=16)
    project, metrics, model = judge(tiny_store, tmp_path, sizes)
    images = torch.from_numpy(open_store(project.dataset).split("test").images.copy()).float() / 255
    with torch.no_grad():
        used = torch.cat([model.encode(image[None]).codes.flatten() for image in images])  # type: ignore[union-attr]
    assert metrics["latent/codebook_usage"] == pytest.approx(len(set(used.tolist())) / 16)
    expected = codebook_use(used, 16)["codebook_perplexity"]
    assert metrics["latent/codebook_perplexity"] == pytest.approx(expected, rel=1e-5)
    page = (project.reports / "index.html").read_text()
    assert "Codebook usage" in page and "Codebook perplexity" in page
    assert "64 latent numbers" in page, "an 8x8 grid of codes"
    assert "latent/active_units" not in metrics and "medgen generate" in page
    assert not stale.exists() and "generation/label_accuracy" not in metrics


class Painter(GenerativeModel):
    """Paints as bright as the label says, and remembers the labels it was shown."""

    conditional = True
    latent_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shown: list[int] = []

    def encode(self, image: Tensor, label: Tensor | None = None) -> Latent:
        assert label is not None
        self.shown += label.tolist()
        return Latent(value=image[:, 0, 0, :1], mean=image[:, 0, 0, :1])

    def decode(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        return (label / 10)[:, None, None, None].expand(-1, 1, 4, 4)


class Reader(nn.Module):
    """Reads the label off the brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def logits(self, image: Tensor) -> Tensor:
        return -(image.mean(dim=(1, 2, 3))[:, None] - torch.arange(5) / 10).abs()


class Labelled:
    """As much of a split as is looked at."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels)
        self.images = np.full((len(labels), 1, 4, 4), 255, dtype=np.uint8) * (self.labels == 0)[:, None, None, None]


def test_images_are_encoded_with_their_label_and_decoded_with_another() -> None:
    """Class 3 has no training image, and one picture has no label: neither is asked for."""
    model, test = Painter(), Labelled([0, 1, 2, 4, -1, 3] * 30)
    swapped = label_accuracy.swap_labels(model, test, torch.tensor([1, 1, 1, 0, 1]).bool(), 7, seed=3)  # type: ignore[arg-type]
    again = label_accuracy.swap_labels(model, test, torch.tensor([1, 1, 1, 0, 1]).bool(), 7, seed=3)  # type: ignore[arg-type]
    assert swapped is not None and again is not None and torch.equal(again.given, swapped.given)
    assert model.shown[: len(swapped.true)] == swapped.true.tolist() == [0, 1, 2, 4, 3] * 30
    assert (swapped.given != swapped.true).all() and set(swapped.given.tolist()) == {0, 1, 2, 4}
    assert torch.equal(swapped.decoded[:, 0, 0, 0], swapped.given / 10)
    assert swapped.rows.tolist() == [row for row in range(180) if row % 6 != 4]

    def share(images: Tensor, labels: Tensor) -> float:
        return float(label_accuracy.answers(Reader(), images, labels, 7).double().mean())  # type: ignore[arg-type]

    assert share(swapped.decoded, swapped.given) == 1.0
    assert share(swapped.decoded, swapped.true) == 0.0
    # black but for class 0, which is white and so read as class 4: nothing is right, and with 0 for all, black is
    images = torch.from_numpy(test.images)
    assert share(images, torch.from_numpy(test.labels)) == 0.0
    assert share(images, torch.zeros(180, dtype=torch.int64)) == pytest.approx(5 / 6)


def test_balanced_accuracy_does_not_depend_on_the_class_mix() -> None:
    correct = torch.tensor([True, True, True, False] + [True] + [False] * 4)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1])
    found = label_accuracy.balanced_accuracy(correct, labels, [0, 1])
    more = label_accuracy.balanced_accuracy(torch.cat([correct, correct[:4]]), torch.cat([labels, labels[:4]]), [0, 1])
    assert found.value == pytest.approx(more.value) == pytest.approx(0.5)
    assert label_accuracy.balanced_accuracy(correct, labels, [1]).value == pytest.approx(0.25)


def test_when_all_answers_are_right_the_interval_is_not_empty() -> None:
    found = label_accuracy.balanced_accuracy(torch.ones(30).bool(), torch.arange(30) % 3, [0, 1, 2])
    assert found.value == 1.0
    assert 0.85 < found.low < 0.95


def perfect_model(seed: int, num_test: int = 95, num_samples: int = 500) -> dict[str, float]:
    """Metrics of a model whose samples are like real images: three classes, known at 0.3, 0.97 and 0.99.

    The test set has another class mix than the samples. One patient's three images mostly get the same answer.
    """
    random = np.random.default_rng(seed)
    accuracy = np.array([0.3, 0.97, 0.99])
    patients = np.arange(num_test) // 3
    labels = random.choice(3, num_test, p=[0.38, 0.36, 0.26])[patients]
    alone = random.random(num_test) < 0.3  # images whose answer is not their patient's
    draws = np.where(alone, random.random(num_test), random.random(num_test)[patients])
    asked = np.arange(num_samples) % 3
    sets = {
        "_real": (draws < accuracy[labels], labels, patients.tolist()),
        "": (random.random(num_samples) < accuracy[asked], asked, None),
    }
    metrics = {}
    for of, (correct, of_class, groups) in sets.items():
        found = label_accuracy.balanced_accuracy(
            torch.from_numpy(correct), torch.from_numpy(of_class), [0, 1, 2], groups
        )
        for end, value in zip(("", "_ci_low", "_ci_high"), found, strict=True):
            metrics[f"generation/label_accuracy{of}{end}"] = value
    return metrics


def test_a_perfect_model_is_seldom_said_to_blur_the_classes() -> None:
    blurred = ["classes are blurred" in " ".join(findings(GOOD | perfect_model(seed))) for seed in range(300)]
    assert np.mean(blurred) < 0.05


def test_a_model_that_often_shows_another_class_is_said_to_blur_them() -> None:
    worse = {f"generation/label_accuracy{end}": 0.4 for end in ("", "_ci_low")}
    worse["generation/label_accuracy_ci_high"] = 0.44
    found = ["classes are blurred" in " ".join(findings(GOOD | perfect_model(seed) | worse)) for seed in range(100)]
    assert np.mean(found) > 0.9


@pytest.mark.parametrize(("labels", "known"), [([-1, -1], [1, 1]), ([0, 0], [1, 0]), ([0, 1], [0, 0])])
def test_without_another_class_nothing_is_swapped(labels: list[int], known: list[int]) -> None:
    found = label_accuracy.swap_labels(Painter(), Labelled(labels), torch.tensor(known).bool(), 2, seed=0)  # type: ignore[arg-type]
    assert found is None


def test_at_most_a_thousand_images_are_swapped_spread_over_the_split() -> None:
    test = Labelled([0] * 1500 + [1] * 500)
    swapped = label_accuracy.swap_labels(Painter(), test, torch.tensor([True, True]), 512, seed=0)  # type: ignore[arg-type]
    assert swapped is not None
    assert torch.bincount(swapped.true).tolist() == [750, 250]


def test_wrong_labels_are_even_over_the_other_classes() -> None:
    true = torch.arange(4).repeat(3000)
    given = label_accuracy.other_labels(true, torch.tensor([1, 1, 1, 1]).bool(), torch.Generator().manual_seed(0))
    counts = torch.bincount(4 * true + given, minlength=16).view(4, 4)
    assert (counts.diagonal() == 0).all()
    # 1000 each with a standard deviation of 26: four of them
    assert ((counts + 1000 * torch.eye(4)) - 1000).abs().max() < 104


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"generation/label_accuracy": 0.8, "generation/label_accuracy_ci_high": 0.84}, ["less often"]),
        ({"generation/label_accuracy": 0.8, "generation/label_accuracy_ci_high": 0.99}, []),
        ({"generation/label_accuracy_wrong": 0.3, "generation/label_accuracy_wrong_ci_high": 0.35}, ["still holds"]),
        ({"latent/codebook_usage": 0.2}, ["20%"]),
    ],
    ids=["good", "blurred", "too few to tell", "labels ignored", "codes unused"],
)
def test_findings_say_when_labels_or_codes_are_not_used(change: dict[str, float], words: list[str]) -> None:
    found = [text for text in findings(GOOD | change) if text not in findings(GOOD)]
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
