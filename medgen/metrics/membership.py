"""Membership inference: how well an attacker who has an image can tell whether a model was trained on it.

Two attacks rank images; a high score means a guess that the image is a member:

- loss: the reconstruction error is low for an image of that spectrum. Log errors are compared with those expected by
  linear regression on the log power in five bands of frequency, over members and others together, because detailed
  images have large errors in every model.
- distance: a sample is near the image, by the distance of `medgen.metrics.privacy.nearest_by_pixels`.

The AUC is 0.5 by chance and 1 if every member is ranked above all others. It describes membership only if members and
others come from one population; otherwise a difference between them counts as well.

Shapes: N members, M other images, R radial frequencies.
Sources: Yeom et al., Privacy risk in machine learning, 2018 (loss); Chen et al., GAN-Leaks, 2020 (distance, and its
calibration); Hilprecht et al., Monte Carlo and reconstruction membership inference attacks, 2019.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from medgen.metrics.c2st import MIN_GROUPS, auc_interval
from medgen.metrics.intervals import Groups, Interval, group_rows
from medgen.metrics.spectrum import BAND_EDGES, log_power

ATTACKS = ("loss", "distance")
_TINY = 1e-12


class AttackedImages(NamedTuple):
    """Values of the images of a set, which an attacker can compute."""

    error: Tensor  # (N,) mean squared error of the reconstruction
    power: Tensor  # (N, R) radial power of the image
    distance: Tensor  # (N,) to the nearest sample
    groups: Groups  # patient of each image


def can_be_attacked(images: AttackedImages) -> bool:
    """True if there are enough patients for an interval."""
    return len(group_rows(len(images.error), images.groups)) >= MIN_GROUPS


def attack(members: AttackedImages, others: AttackedImages) -> dict[str, Interval]:
    """AUC of each attack, with its 95 % interval by patient."""
    both = [torch.cat(pair) for pair in zip(members[:3], others[:3], strict=True)]
    scores = {"loss": -_unexpected_error(both[0], both[1]), "distance": -both[2]}
    size, folds = len(members.error), [torch.zeros(len(each.error)) for each in (others, members)]
    return {
        name: auc_interval(values[size:], values[:size], folds[0], folds[1], others.groups, members.groups)
        for name, values in scores.items()
    }


def _unexpected_error(error: Tensor, power: Tensor) -> Tensor:
    """Log error (N,) minus that expected by regression on the log power (N, R) in bands."""
    edges = [round(edge * power.shape[1]) for edge in BAND_EDGES[1:-1]]
    bands = [part.mean(dim=1) for part in log_power(power.double()).tensor_split(edges, dim=1)]
    known = torch.stack([torch.ones_like(bands[0]), *bands], dim=1)
    target = (error.double() + _TINY).log()[:, None]
    expected: Tensor = known @ torch.linalg.lstsq(known, target).solution
    return (target - expected)[:, 0]
