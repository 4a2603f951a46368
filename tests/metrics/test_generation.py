"""Metrics of sets of images, against other libraries, slow loops and known cases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from medgen.metrics import generation
from medgen.metrics.intervals import two_set_intervals


def normal(count: int, width: int = 8, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize("count", [200, 10], ids=["full rank", "fewer images than features"])
def test_frechet_distance_agrees_with_scipy(count: int) -> None:
    from scipy.linalg import sqrtm

    real, generated = normal(count, 16), 1.5 * normal(count + 5, 16, 0.3, seed=1)
    cov_real, cov_generated = np.cov(real.numpy().T), np.cov(generated.numpy().T)
    jitter = 1e-9 * np.eye(16)  # scipy's matrix root needs it for a singular covariance
    root = sqrtm((cov_real + jitter) @ (cov_generated + jitter)).real
    shift = ((real.mean(0) - generated.mean(0)) ** 2).sum().item()
    expected = shift + np.trace(cov_real + cov_generated - 2 * root)
    assert generation.frechet_distance(real, generated) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_known_gaussians() -> None:
    real = normal(50, 3)
    assert generation.frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)
    assert generation.frechet_distance(real, real + 2.0) == pytest.approx(3 * 4.0)
    assert generation.frechet_distance(real, 3 * real) == pytest.approx(
        (4 * real.mean(0).square().sum() + 4 * torch.cov(real.T).trace()).item()
    )


def slow_prdc(real: Tensor, generated: Tensor, k_precision: int, k_density: int) -> tuple[float, ...]:
    def radius(rows: Tensor, i: int, k: int) -> float:
        return sorted(float((rows[i] - rows[j]).norm()) for j in range(len(rows)) if j != i)[k - 1]

    def distance(i: int, j: int) -> float:
        return float((real[i] - generated[j]).norm())

    n, m = range(len(real)), range(len(generated))
    precision = np.mean([any(distance(i, j) <= radius(real, i, k_precision) for i in n) for j in m])
    recall = np.mean([any(distance(i, j) <= radius(generated, j, k_precision) for j in m) for i in n])
    density = np.sum([distance(i, j) < radius(real, i, k_density) for i in n for j in m]) / k_density / len(m)
    coverage = np.mean([any(distance(i, j) < radius(real, i, k_density) for j in m) for i in n])
    return precision, recall, density, coverage


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_prdc_agrees_with_loops_over_the_definition(shift: float) -> None:
    real, generated = normal(14, 3), normal(14, 3, shift, seed=1)
    assert tuple(generation.prdc(real, generated)) == pytest.approx(slow_prdc(real, generated, 3, 5))


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "with equal images"])
def test_intervals_agree_with_loops_that_leave_out_patients(rounded: bool) -> None:
    real, generated = normal(12, 2), normal(12, 2, 0.5, seed=1)
    if rounded:
        real, generated = real.round(), generated.round()
    patients = [0, 0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 5]

    def slow(kept_real: Tensor, kept_generated: Tensor) -> Tensor:
        return torch.tensor(slow_prdc(real[kept_real], generated[kept_generated], 3, 5))

    expected = two_set_intervals(slow, 12, 12, patients, patients)
    found = generation.prdc_intervals(real, generated, patients, patients)
    for interval, exact in zip(found.values(), expected, strict=True):
        assert tuple(interval) == pytest.approx(tuple(exact))


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (normal(40, 4), (1.0, 1.0, 1.0, 1.0)),
        (normal(40, 4, shift=1000.0), (0.0, 0.0, 0.0, 0.0)),
    ],
    ids=["identical", "disjoint"],
)
def test_prdc_of_known_sets(generated: Tensor, expected: tuple[float, ...]) -> None:
    assert tuple(generation.prdc(normal(40, 4), generated)) == pytest.approx(expected)


def test_a_collapsed_set_has_high_precision_and_low_recall_and_coverage() -> None:
    real = normal(60, 4)
    collapsed = real[:1] + 1e-3 * normal(60, 4, seed=1)
    result = generation.prdc(real, collapsed)
    assert result.precision == 1.0
    assert result.recall < 0.1
    assert result.coverage < 0.3


def test_prdc_does_not_depend_on_the_number_of_samples() -> None:
    real = normal(40, 4)
    few, many = normal(40, 4, 0.5, seed=1), normal(40, 4, 0.5, seed=1).repeat_interleave(25, dim=0)
    assert generation.prdc(real, many) == generation.prdc(real, few)


def test_intervals_contain_their_values_and_narrow_with_more_images() -> None:
    few, many = (generation.prdc_intervals(normal(size, 4), normal(size, 4, 0.5, seed=1)) for size in (40, 400))
    for name, value in generation.prdc(normal(40, 4), normal(40, 4, 0.5, seed=1))._asdict().items():
        assert few[name].value == pytest.approx(value)
        assert few[name].low < value < few[name].high
        assert many[name].high - many[name].low < 0.6 * (few[name].high - few[name].low)


def test_frechet_interval_covers_the_spread_over_other_draws() -> None:
    draws = [(normal(120, 4, seed=s), normal(150, 4, 0.6, seed=1000 + s)) for s in range(40)]
    values = [generation.frechet_distance(*draw) for draw in draws]
    widths = [(interval.high - interval.low) / 2 for interval in (generation.frechet_interval(*d) for d in draws[:10])]
    assert np.mean(widths) == pytest.approx(1.96 * np.std(values), rel=0.35)


def test_subsampling_keeps_the_class_proportions_of_a_sorted_set() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    assert torch.bincount(generation.subsample(labels, 10)).tolist() == [6, 3, 1]
    assert generation.subsample(labels, 100).equal(labels)


@pytest.mark.parametrize(("size", "num_scales"), [(16, 1), (28, 2), (64, 3), (128, 4), (176, 5)])
def test_diversity_uses_as_many_scales_as_fit(size: int, num_scales: int) -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    images = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    images[1] = (images[1] + images[0]) / 2
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:num_scales], dtype=torch.float64)
    betas = tuple((weights / weights.sum()).tolist())
    expected = multiscale_structural_similarity_index_measure(images[:1], images[1:], data_range=1.0, betas=betas)
    assert generation.ms_ssim_diversity(images, num_pairs=3) == pytest.approx(float(expected), abs=1e-5)


def test_diversity_of_colour_images_is_the_mean_over_channels() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1:] = (images[1:] + images[:1]) / 2
    images[:, 1] = images[:, 1] ** 2
    channels = [generation.ms_ssim_diversity(images[:, channel : channel + 1], 20) for channel in range(3)]
    assert generation.ms_ssim_diversity(images, 20) == pytest.approx(sum(channels) / 3, abs=1e-6)


def test_diversity_separates_a_collapsed_set_from_a_varied_one() -> None:
    varied = torch.rand(30, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    collapsed = 0.1 * varied + 0.9 * varied[:1]
    assert generation.ms_ssim_diversity(varied[:1].repeat(3, 1, 1, 1), 10) == pytest.approx(1.0, abs=1e-5)
    assert generation.ms_ssim_diversity(varied, 100) < 0.2 < 0.8 < generation.ms_ssim_diversity(collapsed, 100)
    assert generation.ms_ssim_diversity(varied, 100, seed=1) == generation.ms_ssim_diversity(varied, 100, seed=1)
