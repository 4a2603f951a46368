"""Scores and maps of how far images are from those that a model was trained on.

- l1, ssim: the reconstruction differs from the image. A model that has seen healthy images only reconstructs a lesion
  badly (Baur et al. 2021; the SSIM map: Bergmann et al. 2019).
- nll: the prior gives the image's latent a low density. With `tokens` the map has the codes that are improbable given
  the others (Pinaya et al. 2022), with `flow` the positions of a latent grid, with an analytic prior the regions whose
  change would raise the density most (the gradient of Zimmerer et al. 2019). A gradient differs from pixel to pixel by
  chance, so it is smoothed.

Shapes: B batch, C channels, H W height and width, h w sides of a latent grid; of volumes D H W and d h w.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.models import GenerativeModel
from medgen.models.base import Latent
from medgen.nn.ssim import WINDOW, ssim_map
from medgen.priors import AnalyticPrior, Prior
from medgen.priors.flow import Flow
from medgen.priors.tokens import Tokens

SMOOTHING = 1 / 16  # of the shorter side: deviation of the Gaussian on a gradient
SCORES = ("l1", "ssim", "nll")  # higher for images that are less like the train images


class Anomalies(NamedTuple):
    """Reconstructions, maps and scores of a batch, on the CPU."""

    reconstruction: Tensor  # (B, C, H, W) in [0, 1]
    error: Tensor  # (B, 1, H, W) absolute difference, mean over channels
    dissimilarity: Tensor  # (B, 1, H, W) 1 - SSIM, mean over channels
    likelihood: Tensor | None  # (B, 1, H, W) in units of its own; None without a map
    scores: Tensor  # (B, 3) in the order of SCORES: means of both maps, negative log density in nats per dimension


def find_anomalies(
    model: GenerativeModel, prior: Prior, images: Tensor, labels: Tensor | None, generator: torch.Generator
) -> Anomalies:
    """Scores and maps of images (B, C, H, W) in [0, 1] on the model's device.

    `labels` (B,) is the class that counts as normal, for a model or prior that uses labels; a prior without them gives
    the density over all classes. `generator` is the source of the flow's random draws.
    """
    differentiable = not isinstance(prior, Flow | Tokens) and model.codebook is None
    with torch.set_grad_enabled(differentiable):
        inputs = images.detach().requires_grad_(differentiable)
        latent = model.encode(inputs, labels)
        nll, grid = _density(prior, latent, labels, generator)
        if differentiable:
            (gradient,) = torch.autograd.grad(nll.sum(), inputs)
            grid = _smooth(gradient.abs().mean(dim=1, keepdim=True))
    with torch.no_grad():
        reconstruction = model.decode(latent.mean.detach(), labels).float()
        error = (images - reconstruction).abs().mean(dim=1, keepdim=True)
        reach = [WINDOW // 2] * 2 * len(images.shape[2:])
        padded = (F.pad(each, reach, mode="reflect") for each in (images, reconstruction))
        dissimilarity = 1.0 - ssim_map(*padded).mean(dim=1, keepdim=True)
        mode = "bilinear" if images.dim() == 4 else "trilinear"
        likelihood = None if grid is None else F.interpolate(grid.float(), images.shape[2:], mode=mode)
    scores = [error.flatten(1).mean(dim=1), dissimilarity.flatten(1).mean(dim=1), nll.detach()]
    return Anomalies(
        reconstruction.cpu(),
        error.cpu(),
        dissimilarity.cpu(),
        None if likelihood is None else likelihood.cpu(),
        torch.stack([score.double().cpu() for score in scores], dim=1),
    )


def _smooth(maps: Tensor) -> Tensor:
    """Maps (B, 1, H, W) smoothed by a Gaussian."""
    from torchvision.transforms.v2.functional import gaussian_blur

    sigma = SMOOTHING * min(maps.shape[2:])
    size = int(8 * sigma + 1) | 1  # odd
    smooth: Tensor = gaussian_blur(maps, [size, size], [sigma, sigma])
    if maps.dim() == 5:
        smooth = gaussian_blur(smooth.transpose(2, 4), [size, 1], [sigma, sigma]).transpose(2, 4)
    return smooth


def _density(
    prior: Prior, latent: Latent, labels: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Negative log density (B,) in nats per dimension, and its share of each position of a grid (B, 1, h, w)."""
    if labels is None or not prior.conditional:
        labels = torch.full((len(latent.mean),), -1, device=latent.mean.device)
    if isinstance(prior, Tokens) and latent.codes is not None:
        shares = -prior.log_likelihood_map(latent.codes, labels)[:, None]
    elif isinstance(prior, Flow):
        shares = -prior.log_density(latent.mean, labels, generator)
    else:
        analytic: AnalyticPrior = prior  # type: ignore[assignment]
        likelihood = analytic.log_likelihood(latent.mean.cpu(), labels.cpu())
        return -likelihood / latent.mean[0].numel(), None
    grid = shares.sum(dim=1, keepdim=True) if shares.dim() > 3 else None
    return shares.flatten(1).mean(dim=1), grid
