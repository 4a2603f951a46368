"""Inception Score against its formula, and loading of the network from an untrusted file."""

import io
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medgen.errors import UserError
from medgen.metrics.inception import NUM_CLASSES, NUM_FEATURES, Inception, inception_score, load_inception, to_uint8_rgb


class Small(nn.Module):
    """Replaces the network: 8 features and 5 logits of the bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 6 * 6, 8)
        self.batches: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append((images.dtype, tuple(images.shape)))
        features = self.layer(images.flatten(1).float() / 255)
        return features, features[:, :5]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_inception_score(parts: list[Tensor]) -> float:
    scores = []
    for part in parts:
        each = [torch.exp(row) / torch.exp(row).sum() for row in part.double()]
        whole = sum(each) / len(each)
        divergences = [sum(p * torch.log(p / q) for p, q in zip(one, whole, strict=True)) for one in each]
        scores.append(torch.exp(sum(divergences) / len(divergences)))
    return float(sum(scores) / len(scores))


def test_inception_score_agrees_with_the_formula() -> None:
    logits = 3 * normal(40, 6)
    torch.manual_seed(7)
    parts = list(logits[torch.randperm(40)].chunk(10))
    assert inception_score(logits, seed=7) == pytest.approx(slow_inception_score(parts), rel=1e-9)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        (normal(1, 6).expand(30, 6), 1.0),
        (50 * torch.eye(4)[torch.zeros(40, dtype=torch.long)], 1.0),
        (50 * torch.eye(40), 4.0),  # 40 images of 40 classes in 10 parts of 4
        (normal(3, 6), 1.0),  # each part is one image
    ],
    ids=["equal", "one certain class", "a class each", "fewer images than splits"],
)
def test_inception_score_of_known_sets(logits: Tensor, expected: float) -> None:
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)


def test_inception_score_changes_no_random_state_and_gives_no_warnings() -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = inception_score(normal(50, 6), seed=1)
    assert inception_score(normal(50, 6), seed=1) == first != inception_score(normal(50, 6), seed=2)
    assert torch.get_rng_state().equal(state)


def test_images_are_rounded_to_the_bytes_of_a_png() -> None:
    grey = torch.tensor([-0.5, 0.0, 0.4999, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 3)
    assert to_uint8_rgb(grey)[0, 0].flatten().tolist() == [0, 0, 127, 128, 255, 255]
    assert to_uint8_rgb(grey).shape == (1, 3, 2, 3)
    colour = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    assert to_uint8_rgb(colour).equal(colour)


def test_all_images_are_processed_in_small_batches() -> None:
    network = Small()
    output = Inception(network)(torch.rand(37, 1, 6, 6))
    assert network.batches == [(torch.uint8, (n, 3, 6, 6)) for n in (16, 16, 5)]
    assert (output.features.shape, output.logits.shape) == ((37, 8), (37, 5))
    assert not output.features.requires_grad


def test_the_network_has_the_weights_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = ["2048", "logits_unbiased"]
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        random = FeatureExtractorInceptionV3("random", layers, empty)
    torch.save(random.state_dict(), tmp_path / "weights.pth")
    images = (torch.rand(2, 1, 20, 20) * 255).to(torch.uint8)
    output = load_inception(tmp_path / "weights.pth")(images)
    features, logits = random(images.expand(-1, 3, -1, -1))
    assert output.features.equal(features)
    assert output.logits.equal(logits)
    assert (features.shape, logits.shape) == ((2, NUM_FEATURES), (2, NUM_CLASSES))


class Payload:
    """Makes a folder when Python unpickles it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("kind", ["pickle", "torch file", "torch file of a pickle", "other weights", "text", "absent"])
def test_any_other_file_is_an_error_and_no_code_in_it_runs(kind: str, tmp_path: Path) -> None:
    path, place = tmp_path / "weights.pth", tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(place)))
    elif kind == "torch file":
        torch.save([1, 2], path)
    elif kind == "torch file of a pickle":
        torch.save({"fc.bias": Payload(place)}, path)
    elif kind == "other weights":
        torch.save({"fc.bias": torch.zeros(10)}, path)
    elif kind == "text":
        path.write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"weights\.pth: not readable \(.*medgen weights fetch inception"):
        load_inception(path)
    assert not place.exists()
