"""Radial power spectra, which measure the fine detail of images.

Blurred images have too little power at high frequencies and noisy images too much. A person sees this, but SSIM and the
features of a classifier may not show it.

Shapes: N images (N, C, H, W) or volumes (N, C, D, H, W), R radial frequencies from 1 to the Nyquist frequency, in
cycles per image.
"""

from itertools import pairwise

import torch
from torch import Tensor

from medgen.data.images import to_floats

BAND_EDGES = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the bands, as shares of the Nyquist frequency
NUM_BANDS = len(BAND_EDGES) - 1
_IMAGES_PER_BATCH = 256
_MIN_POWER = 1e-8  # below the power of quantisation to 256 grey values; keeps the logarithm of a blank image finite


def radial_power(images: Tensor) -> Tensor:
    """Mean power (N, R) at each radial frequency of images or volumes, as stored or floats in [0, 1].

    The mean of each channel is subtracted and a Hann window applied, so that the jump between opposite borders adds no
    power. The radial frequency of a coefficient is its rounded distance from 0; channels are averaged.
    """
    sides, axes = images.shape[2:], tuple(range(2, images.dim()))
    window = torch.ones([])
    for side in sides:
        window = window[..., None] * torch.hann_window(side)
    ring = radial_index(*sides).flatten()
    num_frequencies = min(sides) // 2
    counts = torch.bincount(ring, minlength=num_frequencies + 1)[1 : num_frequencies + 1]
    parts = []
    for part in torch.split(images, _IMAGES_PER_BATCH):
        part = to_floats(part)
        centred = (part - part.mean(dim=axes, keepdim=True)) * window
        power = torch.fft.fftn(centred, dim=axes, norm="ortho").abs().square().mean(dim=1).flatten(1)  # (n, H·W)
        sums = torch.zeros(len(part), int(ring.max()) + 1).index_add_(1, ring, power)
        parts.append(sums[:, 1 : num_frequencies + 1] / counts)
    return torch.cat(parts)


def log_power(power: Tensor) -> Tensor:
    """Natural logarithm of radial power, bounded below so that it is finite for a blank image."""
    return power.clamp_min(_MIN_POWER).log()


def band_ratios(power: Tensor, real: Tensor) -> list[float]:
    """Ratio of mean power (N, R) to that of real images (M, R) in each band of `BAND_EDGES`; below 1 is blurred."""
    num_frequencies = power.shape[1]
    share = torch.arange(1, num_frequencies + 1) / num_frequencies
    frequencies = torch.arange(1, num_frequencies + 1).double()  # proportional to the number of coefficients in a ring
    ratios = []
    for low, high in pairwise(BAND_EDGES):
        ring = (frequencies * ((share > low) & (share <= high))).float()
        ratios.append(float((power.mean(0) @ ring) / (real.mean(0) @ ring).clamp_min(_MIN_POWER)))
    return ratios


def spectrum_distance(power: Tensor, real: Tensor) -> float:
    """Root mean square, over frequencies, of the log ratio of mean power (N, R) to that of real images (M, R)."""
    return float((log_power(power.mean(0)) - log_power(real.mean(0))).square().mean().sqrt())


def spectrum_metrics(prefix: str, power: Tensor, real: Tensor) -> dict[str, float]:
    """Metrics PREFIX/spectrum_ratio_BAND and PREFIX/spectrum_distance of power (N, R), real images (M, R)."""
    ratios = {f"{prefix}/spectrum_ratio_{band}": ratio for band, ratio in enumerate(band_ratios(power, real), start=1)}
    return {**ratios, f"{prefix}/spectrum_distance": spectrum_distance(power, real)}


def radial_index(*sides: int) -> Tensor:
    """Radial frequency (*sides) of each coefficient of `fftn`, in cycles per shortest side, rounded."""
    distance = torch.zeros([])
    for side in sides:
        distance = torch.hypot(distance[..., None], torch.fft.fftfreq(side) * min(sides))
    return distance.round().long()
