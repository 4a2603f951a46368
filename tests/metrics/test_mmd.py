"""Squared MMD against another library, the formulas and known cases; its interval covers the true value."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medgen.metrics import mmd
from medgen.metrics.mmd import kid


def normal(count: int, width: int = 8, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def test_kid_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = normal(30, 12), normal(30, 12, shift=0.4, seed=1)
    reference = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=30)
    reference.update(real, real=True)
    reference.update(generated, real=False)
    assert kid(real, generated).value == pytest.approx(float(reference.compute()[0]), rel=1e-5)


def slow_kid(real: Tensor, generated: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(rows: Tensor) -> float:
        return float(np.mean([kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]))

    return within(real) + within(generated) - 2 * float(np.mean([kernel(x, y) for x in real for y in generated]))


@pytest.mark.parametrize("name", ["cubic", "gaussian"])
def test_value_and_interval_follow_the_formulas_for_different_sizes_and_patients(name: str) -> None:
    real, generated, patients = normal(9, 4), normal(6, 4, 0.5, seed=1), list("aabbbcdde")

    def slow(rows: Tensor, keys: list[str], others: Tensor) -> float:
        def kernel(x: Tensor, y: Tensor) -> float:
            return float((x @ y / 4 + 1) ** 3 if name == "cubic" else torch.exp(-((x - y) ** 2).sum() / (2 * 1.5**2)))

        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if keys[i] != keys[j]]
        own = [kernel(rows[i], rows[j]) for i, j in pairs]
        among = [kernel(x, y) for i, x in enumerate(others) for j, y in enumerate(others) if i != j]
        return float(np.mean(own) + np.mean(among) - 2 * np.mean([kernel(x, y) for x in rows for y in others]))

    found = kid(real, generated, patients) if name == "cubic" else mmd.mmd(real, generated, 1.5, patients).interval
    without_patient = []
    for left_out in dict.fromkeys(patients):
        kept = [i for i, patient in enumerate(patients) if patient != left_out]
        without_patient.append(slow(real[kept], [patients[i] for i in kept], generated))
    without_generated = [slow(real, patients, generated[torch.arange(6) != i]) for i in range(6)]
    variance = sum((len(v) - 1) * np.var(v) for v in (without_patient, without_generated))
    assert found.value == pytest.approx(slow(real, patients, generated))
    assert found.high - found.value == pytest.approx(1.959964 * variance**0.5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


@pytest.mark.parametrize("name", ["cubic", "gaussian"])
def test_several_images_per_patient_do_not_bias_the_value(name: str) -> None:
    """40 patients with 3 images each, with a correlation of 0.81; the true value is 0."""
    values, above, patients = [], 0, list(np.repeat(np.arange(40), 3))
    for trial in range(60):
        own = normal(40, 16, seed=trial).repeat_interleave(3, 0)
        real = 0.9 * own + 0.19**0.5 * normal(120, 16, seed=10_000 + trial)
        generated = normal(500, 16, seed=20_000 + trial)
        found = kid(real, generated, patients) if name == "cubic" else mmd.mmd(real, generated, 5.0, patients).interval
        values.append(found.value)
        above += found.low > 0
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5
    assert above / 60 <= 0.05


def test_difference_of_two_models_is_the_difference_of_values_and_its_interval_covers_the_truth() -> None:
    better = normal(3000, 4, 0.2, 7)
    worse = normal(3000, 4, 0.35, 8)
    truth = mmd.mmd_difference(*(mmd.mmd(normal(4000, 4, 0, 9), rows, 2.8) for rows in (worse, better)))[0]
    covered, narrower = 0, 0
    for trial in range(60):
        real = normal(60, 4, 0, 100 + trial).repeat_interleave(2, 0) + 0.1 * normal(120, 4, 0, 200 + trial)
        patients = list(np.repeat(np.arange(60), 2))
        sets = [normal(400, 4, shift, seed + trial) for shift, seed in ((0.35, 1000), (0.2, 3000))]
        one, other = (mmd.mmd(real, rows, 2.8, patients) for rows in sets)
        difference, error = mmd.mmd_difference(one, other, patients)
        assert difference == pytest.approx(one.interval.value - other.interval.value)
        covered += abs(difference - truth) < 1.96 * error
        narrower += 2 * 1.96 * error < one.interval.high - one.interval.low
    assert 0.88 <= covered / 60 <= 1.0
    assert narrower / 60 > 0.9  # the noise of the common real images cancels


def test_paired_mmd_is_unbiased_for_images_and_their_reconstructions() -> None:
    """The plain MMD is far below 0, because each image is near its own reconstruction."""
    found, plain = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        patients = [row // 2 for row in range(40)]
        own = torch.randn(20, 8, generator=generator).repeat_interleave(2, 0)
        real = own + 0.3 * torch.randn(40, 8, generator=generator)
        images = own + 0.3 * torch.randn(40, 8, generator=generator)
        found.append(mmd.paired_mmd(real, images, 4.0, patients))
        plain.append(mmd.mmd(real, images, 4.0, patients).interval.value)
    found, plain = torch.tensor(found), torch.tensor(plain)
    error = float(found.std() / 40**0.5)
    assert abs(float(found.mean())) < 3 * error < -float(plain.mean())


def test_paired_mmd_of_shifted_images_agrees_with_unpaired_images() -> None:
    real = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    other = torch.randn(600, 4, generator=torch.Generator().manual_seed(1))
    shifted, expected = mmd.paired_mmd(real, real + 0.5, 2.0), mmd.mmd(real, other + 0.5, 2.0).interval
    assert expected.low < shifted < expected.high
    kept = torch.ones(600, 600).bool().fill_diagonal_(False)
    kernel = mmd.gaussian(2.0)
    terms = kernel(real, real) + kernel(real + 0.5, real + 0.5) - 2 * kernel(real, real + 0.5)
    assert shifted == pytest.approx(float(terms[kept].mean()), rel=1e-4)
    with pytest.raises(ValueError, match="found 1, expected at least 2"):
        mmd.paired_mmd(real, real, 2.0, ["a"] * 600)


@pytest.mark.parametrize("size", [50, 1500])
def test_bandwidth_is_the_median_distance(size: int) -> None:
    features = normal(size, 6)
    distances = torch.nn.functional.pdist(features)
    assert mmd.median_distance(features) == pytest.approx(float(distances.median()), rel=0.02)


@pytest.mark.parametrize(("other", "bandwidth"), [((0.0, 0.0), 1.0), ((6.0, 8.0), 9 * 10.0 / 45)])
def test_a_set_of_mostly_equal_images_has_a_bandwidth_too(other: tuple[float, float], bandwidth: float) -> None:
    features = torch.zeros(10, 2)
    features[0] = torch.tensor(other)
    assert mmd.median_distance(features) == pytest.approx(bandwidth)
    assert np.isfinite(mmd.mmd(features, features, bandwidth).interval.value)


def test_kid_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kid(normal(20), normal(30, seed=1))
    monkeypatch.setattr(mmd, "_VALUES_PER_BLOCK", 7 * 30)
    assert kid(normal(20), normal(30, seed=1)) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("shift", "truth", "lowest", "highest"),
    [(0.3, None, 0.91, 0.99), (0.0, 0.0, 0.95, 1.0)],
    ids=["different sets", "equal sets, where the interval is too wide"],
)
def test_kid_interval_covers_the_truth(shift: float, truth: float | None, lowest: float, highest: float) -> None:
    if truth is None:  # KID is unbiased, so the mean over large draws approximates the true value
        truth = float(np.mean([kid(normal(2000, 4, 0, s), normal(2000, 4, shift, -s)).value for s in (1, 2)]))
    num_covered = 0
    for trial in range(200):
        interval = kid(normal(60, 4, 0, 1000 + trial), normal(90, 4, shift, 5000 + trial))
        num_covered += interval.low <= truth <= interval.high
    assert lowest <= num_covered / 200 <= highest


def test_kid_interval_depends_on_patients_not_images() -> None:
    real, generated = normal(40, 4), normal(400, 4, 0.3, seed=1)
    thrice, patients = real.repeat_interleave(3, dim=0), list(np.repeat(np.arange(40), 3))
    once = kid(real, generated)
    blind, by_patient = kid(thrice, generated), kid(thrice, generated, patients)
    assert blind.high - blind.low < 0.75 * (once.high - once.low)
    assert by_patient.high - by_patient.low == pytest.approx(once.high - once.low, rel=0.05)


@pytest.mark.parametrize(
    ("real", "groups", "message"),
    [(normal(2), None, "at least 3 images"), (normal(5), ["a"] * 4 + ["b"], "found 2, expected at least 3")],
)
def test_too_few_images_or_groups_for_kid_are_an_error(real: Tensor, groups: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kid(real, normal(9, seed=1), groups)
