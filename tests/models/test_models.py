"""Every family keeps the same promises: one row a configuration, one test a promise."""

import pytest
import torch

from medgen.config import Model
from medgen.errors import UserError
from medgen.models import MODELS, build_model
from medgen.models.base import soft_bound

ROWS = [  # name and sizes, image shape, latent shape
    ({"name": "spatial_vae", "base_channels": 8, "latent_channels": 4, "latent_size": 4}, (1, 32, 32), (4, 4, 4)),
    ({"name": "spatial_vae", "base_channels": 8, "latent_channels": 6, "latent_size": 8}, (1, 64, 64), (6, 8, 8)),
    ({"name": "spatial_vae", "base_channels": 4, "latent_channels": 2, "latent_size": 7}, (3, 56, 56), (2, 7, 7)),
    ({"name": "spatial_vae", "base_channels": 4, "latent_channels": 8, "latent_size": 4}, (1, 128, 128), (8, 4, 4)),
    (
        {"name": "spatial_vae", "base_channels": 4, "max_channels": 8, "blocks_per_stage": 2, "latent_size": 16,
         "latent_channels": 2, "attention_resolutions": [16, 32]},
        (1, 512, 512),
        (2, 16, 16),
    ),
]  # fmt: skip


@pytest.fixture(params=ROWS, ids=[f"{row[0]['name']}-{row[1][1]}px" for row in ROWS])
def row(request):
    kwargs, image_shape, latent_shape = request.param
    torch.manual_seed(0)
    return build_model(Model(**kwargs), image_shape, num_classes=3), image_shape, latent_shape


def test_every_family_is_in_the_table():
    assert {row[0]["name"] for row in ROWS} == set(MODELS)


def test_shapes_of_every_verb(row):
    model, image_shape, latent_shape = row
    image, label = torch.rand(2, *image_shape), torch.tensor([0, 2])
    output = model(image, label)
    assert model.latent_shape == latent_shape
    assert output.reconstruction.shape == image.shape
    assert model.encode(image, label).mean.shape == (2, *latent_shape)
    assert model.decode(torch.randn(2, *latent_shape), label).shape == image.shape
    assert model.reconstruct(image, label).shape == image.shape
    assert model.sample(2, label).shape == image.shape


def test_images_are_in_unit_range(row):
    model, _, latent_shape = row
    image = model.decode(100 * torch.randn(2, *latent_shape))
    assert image.min() >= 0 and image.max() <= 1


def test_every_parameter_gets_a_finite_gradient(row):
    model, image_shape, _ = row
    # blocks that start as their shortcut give no gradient before their last layer: move them off it
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    output = model(torch.rand(2, *image_shape))
    (output.reconstruction.mean() + output.latent.value.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("width", [1, 9, 18, 28])
def test_odd_widths_work(width):
    model = build_model(Model(base_channels=width, attention_resolutions=(8, 16)), (1, 64, 64), 0)
    assert model.reconstruct(torch.rand(1, 1, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize(
    ("image_size", "latent_shape"),
    [(16, (1, 8, 8)), (28, (4, 7, 7)), (32, (4, 8, 8)), (64, (16, 8, 8)), (128, (16, 16, 16)), (224, (16, 28, 28))],
)
def test_the_default_latent_follows_the_image_size(image_size, latent_shape):
    model = build_model(Model(base_channels=4, max_channels=8), (1, image_size, image_size), 0)
    assert model.latent_shape == latent_shape


def test_reconstruct_has_no_randomness_and_forward_in_training_has(row):
    model, image_shape, _ = row
    image = torch.rand(2, *image_shape)
    assert torch.equal(model.train().reconstruct(image), model.reconstruct(image))
    assert not torch.equal(model(image).latent.value, model(image).latent.value)
    latent = model.eval()(image).latent
    assert torch.equal(latent.value, latent.mean)


def test_sample_is_reproduced_by_its_generator(row):
    model = row[0].eval()
    first, second = (model.sample(2, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_log_variance_stays_bounded_whatever_the_input():
    model = build_model(Model(base_channels=8, latent_channels=4, logvar_bound=6.0), (1, 64, 64), 0)
    logvar = model.encode(1e12 * torch.rand(2, 1, 64, 64)).logvar
    assert logvar.abs().max() <= 6.0
    assert torch.isfinite(logvar.exp()).all()


def test_soft_bound_keeps_a_gradient_where_a_clamp_has_none():
    value = torch.tensor([-25.0, 0.0, 25.0], requires_grad=True)
    soft_bound(value, 10.0).sum().backward()
    assert (value.grad > 0).all()
    assert value.grad[1] == 1.0


@pytest.mark.parametrize(
    ("kwargs", "image_size", "words"),
    [
        ({"name": "spatial_vea"}, 64, ["model.name", "spatial_vea", "did you mean 'spatial_vae'"]),
        ({"latent_size": 5}, 64, ["model.latent_size", "5", "64 px"]),
        ({"latent_size": 64}, 64, ["model.latent_size", "64"]),
    ],
)
def test_a_wrong_size_or_name_is_refused_by_name(kwargs, image_size, words):
    with pytest.raises(UserError) as error:
        build_model(Model(**kwargs), (1, image_size, image_size), 3)
    assert all(word in str(error.value) for word in words)
