"""Classifier two-sample tests: chance for equal sets, also with several images per patient; other sets are found."""

import numpy as np
import pytest
import torch
from torch import Tensor

from medgen.metrics.c2st import assign_folds, auc_interval, linear_auc, network_auc, placements


def normal(count: int, width: int = 8, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + shift


def test_placements_agree_with_sklearn_auc_with_ties() -> None:
    from sklearn.metrics import roc_auc_score

    real, generated = (4 * normal(50, 1)[:, 0]).round(), (4 * normal(70, 1, 0.5, 1)[:, 0]).round()
    expected = roc_auc_score([0] * 50 + [1] * 70, torch.cat([real, generated]))
    of_real, of_generated = placements(real, generated)
    assert float(of_real.mean()) == pytest.approx(expected)
    assert float(of_generated.mean()) == pytest.approx(expected)


def test_folds_keep_patients_together_and_have_equal_sizes() -> None:
    patients = list(np.repeat(np.arange(40), 3)) + list(range(100, 120))
    folds = assign_folds(140, patients)
    for patient in set(patients):
        assert len(set(folds[[p == patient for p in patients]].tolist())) == 1
    counts = torch.bincount(folds)
    assert counts.max() - counts.min() <= 3


def test_linear_auc_agrees_with_sklearn_discriminant() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import roc_auc_score

    real, generated = normal(300, 6), normal(300, 6, 0.25, 1)
    folds, features = assign_folds(300), torch.cat([real, generated]).numpy()
    target, fold_of = np.repeat([0, 1], 300), torch.cat([folds, folds]).numpy()
    aucs = []
    for fold in range(5):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
        model.fit(features[fold_of != fold], target[fold_of != fold])
        aucs.append(roc_auc_score(target[fold_of == fold], model.decision_function(features[fold_of == fold])))
    assert linear_auc(real, generated).value == pytest.approx(np.mean(aucs), abs=0.01)


def test_linear_auc_is_chance_for_equal_sets_with_several_images_per_patient() -> None:
    values, inside = [], 0
    for trial in range(40):
        sets = [normal(30, 20, seed=seed + trial).repeat_interleave(3, 0) for seed in (0, 1000)]
        found = linear_auc(*sets, *[list(np.repeat(np.arange(30), 3))] * 2)
        values.append(found.value)
        inside += found.low <= 0.5 <= found.high
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)
    assert inside / 40 > 0.6  # the interval does not cover the training of the classifiers


@pytest.mark.parametrize(("shift", "lowest", "highest"), [(0.0, 0.35, 0.65), (0.3, 0.6, 0.9), (2.0, 0.999, 1.0)])
def test_linear_auc_grows_with_the_difference(shift: float, lowest: float, highest: float) -> None:
    assert lowest <= linear_auc(normal(95, 8), normal(500, 8, shift, 1)).value <= highest


@pytest.mark.parametrize(
    ("sigma", "lowest", "highest"), [(0.0, 0.25, 0.75), (0.6, 0.9, 1.0)], ids=["other images", "blurred"]
)
def test_network_auc_is_high_for_blur_and_chance_for_equal_sets(
    textured, sigma: float, lowest: float, highest: float
) -> None:
    images = textured(60, 32), textured(60, 32, seed=1, blur=sigma)
    sets = [(one * 255).round().to(torch.uint8) for one in images]
    found = network_auc(*sets)
    assert lowest <= found.value <= highest
    assert found == network_auc(*sets)  # deterministic for a seed


@pytest.mark.parametrize("size", [(31, 33), (96, 80)], ids=["odd sides", "larger than a patch"])
def test_network_auc_accepts_any_size_and_colour(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (24, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert 0.0 <= network_auc(images[:12], images[12:]).value <= 1.0


def test_interval_covers_the_spread_over_other_images() -> None:
    folds = torch.zeros(80, dtype=torch.int64), torch.zeros(120, dtype=torch.int64)
    found = [auc_interval(normal(80, 1, seed=s)[:, 0], normal(120, 1, 0.8, 500 + s)[:, 0], *folds) for s in range(200)]
    halves = [(one.high - one.low) / 2 for one in found]
    assert np.mean(halves) == pytest.approx(1.96 * np.std([one.value for one in found]), rel=0.15)


def test_too_few_groups_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected 3 groups or more"):
        network_auc(*(torch.zeros(size, 1, 32, 32, dtype=torch.uint8) for size in (4, 9)), list("aabb"))
