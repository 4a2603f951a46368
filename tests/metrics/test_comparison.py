"""Permutation tests of two models: exact under the null hypothesis, each statistic equal to its definition."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from medgen.metrics import comparison
from medgen.metrics.c2st import linear_auc
from medgen.metrics.comparison import ImageSet, compare, holm
from medgen.metrics.mmd import mmd
from medgen.metrics.spectrum import spectrum_distance


def image_set(count: int, seed: int, shift: float = 0.0, scale: float = 1.0, power: float = 1.0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    features = shift + scale * torch.randn(count, 6, generator=generator)
    falling = torch.arange(1, 9).float() ** -1.5
    return ImageSet(features, power * falling * torch.exp(0.3 * torch.randn(count, 8, generator=generator)))


PATIENTS = list(np.repeat(np.arange(30), 2))


def found(candidate: ImageSet, reference: ImageSet, num_permutations: int = 199) -> dict[str, comparison.Comparison]:
    all_found = compare(candidate, reference, image_set(60, 99), 3.4, PATIENTS, num_permutations)
    return {one.name: one for one in all_found}


def swapped(one: ImageSet, other: ImageSet, signs: torch.Tensor) -> ImageSet:
    keep = (signs > 0)[:, None]
    return ImageSet(torch.where(keep, one.features, other.features), torch.where(keep, one.power, other.power))


def recall(real: ImageSet, samples: ImageSet) -> float:
    among = torch.cdist(samples.features, samples.features)
    radii = among.kthvalue(4, dim=1).values  # the nearest is the sample itself
    return float((torch.cdist(real.features, samples.features) <= radii).any(1).double().mean())


DEFINITIONS: dict[str, Callable[[ImageSet, ImageSet], float]] = {
    "mmd": lambda real, samples: mmd(real.features, samples.features, 3.4, PATIENTS).interval.value,
    "spectrum": lambda real, samples: spectrum_distance(samples.power, real.power),
    "c2st": lambda real, samples: linear_auc(real.features, samples.features, PATIENTS).value,
    "recall": recall,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_differences_after_swaps_equal_those_of_swapped_sets(name: str) -> None:
    one, other, real = image_set(80, 1, 0.2), image_set(80, 2, scale=0.8), image_set(60, 99)
    statistic = {
        "mmd": lambda: comparison._MMD(one, other, real, 3.4, PATIENTS),
        "spectrum": lambda: comparison._Spectrum(one, other, real),
        "c2st": lambda: comparison._C2ST(one, other, real, PATIENTS),
        "recall": lambda: comparison._Recall(one, other, real),
    }[name]()
    signs = 2.0 * torch.randint(2, (5, 80), generator=torch.Generator().manual_seed(3)).float() - 1.0
    signs[0] = 1.0
    measure = DEFINITIONS[name]
    expected = [measure(real, swapped(one, other, row)) - measure(real, swapped(other, one, row)) for row in signs]
    assert statistic.differences(signs, torch.arange(60)).tolist() == pytest.approx(expected, abs=2e-6)
    assert statistic.observed() == pytest.approx((measure(real, one), measure(real, other)), abs=2e-6)


def test_equal_models_are_rejected_in_about_5_percent() -> None:
    rejected = [
        min(
            one.p
            for one in compare(
                image_set(100, 2 * t), image_set(100, 2 * t + 1), image_set(60, 9000 + t), 3.4, PATIENTS, 99
            )
        )
        < 0.05
        for t in range(100)
    ]
    assert np.mean(rejected) <= 0.09


@pytest.mark.parametrize(
    ("worse", "detected_by"),
    [
        ({"shift": 0.4}, {"mmd", "c2st"}),
        ({"power": 0.7}, {"spectrum"}),
        ({"scale": 0.4}, {"mmd", "recall"}),
    ],
    ids=["shifted", "blurred", "collapsed"],
)
def test_a_worse_model_is_detected_by_the_expected_statistics(worse: dict[str, float], detected_by: set[str]) -> None:
    good, bad = image_set(400, 1), image_set(400, 2, **worse)
    tests = found(bad, good)
    assert detected_by <= {name for name, one in tests.items() if one.p < 0.05}
    assert all(tests[name].difference > tests[name].detectable > 0 for name in detected_by)
    assert min(one.p for one in found(good, bad).values()) > 0.3  # the better model is not rejected


def test_recall_alone_prefers_samples_that_spread_too_far() -> None:
    """A known flaw that the gate on recall considers: balls around outlying samples are large."""
    tests = found(image_set(400, 1), image_set(400, 2, scale=1.5))
    assert tests["recall"].p < 0.05
    assert tests["mmd"].high < 0.0


def test_pairs_with_common_noise_have_more_power() -> None:
    good, other = image_set(300, 1), image_set(300, 2)
    near = ImageSet(good.features + 0.1, good.power)
    far = ImageSet(other.features + 0.1, other.power)
    assert found(near, good)["mmd"].detectable < 0.5 * found(far, good)["mmd"].detectable


@pytest.mark.parametrize(
    ("values", "corrected"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.9], [1.0, 1.0]), ([0.02], [0.02])],
)
def test_holm_corrects_p_values_as_in_the_paper(values: list[float], corrected: list[float]) -> None:
    assert holm(values) == pytest.approx(corrected)


def test_different_numbers_of_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="as many samples of each model"):
        compare(image_set(10, 0), image_set(11, 1), image_set(12, 2), 3.4)
