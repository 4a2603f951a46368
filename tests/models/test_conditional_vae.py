"""A `cvae` takes conditions besides the class in its encoder and decoder; without any it is as in earlier versions."""

import pytest
import torch
from torch import Tensor

from medgen.config import Model, Preprocess
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.models import GenerativeModel, build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.nn.conditions import Conditions

KINDS = {
    "sex": {"kind": "category"},
    "lungs": {"kind": "mask"},
    "age": {"kind": "number", "low": 0, "high": 100},
    "edges": {"kind": "image", "folder": "edges"},
}
VALUES = {name: kind for name, kind in KINDS.items() if name in ("sex", "age")}
MAPS = {name: kind for name, kind in KINDS.items() if name in ("lungs", "edges")}
SIZES = Model(name="cvae", base_channels=4, latent_channels=6, label_channels=5)


def space_of(kinds: dict[str, dict[str, object]]) -> ConditionSpace:
    space = ConditionSpace.from_rows(Preprocess(conditions=kinds), [{"sex": "F"}, {"sex": "M"}])
    assert space is not None
    return space


def build(space: ConditionSpace | None, num_classes: int = 3, side: int = 28, dims: int = 2) -> GenerativeModel:
    torch.manual_seed(0)
    model = build_model(SIZES.model_copy(update={"dims": dims}), (1, *[side] * dims), num_classes, 2, space).eval()
    assert isinstance(model, GenerativeModel)
    return model


def draw(space: ConditionSpace, count: int = 3, side: int = 28, dims: int = 2, seed: int = 0) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, space.size, generator=generator)
    maps = torch.rand(count, space.map_channels, *[side] * dims, generator=generator)
    return Conditions(values, maps if space.map_channels else None)


def inputs(side: int = 28, dims: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, latent = torch.rand(3, 1, *[side] * dims, generator=generator), torch.randn(3, 6, generator=generator)
    return image, latent, torch.tensor([0, 2, -1])


@pytest.mark.parametrize("kinds", [KINDS, VALUES, MAPS], ids=["all", "values", "maps"])
@pytest.mark.parametrize("num_classes", [3, 0])
def test_encoder_and_decoder_depend_on_every_condition(kinds: dict[str, dict[str, object]], num_classes: int) -> None:
    space = space_of(kinds)
    model, given, (image, latent, label) = build(space, num_classes), draw(space), inputs()
    assert model.conditional == (num_classes > 0) and model.space == space
    for name in space.vector_fields | space.map_fields:
        other = draw(space)
        if name in space.vector_fields:
            other.values[:, space.vector_fields[name][1]] += 0.5
        else:
            assert other.maps is not None
            other.maps[:, space.map_fields[name][1]] += 0.5
        first, second = (model.encode(image, label, each).mean for each in (given, other))
        assert not torch.allclose(first, second), name
        first, second = (model.decode(latent, label, each) for each in (given, other))
        assert not torch.allclose(first, second), name


def test_no_conditions_are_unknown_ones() -> None:
    space = space_of(KINDS)
    model, (image, latent, label) = build(space), inputs()
    for unknown in (Conditions.unknown(space, 3), draw(space).cleared()):
        assert torch.equal(model.encode(image, label).mean, model.encode(image, label, unknown).mean)
        assert torch.equal(model.decode(latent, label), model.decode(latent, label, unknown))
    assert model.reconstruct(image).shape == image.shape, "neither label nor conditions"


def test_volumes_take_maps() -> None:
    space = space_of(KINDS)
    model, given, (image, _, label) = build(space, 3, 16, 3), draw(space, 3, 16, 3), inputs(16, 3)
    known, unknown = model.reconstruct(image, label, given), model.reconstruct(image, label)
    assert known.shape == unknown.shape == image.shape and not torch.allclose(known, unknown)


def test_without_conditions_the_weights_are_those_of_earlier_versions() -> None:
    """Their names and shapes, and the values that the seed gives: drawn in the order of the layers."""
    model = build(None)
    names = [name for name in model.state_dict() if name.startswith(("embedding", "to_latent", "from_latent"))]
    assert names == ["to_latent.weight", "to_latent.bias", "from_latent.weight", "from_latent.bias", "embedding.weight"]
    assert model.state_dict()["embedding.weight"].shape == (5, 3)
    image, latent, label = inputs()
    given = draw(space_of(KINDS))
    assert torch.equal(model.decode(latent, label), model.decode(latent, label, given)), "conditions are ignored"
    assert torch.equal(model.encode(image, label).mean, model.encode(image, label, given).mean)


def test_the_label_has_the_same_weights_as_without_conditions() -> None:
    """The embedding of label and conditions is the sum of both."""
    space = space_of(VALUES)
    model, (_, latent, _) = build(space), inputs()
    label, given = torch.tensor([0, 1, 2]), draw(space)
    wanted = torch.cat([torch.eye(3), given.values], dim=1) @ model.state_dict()["embedding.weight"].T
    found = model._embed(latent, label, given)[:, 6:]  # type: ignore[operator]
    torch.testing.assert_close(found, wanted)


def test_data_without_labels_and_conditions_are_refused() -> None:
    with pytest.raises(UserError, match=r"cvae needs labels or preprocess\.conditions, and the dataset has neither"):
        build(None, 0)


@pytest.mark.parametrize("takes_conditions", [True, False])
def test_a_stored_model_keeps_its_conditions(tmp_path, takes_conditions: bool) -> None:  # type: ignore[no-untyped-def]
    """A cvae of an earlier version takes the class only, although its dataset has conditions."""
    space = space_of(KINDS)
    model = build(space if takes_conditions else None)
    preprocess = Preprocess(image_size=28, conditions=KINDS)
    info = BundleInfo(SIZES, preprocess, (1, 28, 28), ("a", "b", "c"), "d" * 12, "r" * 12, "2", conditions=space.fields)
    bundle.save(tmp_path, model, info)
    loaded, read = bundle.load_generative(tmp_path)
    assert read.space == space and loaded.space == (space if takes_conditions else None)
    image, _, label = inputs()
    assert torch.equal(loaded.reconstruct(image, label, draw(space)), model.reconstruct(image, label, draw(space)))
