"""Radial power spectra: whether images hold as much fine detail as real ones.

Blurred images lack power in the high frequencies, noisy ones have too much there. Neither SSIM nor features of a
classifier need notice, and a person does.

Shapes: N images (N, C, H, W), R radial frequencies from 1 to the Nyquist frequency, in cycles per image.
"""

from itertools import pairwise

import torch
from torch import Tensor

BAND_EDGES = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the bands, as shares of the Nyquist frequency
NUM_BANDS = len(BAND_EDGES) - 1
_IMAGES_PER_BATCH = 256
_FLOOR = 1e-8  # power of an image that shows nothing; quantisation to 256 grey values alone has more


def radial_power(images: Tensor) -> Tensor:
    """Mean power (N, R) at each radial frequency of images (N, C, H, W), uint8 or floats in [0, 1].

    The mean of each channel is taken off and a Hann window put on, so that image borders, where opposite sides do
    not meet, add no power of their own. A coefficient counts at its distance from 0, rounded; channels are averaged.
    """
    height, width = images.shape[-2:]
    window = torch.outer(torch.hann_window(height), torch.hann_window(width))
    ring = radial_index(height, width).flatten()
    num_frequencies = min(height, width) // 2
    counts = torch.bincount(ring, minlength=num_frequencies + 1)[1 : num_frequencies + 1]
    parts = []
    for part in torch.split(images, _IMAGES_PER_BATCH):
        part = part if part.is_floating_point() else part.float() / 255.0
        centred = (part - part.mean(dim=(2, 3), keepdim=True)) * window
        power = torch.fft.fft2(centred, norm="ortho").abs().square().mean(dim=1).flatten(1)  # (n, H·W)
        sums = torch.zeros(len(part), int(ring.max()) + 1).index_add_(1, ring, power)
        parts.append(sums[:, 1 : num_frequencies + 1] / counts)
    return torch.cat(parts)


def log_power(power: Tensor) -> Tensor:
    """Natural logarithm of radial power, bounded below so that an empty image has one too."""
    return power.clamp_min(_FLOOR).log()


def band_ratios(power: Tensor, real: Tensor) -> list[float]:
    """Mean power over that of real images, in each of the five bands of `BAND_EDGES`: 1 is as real, lower is blurred.

    Args:
        power: (N, R) of the images, as `radial_power` gives it.
        real: (M, R) of real ones.
    """
    num_frequencies = power.shape[1]
    share = torch.arange(1, num_frequencies + 1) / num_frequencies
    frequencies = torch.arange(1, num_frequencies + 1).double()  # a ring has as many coefficients as it is long
    ratios = []
    for low, high in pairwise(BAND_EDGES):
        ring = (frequencies * ((share > low) & (share <= high))).float()
        ratios.append(float((power.mean(0) @ ring) / (real.mean(0) @ ring).clamp_min(_FLOOR)))
    return ratios


def spectrum_distance(power: Tensor, real: Tensor) -> float:
    """Root mean square over frequencies of the log ratio of mean power (N, R) to that of real images (M, R)."""
    return float((log_power(power.mean(0)) - log_power(real.mean(0))).square().mean().sqrt())


def radial_index(height: int, width: int) -> Tensor:
    """Radial frequency (H, W) of each coefficient of `fft2`, in cycles per shorter side, rounded."""
    side = min(height, width)
    rows, columns = (torch.fft.fftfreq(size) * side for size in (height, width))
    return torch.hypot(rows[:, None], columns[None, :]).round().long()
