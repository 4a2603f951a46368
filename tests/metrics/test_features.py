"""The domain extractor: any image size, no dependence on the batch, checked files."""

import hashlib
import json
from pathlib import Path

import cv2
import pytest
import torch

from medgen.errors import UserError
from medgen.metrics.degradations import DEGRADATIONS
from medgen.metrics.features import DomainExtractor, ExtractorSizes, cosine_basis, load_extractor, save_extractor


def extractor(image_size: int = 32, channels: int = 1, width: int = 8) -> DomainExtractor:
    torch.manual_seed(0)
    return DomainExtractor(ExtractorSizes(channels, image_size, width, 3)).eval()


@pytest.mark.parametrize("trained_at", [32, 64, 512])
@pytest.mark.parametrize(("size", "channels"), [(32, 1), (33, 3), (100, 1), (128, 3)])
@torch.no_grad()
def test_every_size_gives_128_features(trained_at: int, size: int, channels: int) -> None:
    network = extractor(trained_at, channels)
    image = torch.rand(2, channels, size, size)
    assert network(image).shape == (2, 128)
    assert network.logits(image).shape == (2, 3)
    assert network.quality_logits(image).shape == (2, 1 + len(DEGRADATIONS))


@torch.no_grad()
def test_features_do_not_depend_on_the_batch() -> None:
    images = torch.rand(5, 1, 32, 32)
    network = extractor()
    torch.testing.assert_close(network(images)[3:4], network(images[3:4]))


@torch.no_grad()
def test_features_are_standardised_over_the_given_images() -> None:
    network = extractor()
    batches = [torch.rand(count, 1, 32, 32) * torch.rand(count, 1, 1, 1) for count in (40, 7)]
    network.standardise(batches, [batch + 1e-3 for batch in batches])
    features = network(torch.cat(batches)).double()
    torch.testing.assert_close(features.mean(0), torch.zeros(128, dtype=torch.float64), atol=1e-4, rtol=0)
    assert features.std(0, correction=0).max() < 1.001
    assert features.std(0, correction=0).median() > 0.5


@torch.no_grad()
def test_degradations_shift_features_by_a_limited_amount() -> None:
    network = extractor()
    images = 0.5 + 0.01 * torch.rand(40, 1, 32, 32)
    far = torch.rand(40, 1, 32, 32)
    network.standardise([images], [far])
    assert network(far).square().mean(0).sqrt().max() < 2.001


def test_the_cosine_transform_agrees_with_opencv() -> None:
    block = torch.rand(8, 8)
    found = torch.einsum("kij,ij->k", cosine_basis(8)[:, 0], block).reshape(8, 8)
    torch.testing.assert_close(found, torch.from_numpy(cv2.dct(block.numpy())))


@torch.no_grad()
def test_a_saved_extractor_loads_unchanged(tmp_path: Path) -> None:
    network = extractor(channels=3)
    network.standardise([torch.rand(8, 3, 32, 32)], [torch.rand(8, 3, 32, 32)])
    digest = save_extractor(tmp_path / "features", network, {"task": "classes"})
    again, found = load_extractor(tmp_path / "features")
    image = torch.rand(2, 3, 40, 40)
    assert again(image).equal(network(image))
    assert not again.training
    weights = (tmp_path / "features" / "extractor.safetensors").read_bytes()
    assert digest == found == hashlib.sha256(weights).hexdigest()
    assert json.loads((tmp_path / "features" / "extractor.json").read_text())["task"] == "classes"
    assert save_extractor(tmp_path / "features", network, {"task": "classes"}) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def damage_weights(folder: Path) -> None:
    path = folder / "extractor.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def set_old_schema(folder: Path) -> None:
    path = folder / "extractor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))


def change_sizes(folder: Path) -> None:
    path = folder / "extractor.json"
    description = json.loads(path.read_text())
    description["sizes"]["width"] = 16
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "extractor.json").unlink(), r"extractor\.json: not found.*medgen features"),
        (lambda folder: (folder / "extractor.safetensors").unlink(), r"extractor\.safetensors: not found"),
        (lambda folder: (folder / "extractor.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "extractor.json").write_text("[]"), "expected a JSON object"),
        (set_old_schema, r"expected an extractor of schema 2; run `medgen features` again"),
        (damage_weights, r"extractor\.safetensors: damaged"),
        (change_sizes, "incomplete or damaged"),
    ],
    ids=["no description", "no weights", "no JSON", "no schema", "an older schema", "other weights", "other sizes"],
)
def test_a_damaged_extractor_is_an_error_that_names_the_file(damage: object, message: str, tmp_path: Path) -> None:
    save_extractor(tmp_path, extractor(), {})
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_extractor(tmp_path)
