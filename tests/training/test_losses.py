"""Numbers of the objective, each against a slow formula or another library."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from medgen.config import Beta, Loss, Weights
from medgen.models.base import Latent, ModelOutput
from medgen.training.losses import (
    IMAGE_TERMS,
    Objective,
    PerceptualDistance,
    beta_at,
    dice_loss,
    dice_score,
    free_bits,
    kl_per_dim,
    sigma_loss,
    ssim_loss,
)

SHAPE = (1, 16, 16)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, *SHAPE, generator=generator)
    reconstruction = torch.rand(4, *SHAPE, generator=generator)
    mean = torch.randn(4, 2, 2, 2, generator=generator)
    logvar = torch.randn(4, 2, 2, 2, generator=generator)
    return image, ModelOutput(reconstruction, Latent(mean, mean, logvar))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("l1", lambda r, x: (r - x).abs().mean()),
        ("mse", lambda r, x: ((r - x) ** 2).mean()),
        ("sigma", lambda r, x: 0.5 * ((r - x) ** 2).mean().log()),
        ("bce", lambda r, x: -(x * r.log() + (1 - x) * (1 - r).log()).mean()),
    ],
)
def test_image_terms_are_means_over_pixels(batch, name, formula):
    image, output = batch
    losses = Objective(Loss(), SHAPE)(output, image, Weights(**{name: 2.0}), beta=0.0)
    assert losses.terms[name] == pytest.approx(formula(output.prediction, image).item(), rel=1e-5)
    assert losses.total.item() == pytest.approx(2.0 * losses.terms[name].item())


def test_ssim_agrees_with_the_formula(batch):
    """Wang et al. 2004, eq. 13, window by window."""
    image, output = batch
    offsets = torch.arange(11.0) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).double()
    values = []
    for x, y in zip(image[:, 0].double(), output.prediction[:, 0].double(), strict=True):
        for top in range(6):
            for left in range(6):
                a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
                covariance = (window * a * b).sum() - mean_a * mean_b
                c1, c2 = 0.01**2, 0.03**2
                structure = (2 * covariance + c2) / (var_a + var_b + c2)
                values.append((2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * structure)
    expected = torch.stack(values).mean().item()
    assert 1 - ssim_loss(output.prediction, image).item() == pytest.approx(expected, abs=1e-5)
    assert ssim_loss(image, image).item() == pytest.approx(0.0, abs=1e-6)


def test_ssim_of_colour_is_the_mean_of_its_channels():
    image, other = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    channels = [ssim_loss(other[:, i : i + 1], image[:, i : i + 1]) for i in range(3)]
    assert ssim_loss(other, image).item() == pytest.approx(sum(channels).item() / 3, abs=1e-6)


def test_ssim_knows_its_range(batch):
    """With the library's default data_range of 255 every pair in [0, 1] is alike."""
    image, output = batch
    assert ssim_loss(output.prediction, image) > 0.5


def test_every_weight_has_its_term():
    assert Weights.model_fields.keys() == IMAGE_TERMS.keys() | {"perceptual"}


def test_sigma_is_the_likelihood_of_the_best_variance(batch):
    """Against torch.distributions, over a grid of variances: none does better (Rybkin et al. 2021, eq. 6)."""
    image, output = batch
    found = sigma_loss(output.prediction, image).item()
    deviations = torch.linspace(0.01, 2.0, 2000)
    nats = [-Normal(output.prediction, s).log_prob(image).mean().item() for s in deviations]
    best = min(nats)
    assert found == pytest.approx(best - 0.5 * (1 + math.log(2 * math.pi)), abs=1e-5)
    at_best = deviations[nats.index(best)].item()
    assert at_best**2 == pytest.approx((output.prediction - image).square().mean().item(), rel=1e-2)


def test_sigma_of_a_perfect_fit_is_finite_with_a_finite_gradient(batch):
    image = batch[0]
    reconstruction = image.clone().requires_grad_()
    loss = sigma_loss(reconstruction, image)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(reconstruction.grad).all()


def slow_dice(probabilities, mask):
    """Class by class on lists, smoothing 1e-5."""
    values = []
    for k in range(mask.shape[1]):
        p, m = probabilities[:, k].flatten().tolist(), mask[:, k].flatten().tolist()
        overlap = sum(a * b for a, b in zip(p, m, strict=True))
        values.append((2 * overlap + 1e-5) / (sum(p) + sum(m) + 1e-5))
    return sum(values) / len(values)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_dice_agrees_with_the_formula(num_classes):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, num_classes, 8, 8, generator=generator)
    mask = (torch.rand(2, num_classes, 8, 8, generator=generator) > 0.6).float()
    assert dice_loss(probabilities, mask).item() == pytest.approx(1 - slow_dice(probabilities, mask), rel=1e-5)
    if num_classes == 1:
        decided = (probabilities > 0.5).float()
    else:
        decided = (probabilities == probabilities.max(dim=1, keepdim=True).values).float()
    assert dice_score(probabilities, mask).item() == pytest.approx(slow_dice(decided, mask), rel=1e-5)


@pytest.mark.parametrize(
    ("probabilities", "mask", "loss"),
    [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.5, 1.0, 1 / 3)],
    ids=["right", "rightly nothing", "wrong", "unsure"],
)
def test_dice_of_known_cases(probabilities, mask, loss):
    """Nothing found where there is nothing is right: the smoothing decides that."""
    shape = (2, 1, 16, 16)
    assert dice_loss(torch.full(shape, probabilities), torch.full(shape, mask)).item() == pytest.approx(loss, abs=1e-5)


def test_a_models_own_terms_are_added_and_commitment_is_weighed(batch):
    image, output = batch
    terms = {"commitment": torch.tensor(2.0), "codebook": torch.tensor(3.0)}
    latent = Latent(output.latent.mean, output.latent.mean)
    losses = Objective(Loss(commitment_cost=0.25), SHAPE)(
        ModelOutput(output.prediction, latent, terms), image, Weights(l1=1.0), beta=1.0
    )
    assert losses.total.item() == pytest.approx(losses.terms["l1"].item() + 0.25 * 2.0 + 3.0)
    assert {"commitment", "codebook"} <= losses.terms.keys()
    assert "kl" not in losses.terms


def test_a_loss_without_a_latent_has_no_kl():
    mask = torch.ones(1, *SHAPE)
    losses = Objective(Loss(), SHAPE)(ModelOutput(0.5 * mask, None), mask, Weights(bce=1.0, dice=1.0), beta=1.0)
    assert losses.terms.keys() == {"bce", "dice_loss"}
    assert losses.total.item() == pytest.approx(math.log(2) + 1 / 3, rel=1e-4)


def test_kl_agrees_with_torch_distributions(batch):
    latent = batch[1].latent
    theirs = kl_divergence(Normal(latent.mean, (0.5 * latent.logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dim(latent), theirs)


@pytest.mark.parametrize(
    ("reduction", "scale"), [("elbo", 1 / math.prod(SHAPE)), ("sum", 1.0), ("mean", 1 / 8)], ids=["elbo", "sum", "mean"]
)
def test_kl_is_reported_in_nats_per_image_and_weighed_by_its_reduction(batch, reduction, scale):
    image, output = batch
    objective = Objective(Loss(kl_reduction=reduction), SHAPE)
    without = objective(output, image, Weights(l1=1.0), beta=0.0)
    with_kl = objective(output, image, Weights(l1=1.0), beta=0.3)
    nats = kl_per_dim(output.latent).sum(dim=(1, 2, 3)).mean()
    assert with_kl.terms["kl"].item() == pytest.approx(nats.item(), rel=1e-6)
    assert (with_kl.total - without.total).item() == pytest.approx(0.3 * scale * nats.item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16)])
def test_kl_has_its_share_of_all_channels(shape):
    """β = 1 is the evidence lower bound only where KL is divided by as many numbers as the image term averages."""
    assert Objective(Loss(), shape).kl_weight(1.0, 8, math.prod(shape)) == pytest.approx(1 / math.prod(shape))


def test_effective_beta_of_system_a():
    """A pixel mean beside 0.003 of a summed KL is β = 49 at 128 px and 151 at 224 px (systems.md)."""
    for size, expected in ((128, 49), (224, 151)):
        objective = Objective(Loss(kl_reduction="sum"), (1, size, size))
        assert objective.effective_beta(0.003, 128) == pytest.approx(expected, abs=0.6)


def test_system_es_summed_loss_is_ours_times_the_pixels():
    """BCE + β·KL, both summed over an image, is a mean BCE beside kl_reduction: elbo with the same β."""
    generator = torch.Generator().manual_seed(0)
    image, made = torch.rand(2, 4, *SHAPE, generator=generator)
    mean, logvar = torch.randn(2, 4, 8, generator=generator)
    ours = Objective(Loss(), SHAPE)(ModelOutput(made, Latent(mean, mean, logvar)), image, Weights(bce=1.0), beta=1.0)
    bce = torch.nn.functional.binary_cross_entropy(made, image, reduction="sum")
    kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()
    assert ours.total.item() * math.prod(SHAPE) == pytest.approx((bce + kl).item() / 4, rel=1e-5)


def test_infinite_kl_with_beta_zero_leaves_the_loss_finite():
    latent = Latent(torch.zeros(1, 2), torch.zeros(1, 2), torch.full((1, 2), 1000.0))
    output = ModelOutput(torch.full((1, *SHAPE), 0.5), latent)
    losses = Objective(Loss(), SHAPE)(output, torch.rand(1, *SHAPE), Weights(l1=1.0), beta=0.0)
    assert torch.isfinite(losses.total)
    assert torch.isinf(losses.terms["kl"])


def test_free_bits_cost_nothing_below_and_everything_above():
    kl = torch.tensor([[0.1, 3.0], [0.3, 5.0]])  # two images, two channels: means 0.2 and 4.0
    assert free_bits(kl, 0.0).item() == pytest.approx(4.2)
    assert free_bits(kl, 0.5).item() == pytest.approx(4.5)
    grid = kl[:, :, None, None].expand(2, 2, 3, 1)  # three places a channel: the bound is on their sum
    assert free_bits(grid, 0.5).item() == pytest.approx(0.6 + 12.0)


@pytest.mark.parametrize(
    ("beta", "points"),
    [
        (Beta(end=0.5), {0: 0.5, 7.5: 0.5}),
        (Beta(schedule="linear", start=0.0, end=0.001, epochs=50), {0: 0, 25: 0.0005, 50: 0.001, 80: 0.001}),
        (Beta(schedule="cyclical", start=0.0, end=1.0, epochs=10), {0: 0, 2.5: 0.5, 5: 1, 9.9: 1, 10: 0, 12.5: 0.5}),
    ],
    ids=["constant", "linear", "cyclical"],
)
def test_beta_schedules(beta, points):
    for epoch, expected in points.items():
        assert beta_at(beta, epoch) == pytest.approx(expected), epoch


def test_perceptual_distance_reads_torchvision_weights(tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    network = vgg16()
    features = {name: value for name, value in network.state_dict().items() if name.startswith("features.")}
    torch.save(features, tmp_path / "vgg16.pth")
    distance = PerceptualDistance(tmp_path / "vgg16.pth")
    a, b = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    grey = distance(a, b).item()
    assert distance(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)).item() == pytest.approx(grey, rel=1e-5)
    assert distance(torch.cat([a, b, a], 1), b.repeat(1, 3, 1, 1)).item() != pytest.approx(grey, rel=0.01)

    def slow(image):
        x = (image.repeat(1, 3, 1, 1) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        return [network.features[: i + 1](x) for i in (3, 8, 15)]

    expected = sum(((x - y) ** 2).mean() for x, y in zip(slow(a), slow(b), strict=True))
    assert distance(a, b).item() == pytest.approx(expected.item(), rel=1e-4)
    assert distance(a, a).item() == 0.0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_dice_of_volumes_is_that_of_the_same_pixels_as_images():
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(2, 3, 4, 5, 6, generator=generator)
    mask = (torch.rand(2, 3, 4, 5, 6, generator=generator) > 0.5).float()
    torch.testing.assert_close(dice_loss(found, mask), dice_loss(found.flatten(3), mask.flatten(3)))
    torch.testing.assert_close(dice_score(found, mask), dice_score(found.flatten(3), mask.flatten(3)))
