"""Classifier two-sample test (C2ST): cross-validated AUC of a classifier that separates generated from real images.

The area under the ROC curve (AUC) is 0.5 where the classifier cannot separate the two sets and 1 where it recognises
every generated image. Folds are cut by patient: no classifier is tested on a patient it was trained on.

Two classifiers: a linear discriminant on features, and a small convolutional network on pixels.

Shapes: N real images, M generated images, D features.
Sources: Lopez-Paz and Oquab, Revisiting classifier two-sample tests, 2017; DeLong et al., Comparing the areas under
correlated ROC curves, 1988 (the interval).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen.data.images import Images, to_floats
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import Groups, Interval, group_rows, mean_variance, select_groups

INPUTS = ("spectrum", "domain", "pixels")  # of the classifiers in metrics.json: generation/c2st_auc_INPUT
NUM_FOLDS = 5
MIN_GROUPS = 2 * NUM_FOLDS  # patients in each set, so that a fold has at least two
SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity: few real images, many features
_NUM_NETWORK_FOLDS = 3
_PATCH = 64  # side in pixels of the patches that the network is trained on; smaller images are used whole
_MAX_IMAGES = 1000  # of each set, to train and to test the networks
_WIDTHS = (32, 64)
_STEPS = 60  # training steps of each fold's network
_BATCH_SIZE = 32  # half of it real
_LEARNING_RATE = 3e-3

Scores = Callable[[Tensor], Tensor]  # images or features (N, ...) -> scores (N,), higher for generated ones


def assign_folds(count: int, groups: Groups = None, num_folds: int = NUM_FOLDS) -> Tensor:
    """Fold index (count,) of each image; a group's images go together into the smallest fold so far."""
    folds, sizes = torch.empty(count, dtype=torch.int64), [0] * num_folds
    for rows in group_rows(count, groups):
        fold = sizes.index(min(sizes))
        folds[rows], sizes[fold] = fold, sizes[fold] + len(rows)
    return folds


def linear_auc(
    real: Tensor, generated: Tensor, real_groups: Groups = None, generated_groups: Groups = None
) -> Interval:
    """AUC of a cross-validated linear discriminant on features (N, D) and (M, D), with an interval by group.

    Raises:
        ValueError: a set has fewer groups than folds.
    """

    def fit(_: int, *kept: Tensor) -> Scores:
        moments = [(images.mean(0), torch.cov(images.T, correction=0)) for images in kept]
        direction = discriminant(*moments[0], *moments[1])
        return lambda images: images @ direction

    scale, shift = _standardise(real, generated)
    sets = [(images.double() - shift) / scale for images in (real, generated)]
    return _cross_validate(sets, (real_groups, generated_groups), NUM_FOLDS, fit)


def network_auc(
    real: Images,
    generated: Images,
    real_groups: Groups = None,
    generated_groups: Groups = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Interval:
    """AUC of a small convolutional network on stored pixels (N, C, H, W) and (M, C, H, W), with an interval by group.

    Training uses patches of at most 64 x 64 pixels at full resolution, mirrored at random, and at most 1,000 images of
    each set, spread evenly over it.

    Raises:
        ValueError: a set has fewer groups than folds.
    """

    def fit(fold: int, kept_real: Tensor, kept_generated: Tensor) -> Scores:
        with torch.random.fork_rng():
            torch.manual_seed(seed + fold)
            network = _train(kept_real, kept_generated, torch.Generator().manual_seed(seed + fold), device)
        return lambda images: _network_scores(network, images, device)

    rows = [subsample(torch.arange(len(images)), min(len(images), _MAX_IMAGES)) for images in (real, generated)]
    groups = [select_groups(keys, own) for keys, own in zip((real_groups, generated_groups), rows, strict=True)]
    return _cross_validate([real[rows[0]], generated[rows[1]]], groups, _NUM_NETWORK_FOLDS, fit)


def _cross_validate(
    sets: Sequence[Tensor], groups: Sequence[Groups], num_folds: int, fit: Callable[..., Scores]
) -> Interval:
    """AUC of a classifier on real and generated images, each tested by the classifier of the other folds.

    `fit` gets the index of a fold and the real and generated images of the others.
    """
    folds = [assign_folds(len(images), keys, num_folds) for images, keys in zip(sets, groups, strict=True)]
    if any(int(own.max()) < num_folds - 1 for own in folds):
        raise ValueError(f"c2st: expected {num_folds} groups or more, found {[len(images) for images in sets]} images")
    scores = [torch.zeros(len(images), dtype=torch.float64) for images in sets]
    for fold in range(num_folds):
        score = fit(fold, *(images[own != fold] for images, own in zip(sets, folds, strict=True)))
        for images, own, found in zip(sets, folds, scores, strict=True):
            found[own == fold] = score(images[own == fold]).double()
    return auc_interval(scores[0], scores[1], folds[0], folds[1], *groups)


def discriminant(mean_real: Tensor, cov_real: Tensor, mean_generated: Tensor, cov_generated: Tensor) -> Tensor:
    """Fisher's discriminant (..., D), pointing from real to generated, from means (..., D) and covariances (..., D, D).

    Both covariances have equal weight, whatever the sets' sizes; their mean is shrunk towards a multiple of the
    identity.
    """
    pooled = 0.5 * (cov_real + cov_generated)
    level = pooled.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
    identity = torch.eye(pooled.shape[-1], dtype=pooled.dtype)
    shrunk = (1.0 - SHRINKAGE) * pooled + SHRINKAGE * level * identity
    direction: Tensor = torch.linalg.solve(shrunk, mean_generated - mean_real)
    return direction


def placements(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Share of `upper` (..., m) above each `lower` score (..., n), and share of `lower` below each `upper` score.

    Ties count half. The mean of either result is the AUC.
    """
    above = _share_above(lower, upper)
    below = _share_above(-upper, -lower)
    return above, below


def auc_interval(
    real: Tensor,
    generated: Tensor,
    real_folds: Tensor,
    generated_folds: Tensor,
    real_groups: Groups = None,
    generated_groups: Groups = None,
) -> Interval:
    """AUC of out-of-fold scores (N,) and (M,), higher for generated images, with an interval by group.

    Scores of different folds come from different classifiers, so only scores of one fold are compared. The interval
    covers the choice of images, not the training of the classifiers.
    """
    of_real, of_generated = torch.zeros(len(real)).double(), torch.zeros(len(generated)).double()
    for fold in range(int(real_folds.max()) + 1):
        rows, others = real_folds == fold, generated_folds == fold
        of_real[rows], of_generated[others] = placements(real[rows].double(), generated[others].double())
    variance = mean_variance(of_real, real_groups) + mean_variance(of_generated, generated_groups)
    return Interval.from_error(float(of_real.mean()), variance**0.5)


def _share_above(lower: Tensor, upper: Tensor) -> Tensor:
    ordered = upper.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, lower.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, lower.contiguous(), right=True)
    return 1.0 - 0.5 * (below + not_above).double() / upper.shape[-1]


def _standardise(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and mean (D,) of the real features; a constant feature takes the scale of the generated images."""
    scale = real.double().std(dim=0, correction=0)
    scale = torch.where(scale > 1e-9, scale, generated.double().std(dim=0, correction=0).clamp_min(1e-9))
    return scale, real.double().mean(dim=0)


class _Network(nn.Module):
    """Patches (B, C, h, w) -> logits (B,), higher for generated ones; pixel-unshuffle keeps every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [4 * channels, *_WIDTHS]
        self.layers = nn.Sequential(nn.PixelUnshuffle(2))
        for before, after in pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            self.layers.extend([convolution, nn.GroupNorm(4, after), nn.SiLU()])
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, patches: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(patches).mean(dim=(2, 3)))
        return logits[:, 0]


def _train(real: Tensor, generated: Tensor, generator: torch.Generator, device: torch.device | str) -> _Network:
    """A network trained on half real, half generated patches."""
    network = _Network(real.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    target = torch.arange(_BATCH_SIZE, device=device) % 2
    side = [min(_PATCH, size) // 2 * 2 for size in real.shape[2:]]
    for _ in range(_STEPS):
        rows = [torch.randint(len(images), (_BATCH_SIZE // 2,), generator=generator) for images in (real, generated)]
        images = torch.stack([real[rows[0]], generated[rows[1]]], dim=1).flatten(0, 1)  # alternating
        top, left = (
            int(torch.randint(size - own + 1, (), generator=generator))
            for size, own in zip(images.shape[2:], side, strict=True)
        )
        patches = _floats(images[..., top : top + side[0], left : left + side[1]]).to(device)
        if bool(torch.randint(2, (), generator=generator)):
            patches = patches.flip(-1)
        loss = F.binary_cross_entropy_with_logits(network(patches), target.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def _network_scores(network: _Network, images: Tensor, device: torch.device | str) -> Tensor:
    """Sum of the logits (N,) of each whole image and its mirror image; the network takes any even side."""
    height, width = (size // 2 * 2 for size in images.shape[2:])
    parts = []
    for part in torch.split(images[..., :height, :width], _BATCH_SIZE):
        patches = _floats(part).to(device)
        parts.append((network(patches) + network(patches.flip(-1))).cpu())
    return torch.cat(parts)


def _floats(images: Tensor) -> Tensor:
    return 2.0 * to_floats(images) - 1.0
