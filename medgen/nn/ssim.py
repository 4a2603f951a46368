"""Structural similarity, as a training loss and as a metric."""

from functools import lru_cache

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for a data range of 1


def ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity (B,) of two batches (B, C, H, W) or (B, C, D, H, W), data range 1."""
    return ssim_map(original, reconstruction).flatten(1).mean(dim=1)


def ssim_map(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity (B, C, H - 10, W - 10) of each window that lies inside the images; see `ssim`.

    The Gaussian window has 11 pixels a side. It is separable: two matrix products filter an image, three a volume. For
    images this is three times as fast as convolutions with one channel. The numbers are those of pytorch_msssim.ssim
    (tests/nn/test_ssim.py).

    Source: Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, 2004, eq. 13.
    """
    x, y = original.float(), reconstruction.float()
    *slices, rows, columns = (_window(side, x.device) for side in x.shape[2:])

    def local_mean(image: Tensor) -> Tensor:
        means = rows @ (image @ columns.T)  # valid positions only
        if not slices:
            return means
        return (slices[0] @ means.flatten(-2)).view(*means.shape[:2], -1, *means.shape[-2:])

    mean_x, mean_y = local_mean(x), local_mean(y)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance = local_mean(x * y) - product
    variances = local_mean(x.square() + y.square()) - squares  # the sum of both
    return (2.0 * product + C1) * (2.0 * covariance + C2) / ((squares + C1) * (variances + C2))


@lru_cache(maxsize=16)
def _window(side: int, device: torch.device) -> Tensor:
    """Band matrix (side - 10, side) of the normalised window at each position that has all its pixels."""
    reach = WINDOW // 2
    offset = torch.arange(side) - torch.arange(reach, side - reach)[:, None]
    weight = torch.exp(-offset.double().square() / (2 * SIGMA**2)) * (offset.abs() <= reach)
    return (weight / weight.sum(dim=1, keepdim=True)).float().to(device)
