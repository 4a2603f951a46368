"""Differences between reconstructions and originals, and PCA reconstructions as a baseline.

Metrics are per image, and the value of a split is the mean over its images, whatever the batch sizes. Images are
(B, C, H, W) or volumes (B, C, D, H, W), float32 in [0, 1]; SSIM and MS-SSIM are means over channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medgen.data.images import Images, maximum, split_images, to_floats
from medgen.metrics.generation import subsample
from medgen.nn.ssim import ssim

_MIN_MSE = 1e-10  # limits the PSNR of identical images to 100 dB
_MAX_SQUARE = 4096  # side of the largest matrix that is decomposed (a minute on two cores)
_MAX_IMAGES = 1 << 16  # for principal components
_PIXELS_PER_CHUNK = 1 << 22  # float64 values in memory at once while summing over pixels


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

    window = ms_ssim_window(min(original.shape[2:]))
    if window is None:
        raise ValueError(f"ms_ssim: expected sides of at least 97 pixels, found {tuple(original.shape[2:])}")
    value: Tensor = pytorch_msssim.ms_ssim(
        original.float(), reconstruction.float(), data_range=1.0, size_average=False, win_size=window
    )
    return value


METRICS = {"l1": l1, "mse": mse, "psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


def score_names(image_size: int) -> list[str]:
    """Names of the metrics of `score_images` for images with this shorter side."""
    return [name for name in METRICS if name != "ms_ssim" or ms_ssim_window(image_size) is not None]


def score_images(original: Tensor, reconstruction: Tensor) -> Tensor:
    """All metrics (B, S) of two batches (B, C, H, W), float64, in the order of `score_names`."""
    names = score_names(min(original.shape[2:]))
    return torch.stack([METRICS[name](original, reconstruction).double() for name in names], dim=1)


def pca_ssim(train: Images, test: Images, num_components: Sequence[int]) -> dict[int, float]:
    """Mean SSIM, by number of components, of test images reconstructed from principal components of the train split.

    Stored images are (N, C, H, W) and (M, C, H, W); reconstructions are clipped to [0, 1]. PCA has the lowest squared
    error of all linear autoencoders with as many latent dimensions. The number of components is at most
    min(N - 1, pixels). The components come from at most 65,536 images, spread evenly over the train split; from at most
    4,096 if an image has more than 4,096 pixels.
    """
    num_pixels, shape = train.shape[1:].numel(), test.shape[1:]
    num_train = min(len(train), _MAX_IMAGES if num_pixels <= _MAX_SQUARE else _MAX_SQUARE)
    space = _ImageSpace if num_train <= num_pixels else _PixelSpace
    basis = space(train, subsample(torch.arange(len(train)), num_train))
    limit = min(num_train - 1, num_pixels)
    scores: dict[int, list[Tensor]] = {count: [] for count in num_components}
    for images in split_images(test, max(1, _PIXELS_PER_CHUNK // num_pixels)):
        original = to_floats(images.flatten(1), torch.float64)
        for count, values in scores.items():
            projected = (basis.mean + basis.project(original - basis.mean, min(count, limit))).clamp(0.0, 1.0)
            values.append(ssim(original.reshape(-1, *shape), projected.reshape(-1, *shape)))
    return {count: float(torch.cat(values).double().mean()) for count, values in scores.items()}


class _PixelSpace:
    """Principal components from the covariance of pixels (P, P), for more images than pixels."""

    def __init__(self, train: Images, rows: Tensor) -> None:
        num_pixels = train.shape[1:].numel()
        total = torch.zeros(num_pixels, dtype=torch.int64)
        gram = torch.zeros(num_pixels, num_pixels, dtype=torch.float64)
        chunks = torch.split(rows, max(1, _PIXELS_PER_CHUNK // num_pixels))
        for chunk in chunks:
            total += train[chunk].flatten(1).sum(dim=0, dtype=torch.int64)
        self.mean = total.double() / len(rows) / maximum(train)
        for chunk in chunks:
            centred = to_floats(train[chunk].flatten(1), torch.float64) - self.mean
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

    def __init__(self, train: Images, rows: Tensor) -> None:
        self.train = train[rows].flatten(1)
        self.mean = self.train.sum(dim=0, dtype=torch.int64).double() / len(rows) / maximum(self.train)
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
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
        centred: Tensor = to_floats(self.train[:, chunk], torch.float64) - self.mean[chunk]
        return centred
