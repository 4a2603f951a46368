"""Labels held to their word: wrong ones drawn evenly, agreement counted, the pair of pictures that shows it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medgen import bundle, evaluate, features, label_report
from medgen.config import Evaluate, Features, Model, Preprocess, Prior, Project, Tracking
from medgen.data.store import open_store
from medgen.evaluation_report import findings
from medgen.metrics.features import load_extractor
from medgen.metrics.latent import codebook_use
from medgen.models import GenerativeModel, build_model
from medgen.priors import FITTED, load_prior, sample_images, save_prior
from medgen.types import Latent

OFF = Tracking(enabled=False)
SMALL = Evaluate(num_generated=12, batch_size=7, grid_images=6)


def judge(store_folder: Path, root: Path, sizes: Model) -> tuple[Project, dict[str, float], GenerativeModel]:
    """A project after an evaluation of a model of random weights."""
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
    features.run(project, features=Features(width=8, epochs=1))
    return project, evaluate.run(project, evaluate=SMALL, tracking=OFF), model


def test_a_conditional_model_is_held_to_its_labels(tiny_store: Path, tmp_path: Path) -> None:
    """Counted again by hand: every image on its own, through the exported files."""
    project, metrics, model = judge(tiny_store, tmp_path, Model(name="cvae", base_channels=4, latent_channels=4))
    store = open_store(project.dataset)
    extractor, _ = load_extractor(project.features)
    test = store.split("test")

    def seen(image: Tensor) -> int:
        return int(extractor.logits(image[None].float())[0].argmax())

    rows = range(len(test.labels))
    real = sum(seen(torch.from_numpy(test.images[i] / 255)) == test.labels[i] for i in rows) / len(rows)
    assert metrics["generation/label_agreement_real"] == pytest.approx(real, rel=1e-5)
    prior = load_prior(project.prior, bundle.digest(project.model))
    asked = evaluate.proportional_labels(prior.frequencies, 12)
    samples = sample_images(prior, model, 12, asked, SMALL.seed, 7)
    agreed = sum(seen(image) == label for image, label in zip(samples, asked.tolist(), strict=True)) / 12
    assert metrics["generation/label_agreement"] == pytest.approx(agreed, rel=1e-5)
    assert 0 <= metrics["generation/label_agreement_wrong"] <= 1
    page = (project.reports / "index.html").read_text()
    assert "Label agreement of samples" in page and "with a wrong label" in page and page.count("<img") == 4
    with Image.open(project.figures / "wrong_labels.png") as picture:
        assert picture.height > 2 * 96


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
    assert not stale.exists() and "generation/label_agreement" not in metrics


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
    swapped = label_report.swap_labels(model, test, torch.tensor([1, 1, 1, 0, 1]).bool(), 7, seed=3)  # type: ignore[arg-type]
    again = label_report.swap_labels(model, test, torch.tensor([1, 1, 1, 0, 1]).bool(), 7, seed=3)  # type: ignore[arg-type]
    assert swapped is not None and again is not None and torch.equal(again.given, swapped.given)
    assert model.shown[: len(swapped.true)] == swapped.true.tolist() == [0, 1, 2, 4, 3] * 30
    assert (swapped.given != swapped.true).all() and set(swapped.given.tolist()) == {0, 1, 2, 4}
    assert torch.equal(swapped.decoded[:, 0, 0, 0], swapped.given / 10)
    assert label_report.agreement(Reader(), swapped.decoded, swapped.given, 7) == 1.0  # type: ignore[arg-type]
    assert label_report.agreement(Reader(), swapped.decoded, swapped.true, 7) == 0.0  # type: ignore[arg-type]
    labels = torch.from_numpy(test.labels)
    # black but for class 0, which is white and so read as class 4: nothing is right, and with 0 for all, black is
    assert label_report.agreement(Reader(), torch.from_numpy(test.images), labels, 7) == 0.0  # type: ignore[arg-type]
    zeros = torch.where(labels == -1, -1, 0)
    assert label_report.agreement(Reader(), torch.from_numpy(test.images), zeros, 7) == 0.8  # type: ignore[arg-type]


@pytest.mark.parametrize(("labels", "known"), [([-1, -1], [1, 1]), ([0, 0], [1, 0]), ([0, 1], [0, 0])])
def test_without_another_class_nothing_is_swapped(labels: list[int], known: list[int]) -> None:
    found = label_report.swap_labels(Painter(), Labelled(labels), torch.tensor(known).bool(), 2, seed=0)  # type: ignore[arg-type]
    assert found is None


def test_at_most_a_thousand_images_are_swapped_spread_over_the_split() -> None:
    test = Labelled([0] * 1500 + [1] * 500)
    swapped = label_report.swap_labels(Painter(), test, torch.tensor([True, True]), 512, seed=0)  # type: ignore[arg-type]
    assert swapped is not None
    assert torch.bincount(swapped.true).tolist() == [750, 250]


def test_wrong_labels_are_even_over_the_other_classes() -> None:
    true = torch.arange(4).repeat(3000)
    given = label_report.other_labels(true, torch.tensor([1, 1, 1, 1]).bool(), torch.Generator().manual_seed(0))
    counts = torch.bincount(4 * true + given, minlength=16).view(4, 4)
    assert (counts.diagonal() == 0).all()
    # 1000 each with a standard deviation of 26: four of them
    assert ((counts + 1000 * torch.eye(4)) - 1000).abs().max() < 104


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"generation/label_agreement": 0.8}, ["less often"]),
        ({"generation/label_agreement_wrong": 0.3}, ["still says"]),
        ({"latent/codebook_usage": 0.2}, ["20%"]),
    ],
)
def test_findings_say_when_labels_or_codes_are_not_used(change: dict[str, float], words: list[str]) -> None:
    good = {
        "reconstruction/ssim": 0.9,
        "reconstruction/pca_ssim": 0.8,
        "generation/kid_domain_ci_low": 0.0,
        "generation/kid_domain_floor": 0.1,
        "generation/ms_ssim_diversity": 0.3,
        "generation/ms_ssim_diversity_real": 0.3,
        "privacy/copy_rate": 0.01,
        "privacy/copy_rate_plausible": 0.05,
        "privacy/nearest_over_limit": 0.9,
        "privacy/held_out_limit": 0.5,
        "run/num_test": 300,
        "generation/label_agreement": 0.96,
        "generation/label_agreement_wrong": 0.95,
        "generation/label_agreement_real": 0.98,
        "latent/codebook_usage": 0.9,
    }
    found = findings(good | change)[3:]
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
