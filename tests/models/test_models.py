"""Properties that all model families share; each row of ROWS is a configuration."""

import pytest
import torch

from medgen.config import Loss, Model, Preprocess, Weights
from medgen.errors import UserError
from medgen.models import MODELS, build_model, bundle
from medgen.models.base import soft_bound
from medgen.models.bundle import BundleInfo
from medgen.training.losses import Objective

ROWS = [  # parameters, image shape, latent shape (None for a segmenter)
    ({"name": "spatial_vae", "base_channels": 8, "latent_channels": 4, "latent_size": 4}, (1, 32, 32), (4, 4, 4)),
    ({"name": "spatial_vae", "base_channels": 8, "latent_channels": 6, "latent_size": 8}, (1, 64, 64), (6, 8, 8)),
    ({"name": "spatial_vae", "base_channels": 4, "latent_channels": 2, "latent_size": 7}, (3, 56, 56), (2, 7, 7)),
    ({"name": "spatial_vae", "base_channels": 4, "latent_channels": 8, "latent_size": 4}, (1, 128, 128), (8, 4, 4)),
    (
        {"name": "spatial_vae", "base_channels": 4, "max_channels": 8, "blocks_per_stage": 2, "latent_size": 16,
         "latent_channels": 2, "attention_resolutions": [16, 32]},
        (1, 256, 256),
        (2, 16, 16),
    ),
    ({"name": "autoencoder", "base_channels": 4, "latent_channels": 4}, (1, 32, 32), (4, 8, 8)),
    (
        {"name": "autoencoder", "base_channels": 4, "latent_channels": 2, "latent_size": 5, "down": "strided",
         "up": "upsample"},
        (3, 20, 20),
        (2, 5, 5),
    ),
    ({"name": "autoencoder_kl", "base_channels": 4, "latent_channels": 2}, (1, 32, 32), (2, 8, 8)),
    (
        {"name": "autoencoder_kl", "base_channels": 2, "max_channels": 4, "blocks_per_stage": 2, "latent_size": 5,
         "latent_channels": 3},
        (3, 20, 20),
        (3, 5, 5),
    ),
    ({"name": "vae", "base_channels": 4, "max_channels": 16}, (1, 32, 32), (128,)),
    ({"name": "vae", "base_channels": 2, "max_channels": 8, "latent_channels": 6}, (3, 224, 224), (6,)),
    ({"name": "vae", "base_channels": 4, "latent_channels": 6, "latent_size": 14}, (1, 28, 28), (6,)),
    ({"name": "cvae", "base_channels": 4, "latent_channels": 6, "label_channels": 3}, (1, 28, 28), (6,)),
    ({"name": "cvae", "base_channels": 4, "latent_channels": 6}, (3, 32, 32), (6,)),
    ({"name": "vqvae", "base_channels": 8, "num_embeddings": 16}, (1, 32, 32), (64, 8, 8)),
    ({"name": "vqvae", "base_channels": 4, "num_embeddings": 7, "latent_channels": 5, "latent_size": 9,
      "codebook": "gradient"}, (3, 36, 36), (5, 9, 9)),
    ({"name": "vqvae", "base_channels": 4, "num_embeddings": 16, "latent_channels": 5, "latent_size": 16,
      "codebook": "cosine"}, (1, 32, 32), (5, 16, 16)),
    ({"name": "spatial_vae", "base_channels": 4, "latent_channels": 2, "latent_size": 4}, (1, 32, 48), (2, 4, 6)),
    ({"name": "autoencoder", "base_channels": 4}, (1, 56, 32), (4, 14, 8)),
    ({"name": "autoencoder_kl", "base_channels": 4, "latent_channels": 2}, (1, 24, 32), (2, 6, 8)),
    ({"name": "vae", "base_channels": 4, "latent_channels": 6}, (1, 28, 56), (6,)),
    ({"name": "vqvae", "base_channels": 4, "num_embeddings": 7, "latent_channels": 5}, (1, 40, 36), (5, 10, 9)),
    ({"name": "spatial_vae", "dims": 3, "base_channels": 4, "latent_channels": 2, "latent_size": 4,
      "attention_resolutions": [4]}, (1, 16, 16, 24), (2, 4, 4, 6)),
    ({"name": "autoencoder", "dims": 3, "base_channels": 2, "latent_channels": 3, "latent_size": 4}, (1, 16, 16, 16),
     (3, 4, 4, 4)),
    ({"name": "autoencoder", "dims": 3, "base_channels": 2, "latent_size": 4, "down": "strided", "up": "upsample"},
     (1, 16, 16, 16), (16, 4, 4, 4)),
    ({"name": "vae", "dims": 3, "base_channels": 2, "latent_channels": 6}, (1, 28, 28, 28), (6,)),
    ({"name": "cvae", "dims": 3, "base_channels": 2, "latent_channels": 6}, (1, 16, 16, 16), (6,)),
    ({"name": "vqvae", "dims": 3, "base_channels": 4, "num_embeddings": 7, "latent_channels": 5, "latent_size": 4,
      "attention_resolutions": []}, (1, 16, 16, 16), (5, 4, 4, 4)),
    ({"name": "unet", "dims": 3, "base_channels": 2}, (1, 16, 16, 16), None),
    ({"name": "unet", "base_channels": 4}, (1, 32, 32), None),
    ({"name": "unet", "base_channels": 4, "down": "strided", "up": "upsample"}, (3, 20, 20), None),
]  # fmt: skip
NUM_CLASSES = 3


def build(kwargs, image_shape, mask_classes=2):
    torch.manual_seed(0)
    return build_model(Model(**kwargs), image_shape, NUM_CLASSES, mask_classes)


def row_id(row):
    return "-".join(
        [
            row[0]["name"],
            f"{'x'.join(map(str, row[1][1:]))}px",
            *(str(row[0][key]) for key in ("codebook", "up") if key in row[0]),
        ]
    )


@pytest.fixture(params=ROWS, ids=row_id)
def any_row(request):
    kwargs, image_shape, latent_shape = request.param
    return build(kwargs, image_shape), image_shape, latent_shape


@pytest.fixture(params=[row for row in ROWS if row[2]], ids=row_id)
def row(request):
    kwargs, image_shape, latent_shape = request.param
    return build(kwargs, image_shape), image_shape, latent_shape


@pytest.fixture(params=[row for row in ROWS if row[1][1] <= 56], ids=row_id)
def small(request):
    kwargs, image_shape, _ = request.param
    return build(kwargs, image_shape), image_shape


def objective_of(model, image_shape):
    mask = Weights(bce=1.0, dice=1.0)
    return Objective(Loss(), image_shape), mask if model.target == "mask" else Weights(l1=1.0, ssim=0.5)


def test_every_family_is_in_the_table():
    assert {row[0]["name"] for row in ROWS} == set(MODELS) == set(Model.family_keys)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shapes_of_every_verb(row, precision):
    """Images, latents and log-variances are float32 under autocast too."""
    model, image_shape, latent_shape = row
    image, label = torch.rand(2, *image_shape), torch.tensor([0, 2])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), torch.no_grad():
        output, latent = model(image, label), model.encode(image, label)
        images = [
            output.prediction,
            model.predict(image, label).prediction,
            model.decode(torch.randn(2, *latent_shape), label),
            model.reconstruct(image, label),
            model.sample(2, label),
        ]
    assert model.latent_shape == latent_shape
    assert all(each.shape == image.shape and each.dtype == torch.float32 for each in images)
    latents = [output.latent.value, latent.value, latent.mean]
    assert all(each.shape == (2, *latent_shape) and each.dtype == torch.float32 for each in latents)
    assert latent.logvar is None or (latent.logvar.shape == latent.mean.shape and latent.logvar.dtype == torch.float32)
    assert latent.codes is None or (latent.codes.shape == (2, *latent_shape[1:]) and latent.codes.dtype == torch.int64)
    assert all(bool(torch.isfinite(each).all()) for each in images + latents)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "kwargs", [row[0] for row in ROWS if row[2] is None and "dims" not in row[0]], ids=["maxpool", "strided"]
)
@pytest.mark.parametrize("mask_classes", [2, 3])
def test_a_segmenter_predicts_probabilities_for_every_class(kwargs, mask_classes, precision):
    model, image = build(kwargs, (1, 32, 32), mask_classes), torch.rand(2, 1, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), torch.no_grad():
        output, again = model(image), model.predict(image)
    assert output.latent is None
    assert output.prediction.shape == (2, 1 if mask_classes == 2 else mask_classes, 32, 32)
    assert output.prediction.dtype == torch.float32
    assert torch.equal(output.prediction, again.prediction)
    assert output.prediction.min() >= 0 and output.prediction.max() <= 1
    if mask_classes > 2:
        torch.testing.assert_close(output.prediction.sum(dim=1), torch.ones(2, 32, 32))


def test_images_are_in_unit_range(row):
    model, _, latent_shape = row
    image = model.decode(100 * torch.randn(2, *latent_shape))
    assert image.min() >= 0 and image.max() <= 1


def test_every_parameter_gets_a_finite_gradient(any_row):
    model, image_shape, _ = any_row
    # layers that start at zero block the gradient of the layers before them
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    output = model(torch.rand(2, *image_shape), torch.tensor([0, 2]))
    latent = 0 if output.latent is None else output.latent.value.square().mean()
    (output.prediction.square().mean() + latent + sum(output.terms.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_step_of_training_lowers_the_loss_on_its_batch(small, precision):
    model, image_shape = small
    if len(image_shape) == 4 and precision == torch.bfloat16:
        pytest.skip("gradients of 3-D convolutions are wrong in bf16 on a CPU; a training refuses it")
    objective, weights = objective_of(model, image_shape)
    coarse, mode = torch.rand(4, image_shape[0], *[4] * (len(image_shape) - 1)), ("bilinear", "trilinear")
    smooth = torch.nn.functional.interpolate(coarse, size=image_shape[1:], mode=mode[len(image_shape) - 3])
    target = (smooth[:, :1] > 0.5).float() if model.target == "mask" else smooth
    label = torch.tensor([0, 1, 2, -1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss():
        torch.manual_seed(1)  # the same draws of the posterior
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            output = model(smooth, label)
        return objective(output, target, weights, beta=0.01).total

    loss()  # the first step moves every code of a codebook to a vector of the batch
    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize(("kwargs", "image_shape"), [row[:2] for row in ROWS], ids=map(row_id, ROWS))
def test_a_saved_model_loads_unchanged(kwargs, image_shape, tmp_path):
    """This includes batch statistics and codebooks, which a training step changed."""
    model = build(kwargs, image_shape)
    info = BundleInfo(
        model=Model(**kwargs),
        preprocess=Preprocess(image_size=image_shape[1]),
        image_shape=image_shape,
        classes=("a", "b", "c"),
        dataset="d" * 12,
        run="r" * 12,
        torch=torch.__version__,
    )
    with torch.no_grad():
        model.train()(torch.rand(2, *image_shape), torch.tensor([0, 2]))
    bundle.save(tmp_path, model, info)
    loaded, loaded_info = bundle.load(tmp_path)
    assert loaded_info == info
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in loaded.state_dict().items())
    image, label = torch.rand(2, *image_shape), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(model.eval().predict(image, label).prediction, loaded.predict(image, label).prediction)


@pytest.mark.parametrize("width", [1, 9, 18, 28])
def test_odd_widths_work(width):
    model = build_model(Model(base_channels=width, attention_resolutions=(8, 16)), (1, 64, 64), 0)
    assert model.reconstruct(torch.rand(1, 1, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("image_size", [16, 20, 28, 36, 44, 100])
def test_every_image_size_that_preprocess_allows_works(name, image_size):
    """Multiples of four, powers of two or not."""
    model = build({"name": name, "base_channels": 2, "max_channels": 4}, (1, image_size, image_size)).eval()
    image = torch.rand(1, 1, image_size, image_size)
    assert model.predict(image, torch.tensor([0])).prediction.shape == image.shape


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("image_size", [17, 33, 65])
def test_odd_image_sizes_are_refused(name, image_size):
    with pytest.raises(
        UserError, match=rf"(?s)preprocess\.image_size.*{image_size}|{image_size}.*preprocess\.image_size"
    ):
        build({"name": name}, (1, image_size, image_size))


@pytest.mark.parametrize(
    ("image_size", "latent_shape"),
    [(16, (1, 8, 8)), (28, (4, 7, 7)), (32, (4, 8, 8)), (64, (16, 8, 8)), (128, (16, 16, 16)), (224, (16, 28, 28))],
)
@pytest.mark.parametrize("name", ["spatial_vae", "autoencoder"])
def test_the_default_latent_follows_the_image_size(name, image_size, latent_shape):
    model = build_model(Model(name=name, base_channels=4, max_channels=8), (1, image_size, image_size), 0)
    assert model.latent_shape == latent_shape


def test_the_flat_vae_at_224_px_has_five_convolutions_down_to_7_and_128_dimensions():
    model = build({"name": "vae", "base_channels": 2, "max_channels": 32}, (1, 224, 224))
    assert model.grid == (32, 7, 7)
    assert model.latent_shape == (128,)
    assert sum(isinstance(layer, torch.nn.ConvTranspose2d) for layer in model.decoder) == 5


def test_only_forward_in_training_is_random(row):
    model, image_shape, _ = row
    image, label = torch.rand(2, *image_shape), torch.tensor([0, 2])
    model.eval()
    assert torch.equal(model.reconstruct(image, label), model.reconstruct(image, label))
    latent = model(image, label).latent
    torch.testing.assert_close(latent.value, latent.mean)
    if latent.logvar is not None:
        model.train()
        assert not torch.equal(model(image, label).latent.value, model(image, label).latent.value)


def test_the_same_generator_gives_the_same_samples(row):
    model = row[0].eval()
    first, second = (model.sample(2, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_only_the_conditional_vae_uses_the_label():
    for name in sorted(MODELS):
        model = build({"name": name, "base_channels": 4, "latent_channels": 6}, (1, 32, 32)).eval()
        image = torch.rand(2, 1, 32, 32)
        first, again, other = (
            model.predict(image, torch.tensor(label)).prediction for label in ([0, 0], [0, 0], [1, 2])
        )
        assert torch.equal(first, again), name
        assert torch.equal(first, other) == (name != "cvae"), name
        assert name == "unet" or model.conditional == (name == "cvae")


def test_the_conditional_vae_accepts_images_without_a_label():
    """Label -1, as in the store, is the same as no label."""
    model = build({"name": "cvae", "base_channels": 4}, (1, 28, 28)).eval()
    image, latent = torch.rand(2, 1, 28, 28), torch.randn(2, 128)
    none = torch.tensor([-1, -1])
    assert torch.equal(model.reconstruct(image), model.reconstruct(image, none))
    assert torch.equal(model.decode(latent), model.decode(latent, none))
    mixed = model.decode(latent, torch.tensor([-1, 1]))
    torch.testing.assert_close(mixed[0], model.decode(latent)[0])
    assert not torch.allclose(mixed[1], model.decode(latent)[1])


def test_the_conditional_vae_refuses_data_without_labels():
    with pytest.raises(UserError, match=r"model\.name: cvae.*labels"):
        build_model(Model(name="cvae"), (1, 28, 28), 0)


@pytest.mark.parametrize("name", sorted(name for name, keys in Model.family_keys.items() if "logvar_bound" in keys))
def test_log_variance_is_bounded_for_any_input(name):
    model = build({"name": name, "base_channels": 8, "latent_channels": 4, "logvar_bound": 6.0}, (1, 64, 64))
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
        ({"dims": 3}, 64, ["model.dims", "64 x 64", "2"]),
    ],
)
def test_the_error_names_a_wrong_size_or_family(kwargs, image_size, words):
    with pytest.raises(UserError) as error:
        build_model(Model(**kwargs), (1, image_size, image_size), 3)
    assert all(word in str(error.value) for word in words)
