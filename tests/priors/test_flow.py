"""The flow prior: training, sampling, storage, and its formulas in slow form."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

from medgen.config import Prior
from medgen.nn.conditions import DROPOUT
from medgen.priors import load_prior, save_prior
from medgen.priors.flow import Flow

SHAPES = [(7,), (1,), (2, 3, 4, 5), (3, 4, 4), (2, 5, 7), (4, 1, 1), (2, 1, 9), (2, 13, 3), (1, 17, 6)]
CENTRES = torch.tensor([[-2.0, 0.0, 5.0], [2.0, 1.0, 5.0]])
MIXING = torch.tensor(
    [[[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 2.0]], [[0.5, 0.0, 0.0], [0.0, 1.0, -1.0], [0, 0, 1]]]
)


def create(shape=(3,), num=60, classes=3, variance=None, **params):
    latents = torch.randn(num, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(num) % classes if classes else None
    prior = Prior(name="flow", **{"channels": 8, "blocks": 1, "sampling_steps": 3, **params})
    return Flow.create(latents, labels, classes, prior, variance)


def randomise(flow, seed=0):
    """Add noise to the weights, so that the network's output is not 0."""
    with torch.no_grad():
        for parameter in flow.network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return flow


def train(flow, latents, labels, steps, rate=5e-3, batch_size=256):
    optimizer = torch.optim.Adam(flow.network.parameters(), lr=rate)
    flow.network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1.0 - step / steps)
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        loss = flow.loss(latents[rows], labels[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def draw(flow, n, label=None, seed=0, **params):
    """Samples (n, D) with changed parameters."""
    other = Flow.restore(*flow.state())
    other.params = other.params.model_copy(update=params)
    labels = None if label is None else torch.full((n,), label)
    return other.sample(n, labels, torch.Generator().manual_seed(seed)).flatten(1)


@pytest.fixture(scope="module")
def two_classes():
    """A flow trained on two Gaussians, of which the first has three quarters of the images."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(2000) % 4 == 3).long()
    latents = CENTRES[labels] + (torch.randn(2000, 1, 3, generator=generator) @ MIXING[labels])[:, 0]
    prior = Prior(name="flow", channels=16, blocks=2, dropout=0.0)
    return train(Flow.create(latents, labels, 2, prior), latents, labels, steps=150)


@pytest.mark.parametrize("label", [0, 1])
def test_samples_of_a_class_have_its_mean_and_covariance(two_classes, label):
    drawn = draw(two_classes, 2000, label, sampling_steps=10).numpy()
    np.testing.assert_allclose(drawn.mean(0), CENTRES[label], atol=0.2)
    np.testing.assert_allclose(np.cov(drawn.T), MIXING[label].T @ MIXING[label], atol=0.35)


@pytest.mark.parametrize("label", [0, 1])
def test_the_density_is_close_to_that_of_the_gaussian_it_was_trained_on(two_classes, label):
    """As close as a short training gets; the tests below compare the formula exactly."""
    covariance = MIXING[label].T @ MIXING[label]
    points = CENTRES[label] + torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) @ MIXING[label]
    shares = two_classes.log_density(points, torch.full((200,), label), torch.Generator().manual_seed(0))
    assert shares.shape == points.shape
    expected = multivariate_normal(CENTRES[label], covariance).logpdf(points)
    assert np.abs(shares.sum(1).numpy() - expected).mean() < 0.5
    assert np.corrcoef(shares.sum(1).numpy(), expected)[0, 1] > 0.9


def test_the_density_of_an_untrained_flow_is_its_gaussians():
    flow = create((2, 3, 3), num=500, classes=2)
    path, generator = flow.path, torch.Generator().manual_seed(3)
    points, label = torch.randn(5, 2, 3, 3, generator=generator), torch.full((5,), 1)
    rest = torch.eye(18) - path.directions.T @ path.directions
    covariance = (path.directions.T * path.variances[:-1]) @ path.directions + path.variances[-1] * rest
    scale = path.scale.flatten()
    gaussian = multivariate_normal(
        (path.mean + path.scale * path.centres[2]).flatten(), scale[:, None] * covariance * scale
    )
    found = flow.log_density(points, label, generator).flatten(1).sum(1)
    np.testing.assert_allclose(found, gaussian.logpdf(points.flatten(1)), rtol=1e-4)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 4)])
def test_the_divergence_is_the_trace_of_the_jacobian(shape):
    """Mean over many random vectors, compared with the determinant of the whole map."""
    flow = randomise(create(shape, num=200))
    flow.network.eval()
    point, label = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)), torch.tensor([1])
    with torch.no_grad():
        noise = flow.invert(point, label)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.transport(x, label).flatten(), noise)
    expected = -0.5 * (noise.square() + np.log(2 * np.pi)).sum() - torch.linalg.slogdet(jacobian.flatten(1))[1]
    draws = (
        flow.log_density(point.expand(100, *shape), label.expand(100), torch.Generator().manual_seed(0))
        .flatten(1)
        .sum(1)
    )
    assert float(draws.mean()) == pytest.approx(float(expected), abs=0.1 + 3 * float(draws.std()) / 10)


def test_inversion_and_transport_undo_each_other_and_change_the_class(two_classes):
    labels = torch.zeros(1000, dtype=torch.int64)
    points = CENTRES[0] + torch.randn(1000, 3, generator=torch.Generator().manual_seed(1)) @ MIXING[0]
    with torch.no_grad():
        noise = two_classes.invert(points, labels)
        torch.testing.assert_close(two_classes.transport(noise, labels), points, atol=0.01, rtol=0)
        moved = two_classes.transport(noise, labels + 1).numpy()
    np.testing.assert_allclose(noise.std(0), np.ones(3), atol=0.15)
    np.testing.assert_allclose(moved.mean(0), CENTRES[1], atol=0.2)
    np.testing.assert_allclose(np.cov(moved.T), MIXING[1].T @ MIXING[1], atol=0.5)


def test_samples_without_a_label_follow_the_train_mix(two_classes):
    drawn = draw(two_classes, 2000, sampling_steps=10)
    nearest = torch.cdist(drawn, CENTRES).argmin(1)
    assert abs(float(nearest.float().mean()) - 0.25) < 0.05


def test_guidance_moves_classes_apart_and_0_ignores_the_label(two_classes):
    def distance(guidance):
        means = [draw(two_classes, 300, label, guidance=guidance, sampling_steps=8).mean(0) for label in (0, 1)]
        return float((means[0] - means[1]).norm())

    assert distance(0.0) == 0.0
    assert distance(0.5) < distance(1.0) - 0.2
    assert distance(2.0) > distance(1.0) + 0.2
    assert torch.equal(draw(two_classes, 9, 1, guidance=0.0), draw(two_classes, 9))


def test_euler_converges_to_the_midpoint_rules_latents(two_classes):
    exact = draw(two_classes, 64, 0, solver="midpoint", sampling_steps=100)
    errors = {
        (solver, steps): float((draw(two_classes, 64, 0, solver=solver, sampling_steps=steps) - exact).abs().mean())
        for solver in ("euler", "midpoint")
        for steps in (5, 10, 20)
    }
    assert errors["euler", 5] > 1.6 * errors["euler", 10] > 2.56 * errors["euler", 20]  # the error halves
    for steps in (5, 10, 20):
        assert errors["midpoint", steps] < 0.5 * errors["euler", steps]


@pytest.mark.parametrize("shape", [(5,), (2, 5, 4)])
def test_the_sampler_integrates_the_velocity_that_the_loss_trains(shape):
    flow = randomise(create(shape, sampling_steps=100))
    labels = torch.tensor([0, 1, 2, -1])
    drawn = flow.sample(4, labels, torch.Generator().manual_seed(1))
    flow.network.eval()
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for step in range(100):  # the midpoint rule in x itself
            half = x + flow.velocity(x, torch.full((4,), step / 100), labels) / 200
            x = x + flow.velocity(half, torch.full((4,), (step + 0.5) / 100), labels) / 100
    np.testing.assert_allclose(drawn, flow.path.unstandardise(x), atol=5e-3)


@pytest.mark.parametrize("conditional", [True, False])
def test_loss_equals_the_formula(conditional):
    flow = randomise(create((2, 3, 3), conditional=conditional))
    flow.network.eval()  # without dropout
    latents = 4.0 + 3.0 * torch.randn(30, 2, 3, 3, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(30) % 4 - 1
    loss = flow.loss(latents, labels, torch.Generator().manual_seed(7)).detach()
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(30, 2, 3, 3, generator=generator)
    times = torch.sigmoid(torch.randn(30, generator=generator))
    kept = torch.rand(30, generator=generator) >= DROPOUT
    assert 0 < kept.sum() < 30
    total = 0.0
    for latent, label, x0, t, keep in zip(latents, labels, noise, times, kept, strict=True):
        x1 = (latent - flow.path.mean) / flow.path.scale
        used = label if conditional and keep else torch.tensor(-1)
        predicted = flow.velocity(((1 - t) * x0 + t * x1)[None], t[None], used[None])[0]
        total += float(((predicted.detach() - (x1 - x0)) ** 2).mean())
    assert float(loss) == pytest.approx(total / 30, rel=1e-5)


def test_untrained_velocity_is_the_regression_of_gaussian_latents():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator)
    latents = torch.randn(100_000, 3, generator=generator) @ mixing
    flow = Flow.create(latents, None, 0, Prior(channels=8, blocks=1))
    x0, x1 = torch.randn(latents.shape, generator=generator), flow.path.standardise(latents)
    for t in (0.0, 0.3, 0.8, 1.0):
        x = (1 - t) * x0 + t * x1
        expected = torch.linalg.lstsq(x, x1 - x0).solution  # the mean velocity given x is linear there
        found = flow.velocity(torch.eye(3), torch.full((3,), t), torch.full((3,), -1)).detach()
        np.testing.assert_allclose(found, expected, atol=0.03, rtol=0.03)


def test_an_untrained_flow_has_the_moments_of_each_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 2
    mixing = torch.randn(6, 6, generator=generator)
    latents = 4.0 * labels[:, None] + torch.randn(800, 6, generator=generator) @ mixing
    flow = Flow.create(latents, labels, 2, Prior(channels=8, blocks=1, sampling_steps=1))
    scale = float(latents.var(0).max())
    for label in (0, 1):
        drawn = draw(flow, 20_000, label)
        np.testing.assert_allclose(drawn.mean(0), latents[labels == label].mean(0), atol=0.1)
        np.testing.assert_allclose(np.cov(drawn.T) / scale, mixing.T @ mixing / scale, atol=0.1)


def test_the_centre_of_a_rare_class_is_shrunk():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 200 + [1] * 200 + [2] * 4 + [3])
    latents = torch.randn(405, 50, generator=generator) + torch.tensor([0.0, 2.0, 0.0, 0.0])[labels][:, None]
    flow = Flow.create(latents, labels, 4, Prior(channels=8, blocks=1))
    plain = [flow.path.standardise(latents[labels == label]).mean(0) for label in range(4)]
    kept = [float(centre.norm() / mean.norm()) for centre, mean in zip(flow.path.centres[1:], plain, strict=True)]
    assert kept[0] > 0.97 and kept[1] > 0.97
    assert 0.0 < kept[2] < 0.9
    assert kept[3] == 0.0
    assert not flow.path.centres[0].any()


@pytest.mark.parametrize(("shape", "solver"), itertools.product(SHAPES, ["euler", "midpoint"]))
def test_an_untrained_flow_draws_exactly_its_gaussians(shape, solver):
    flow = create(shape, variance=torch.full(shape, 0.25), solver=solver)
    drawn = flow.sample(5, torch.tensor([0, 1, 2, 2, -1]), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    path, white = flow.path, torch.randn(5, *shape, generator=generator)
    factors = path.variances.sqrt().expand(5, -1)  # the same noise, scaled along the principal axes
    base = path.mean + path.scale * (path.centres[[1, 2, 3, 3, 0]] + path.scale_axes(white, factors))
    assert torch.equal(drawn, base + 0.5 * torch.randn(5, *shape, generator=generator))
    dense = path.directions.T @ torch.diag(factors[0, :-1] - factors[0, -1]) @ path.directions
    matrix = dense + factors[0, -1] * torch.eye(len(dense))
    np.testing.assert_allclose(path.scale_axes(white, factors).flatten(1), white.flatten(1) @ matrix, atol=1e-5)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_depends_on_every_input_dimension_time_and_class(shape):
    flow = randomise(create(shape))
    x = torch.randn(2, *shape, requires_grad=True)
    times, labels = torch.tensor([0.1, 0.9]), torch.tensor([0, 2])
    flow.network.eval()
    out = flow.network(x, times, labels)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert (x.grad != 0).all() or shape == (1,)  # a single dimension is removed by the normalisation after its layer
    assert not torch.equal(out, flow.network(x, times, torch.tensor([0, -1])))
    assert not torch.equal(out, flow.network(x, times.flip(0), labels))


def test_samples_have_the_correlation_of_neighbours():
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(400, 1, 7, 7, generator=generator)
    latents = nn.functional.avg_pool2d(fields, 3, stride=1)  # (400, 1, 5, 5): neighbours share two thirds
    flow = Flow.create(latents, None, 0, Prior(channels=8, blocks=2, dropout=0.0, sampling_steps=8))
    train(flow, latents, torch.full((400,), -1), steps=80, batch_size=64)
    drawn = flow.sample(400, None, generator)[:, 0]
    for apart, expected in ((1, 2 / 3), (3, 0.0)):
        found = np.corrcoef(drawn[:, :, :-apart].flatten(), drawn[:, :, apart:].flatten())[0, 1]
        assert found == pytest.approx(expected, abs=0.12)


def test_a_saved_flow_loads_unchanged(tmp_path):
    flow = randomise(create((2, 5, 3), variance=torch.rand(2, 5, 3), guidance=2.0, solver="euler"))
    save_prior(tmp_path / "a", flow, "m")
    loaded = load_prior(tmp_path / "a", "m")
    labels = torch.tensor([2, 0, 1])
    expected = flow.sample(3, labels, torch.Generator().manual_seed(0))
    assert torch.equal(loaded.sample(3, labels, torch.Generator().manual_seed(0)), expected)
    save_prior(tmp_path / "b", loaded, "m")
    for file in ("prior.safetensors", "prior.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with torch.no_grad():
        next(flow.network.parameters()).zero_()  # a state does not share memory with the network
    assert torch.equal(Flow.restore(*loaded.state()).sample(3, labels, torch.Generator().manual_seed(0)), expected)


def test_results_depend_on_seeds_and_leave_the_global_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, again, other = create(seed=0), create(seed=0), create(seed=1)
    first.network.train()
    first.loss(torch.randn(4, 3, generator=torch.Generator()), torch.zeros(4).long(), torch.Generator())
    first.network.eval()
    torch.manual_seed(1)
    randomise(first)
    draws = [first.sample(300, None, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    weights = [flow.network.state_dict() for flow in (create(seed=0), again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("training", [True, False])
def test_sampling_has_no_dropout_and_keeps_the_networks_mode(training):
    flow = randomise(create(dropout=0.5))
    flow.network.train(training)
    first, second = (flow.sample(4, None, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert flow.network.training == training


@pytest.mark.parametrize(
    ("labels", "classes", "params", "frequencies"),
    [
        (None, 0, {}, []),
        (torch.full((40,), -1), 0, {}, []),
        (torch.full((40,), -1), 2, {}, []),
        (torch.arange(40) % 2, 2, {"conditional": False}, [0.5, 0.5]),
    ],
)
def test_a_flow_without_classes_ignores_labels(labels, classes, params, frequencies):
    latents = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    flow = randomise(Flow.create(latents, labels, classes, Prior(channels=8, blocks=1, sampling_steps=2, **params)))
    assert not flow.conditional
    assert flow.frequencies.tolist() == frequencies
    given = torch.zeros(4).long()
    drawn = flow.sample(4, given, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, flow.sample(4, None, torch.Generator().manual_seed(0)))
    assert torch.isfinite(flow.loss(latents[:4], given, torch.Generator()))


def test_a_class_of_one_image_is_drawn_and_one_of_none_is_refused():
    latents, labels = torch.randn(40, 2, 3, 3), torch.tensor([0] * 38 + [2] + [-1])
    flow = Flow.create(latents, labels, 3, Prior(channels=8, blocks=1, sampling_steps=2))
    assert flow.conditional
    train(flow, latents, labels, steps=3, batch_size=8)
    assert torch.isfinite(flow.sample(3, torch.tensor([0, 2, -1]), torch.Generator())).all()
    with pytest.raises(ValueError, match=r"found \[1, 7\], expected classes with training images: \[0, 2\]"):
        flow.sample(3, torch.tensor([1, 0, 7]), torch.Generator())


def test_dimensions_that_hardly_vary_have_a_minimum_scale():
    latents = torch.randn(500, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[:, 0, 0] = 3.0  # always the same
    latents[:, 1] *= 1e-6
    flow = Flow.create(latents, None, 0, Prior(channels=8))
    np.testing.assert_allclose(flow.path.scale[0, 1:], 1.0, atol=0.15)
    np.testing.assert_allclose(flow.path.scale[0, 0], 0.1 * 0.75**0.5, rtol=0.05)
    assert (flow.path.scale[1] > 0.005).all()
    np.testing.assert_allclose(flow.path.mean, latents.mean(0), atol=1e-6)
