"""Membership attacks find a model that has learnt its train images by heart, and do not accuse an honest one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.evaluation.privacy import evaluate_membership
from medgen.metrics.membership import AttackedImages, attack, can_be_attacked
from medgen.metrics.spectrum import radial_power


def draw_images(count: int, seed: int, detail: float = 0.05) -> Tensor:
    """Images (N, 1, 32, 32) in [0, 1], each with its own smooth part and an own amount of fine detail."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 8, 8, generator=generator)
    amount = detail * (0.5 + torch.rand(count, 1, 1, 1, generator=generator))
    fine = amount * torch.randn(count, 1, 32, 32, generator=generator)
    return (0.5 + 0.12 * F.interpolate(coarse, (32, 32), mode="bicubic") + fine).clamp(0, 1)


def fit_autoencoder(images: Tensor, num_latent: int = 48) -> Callable[[Tensor], Tensor]:
    """The linear autoencoder that is optimal for these images."""
    mean = images.flatten(1).mean(dim=0)
    axes = torch.linalg.svd(images.flatten(1) - mean, full_matrices=False).Vh[:num_latent]
    return lambda inputs: ((inputs.flatten(1) - mean) @ axes.T @ axes + mean).view(inputs.shape)


def attacked(network: Callable[[Tensor], Tensor], images: Tensor, images_per_patient: int = 2) -> AttackedImages:
    error = (network(images) - images).square().mean(dim=(1, 2, 3))
    distance = torch.rand(len(images), generator=torch.Generator().manual_seed(len(images)))  # of an honest model
    return AttackedImages(
        error, radial_power(images), distance, [row // images_per_patient for row in range(len(images))]
    )


MEMBERS, OTHERS = draw_images(60, seed=0), draw_images(300, seed=1)


def test_the_loss_attack_finds_an_overfitted_model_and_not_an_honest_one() -> None:
    """The honest model is trained on the same images among a thousand others, and has a small latent."""
    overfitted = fit_autoencoder(MEMBERS)
    honest = fit_autoencoder(torch.cat([MEMBERS, draw_images(1000, seed=3)]), num_latent=6)
    found = attack(attacked(overfitted, MEMBERS), attacked(overfitted, OTHERS))["loss"]
    assert found.value > 0.95 and found.low > 0.9
    found = attack(attacked(honest, MEMBERS), attacked(honest, OTHERS))["loss"]
    assert found.value < 0.7


def test_images_that_even_an_overfitted_model_has_not_seen_give_chance() -> None:
    overfitted = fit_autoencoder(MEMBERS)
    pairs = [(draw_images(60, 2 * seed), draw_images(80, 2 * seed + 1)) for seed in range(50, 70)]
    found = [attack(*(attacked(overfitted, images) for images in pair))["loss"] for pair in pairs]
    assert sum(each.value for each in found) / 20 == pytest.approx(0.5, abs=0.03)
    assert sum(each.low < 0.5 < each.high for each in found) >= 18


def test_images_that_any_model_finds_harder_do_not_count_as_unknown() -> None:
    """The others have more detail: their errors are larger in every model."""
    network, detailed = fit_autoencoder(draw_images(600, seed=3)), draw_images(80, seed=1, detail=0.1)
    members, others = attacked(network, MEMBERS), attacked(network, detailed)
    assert (members.error.mean() / others.error.mean()) < 0.75
    found = attack(members, others)["loss"]
    assert found.low < 0.5 < found.high


def test_a_shift_of_one_split_is_not_taken_for_membership() -> None:
    generator = torch.Generator().manual_seed(0)

    def images(count: int, mean: float) -> AttackedImages:
        error = torch.exp(mean + torch.randn(count, generator=generator))
        groups = [f"{count}-{row // 2}" for row in range(count)]
        return AttackedImages(error, torch.ones(count, 16), mean + torch.rand(count, generator=generator), groups)

    train, val, test = images(200, 0.0), images(60, 0.0), images(100, 3.0)
    assert attack(train, test)["loss"].low > 0.9
    found = evaluate_membership({"train": train, "val": val, "test": test})
    for name in ("loss", "distance"):
        assert found[f"privacy/membership_auc_{name}_ci_low"] < 0.5
    assert evaluate_membership({"train": train, "test": test})["privacy/membership_auc_loss"] > 0.9


def test_too_few_patients_give_no_value() -> None:
    few = AttackedImages(torch.rand(40), torch.ones(40, 16), torch.rand(40), [row // 5 for row in range(40)])
    many = few._replace(groups=list(range(40)))
    assert not can_be_attacked(few) and can_be_attacked(many)
    assert evaluate_membership({"train": many, "test": few}) == {}
    assert evaluate_membership({"train": few, "test": many}) == {}


def test_the_auc_is_the_share_of_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    distances = [torch.rand(count, generator=generator) for count in (30, 20)]
    members, others = (AttackedImages(torch.rand(len(d)), torch.rand(len(d), 16), d, None) for d in distances)
    expected = sum(float(a < b) for a in distances[0] for b in distances[1]) / 600
    assert attack(members, others)["distance"].value == pytest.approx(expected)
