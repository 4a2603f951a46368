"""Differences between reconstructions and originals, and PCA reconstructions as a baseline.

Metrics are per image, and the value of a split is the mean over its images, whatever the batch sizes. Images are
(B, C, H, W) float32 in [0, 1]; SSIM and MS-SSIM are means over channels.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from medgen.metrics.generation import subsample
from medgen.nn.ssim import ssim

_MIN_MSE = 1e-10  # limits the PSNR of identical images to 100 dB
_MAX_SQUARE = 4096  # side of the largest matrix that is decomposed (a minute on two cores)
_PIXELS_PER_CHUNK = 1 << 24  # float64 values in memory at once while summing over pixels


def l1(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute error over pixels (B,) of two batches (B, C, H, W)."""
    return (original - reconstruction).abs().flatten(1).mean(dim=1)


def mse(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error over pixels (B,) of two batches (B, C, H, W)."""
    return (original - reconstruction).square().flatten(1).mean(dim=1)


def psnr(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) for a data range of 1, at most 100, of two batches (B, C, H, W)."""
    return -10.0 * mse(original, reconstruction).clamp_min(_MIN_MSE).log10()


def ms_ssim_window(image_size: int) -> int | None:
    """Window for the five scales of MS-SSIM: 11 pixels, 7 for smaller images, None for a side below 97 pixels."""
    return next((window for window in (11, 7) if image_size > (window - 1) * 16), None)


def ms_ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Multi-scale structural similarity (B,) of two batches (B, C, H, W); five scales, data range 1.

    Source: Wang, Simoncelli, Bovik: Multi-scale structural similarity, 2003.

    Raises:
        ValueError: a side is below 97 pixels, too small for five scales.
    """
    import pytorch_msssim

    window = ms_ssim_window(min(original.shape[-2:]))
    if window is None:
        raise ValueError(f"ms_ssim: expected sides of at least 97 pixels, found {tuple(original.shape[-2:])}")
    value: Tensor = pytorch_msssim.ms_ssim(
        original.float(), reconstruction.float(), data_range=1.0, size_average=False, win_size=window
    )
    return value


def score_images(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """All metrics, by name, of each image (N,) in batches of (original, reconstruction), float64.

    `ms_ssim` is omitted if the images are too small for it.

    Raises:
        ValueError: there is no batch.
    """
    metrics = {"l1": l1, "mse": mse, "psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    values: dict[str, list[Tensor]] = {}
    for original, reconstruction in pairs:
        for name, metric in metrics.items():
            if name != "ms_ssim" or ms_ssim_window(min(original.shape[-2:])) is not None:
                values.setdefault(name, []).append(metric(original, reconstruction).double().cpu())
    if not values:
        raise ValueError("score_images: found no images, expected at least one batch")
    return {name: torch.cat(parts) for name, parts in values.items()}


def pca_ssim(train: Tensor, test: Tensor, num_components: Sequence[int]) -> dict[int, float]:
    """Mean SSIM, by number of components, of test images reconstructed from principal components of the train split.

    Images are (N, C, H, W) and (M, C, H, W) uint8; reconstructions are clipped to [0, 1]. PCA has the lowest squared
    error of all linear autoencoders with as many latent dimensions. The number of components is at most
    min(N - 1, pixels). If images and pixels both exceed 4,096, the components come from 4,096 images spread evenly over
    the train split.
    """
    num_pixels = train[0].numel()
    num_train = len(train) if num_pixels <= _MAX_SQUARE else min(len(train), _MAX_SQUARE)
    train = subsample(train, num_train)
    train, shape = train.flatten(1), test.shape[1:]
    test = test.flatten(1)
    mean = train.double().mean(dim=0) / 255.0
    basis = _ImageSpace(train, mean) if num_train <= num_pixels else _PixelSpace(train, mean)
    limit = min(num_train - 1, num_pixels)
    scores: dict[int, float] = {}
    for count in dict.fromkeys(num_components):
        values = []
        for rows in torch.split(torch.arange(len(test)), max(1, _PIXELS_PER_CHUNK // num_pixels)):
            original = test[rows].double() / 255.0
            projected = (mean + basis.project(original - mean, min(count, limit))).clamp(0.0, 1.0)
            values.append(ssim(original.reshape(-1, *shape), projected.reshape(-1, *shape)))
        scores[count] = float(torch.cat(values).double().mean())
    return scores


class _PixelSpace:
    """Principal components from the covariance of pixels (P, P), for more images than pixels."""

    def __init__(self, train: Tensor, mean: Tensor) -> None:
        gram = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for rows in torch.split(train, max(1, _PIXELS_PER_CHUNK // len(mean))):
            centred = rows.double() / 255.0 - mean
            gram += centred.T @ centred
        self.vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)  # (P, P), largest first

    def project(self, centred: Tensor, count: int) -> Tensor:
        """Project images (M, P) onto the first `count` components, (M, P)."""
        kept: Tensor = self.vectors[:, :count]
        return centred @ kept @ kept.T


class _ImageSpace:
    """Principal components from the inner products of images (N, N), for fewer images than pixels.

    A component is a weighted sum of train images, so components are not formed: with G = X Xᵀ = U Λ Uᵀ the projection
    of y is (y Xᵀ) U Λ⁻¹ Uᵀ X.
    """

    def __init__(self, train: Tensor, mean: Tensor) -> None:
        self.train, self.mean = train, mean
        gram = torch.zeros(len(train), len(train), dtype=torch.float64)
        for chunk in self._chunks():
            pixels = self._centred(chunk)
            gram += pixels @ pixels.T
        values, vectors = torch.linalg.eigh(gram)
        self.values, self.vectors = values.flip(0), vectors.flip(1)

    def project(self, centred: Tensor, count: int) -> Tensor:
        """Project images (M, P) onto the first `count` components, (M, P)."""
        # Duplicate images give directions without variance; dividing by it would amplify noise.
        count = int((self.values[:count] > 1e-10 * self.values[0]).sum())
        products = torch.zeros(len(centred), len(self.train), dtype=torch.float64)
        for chunk in self._chunks():
            products += centred[:, chunk] @ self._centred(chunk).T
        weights = (products @ self.vectors[:, :count] / self.values[:count]) @ self.vectors[:, :count].T  # (M, N)
        return torch.cat([weights @ self._centred(chunk) for chunk in self._chunks()], dim=1)

    def _chunks(self) -> list[slice]:
        size = max(1, _PIXELS_PER_CHUNK // len(self.train))
        return [slice(start, start + size) for start in range(0, len(self.mean), size)]

    def _centred(self, chunk: slice) -> Tensor:
        centred: Tensor = self.train[:, chunk].double() / 255.0 - self.mean[chunk]
        return centred
