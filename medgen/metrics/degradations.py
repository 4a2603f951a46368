"""Image degradations of known kind and strength, which the domain extractor learns to recognise.

They resemble faults of generative models, such as blur, ringing and noise, and range from hardly visible to obvious.

degraded = degrade(images, "blur", generator)

Shapes: images (B, C, H, W) in [0, 1], sides from 32; amounts (B,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_PADDING = 8  # pixels reflected at the border, so that opposite edges do not wrap around in a Fourier filter


@dataclass(frozen=True)
class Degradation:
    """A kind of degradation and the range of its amount, both ends included."""

    weakest: float
    strongest: float
    apply: Callable[[Tensor, Tensor, torch.Generator], Tensor]  # images, amounts, generator -> images


def degrade(images: Tensor, kind: str, generator: torch.Generator, severity: float | None = None) -> Tensor:
    """Degraded copies (B, C, H, W), on the CPU, in [0, 1]; `kind` is a key of DEGRADATIONS.

    The severity is from 0 (weakest) to 1 (strongest) on a logarithmic scale. None draws one for each image, uniformly.
    """
    degradation = DEGRADATIONS[kind]
    share = torch.rand(len(images), generator=generator)
    if severity is not None:
        share = torch.full_like(share, severity)
    amount = degradation.weakest * (degradation.strongest / degradation.weakest) ** share
    return degradation.apply(images.cpu(), amount, generator).clamp(0.0, 1.0)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation in pixels for each image."""
    radius = math.ceil(3.0 * float(sigma.max()))
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2.0 * sigma[:, None].square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, None, :, None]  # (B, 1, 2 radius + 1, 1)
    blurred = F.pad(images, (radius,) * 4, mode="reflect").transpose(0, 1)  # (C, B, H, W): one kernel per image
    blurred = F.conv2d(F.conv2d(blurred, kernel, groups=len(images)), kernel.transpose(2, 3), groups=len(images))
    return blurred.transpose(0, 1)


def _noise(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    return images + amount[:, None, None, None] * torch.randn(images.shape, generator=generator)


def _jpeg(images: Tensor, amount: Tensor, _: torch.Generator) -> Tensor:
    """JPEG compression at quality 100 - amount."""
    decoded = []
    pixels = (255.0 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()  # (B, H, W, C)
    for image, quality in zip(pixels, (100.0 - amount).round().int().tolist(), strict=True):
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        restored = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED))
        decoded.append(torch.from_numpy(restored.reshape(image.shape)))
    return torch.stack(decoded).permute(0, 3, 1, 2).float() / 255.0


def _downscaling(images: Tensor, amount: Tensor, _: torch.Generator) -> Tensor:
    """Resizing to 1 / amount of the side and back."""
    size = images.shape[-2:]
    restored = []
    for image, factor in zip(images[:, None], amount.tolist(), strict=True):
        smaller = [round(side / factor) for side in size]
        small = F.interpolate(image, size=smaller, mode="bilinear", align_corners=False, antialias=True)
        restored.append(F.interpolate(small, size=size, mode="bicubic", align_corners=False))
    return torch.cat(restored)


def _ringing(images: Tensor, amount: Tensor, _: torch.Generator) -> Tensor:
    """Removal of all frequencies above 1 / amount cycles per pixel, so that edges overshoot (Gibbs phenomenon)."""
    padded = F.pad(images, (_PADDING,) * 4, mode="reflect")
    rows, columns = padded.shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(rows)[:, None], torch.fft.rfftfreq(columns)[None])
    kept = torch.fft.rfft2(padded) * (frequency <= 1.0 / amount[:, None, None, None])
    inside = slice(_PADDING, -_PADDING)
    filtered: Tensor = torch.fft.irfft2(kept, s=(rows, columns))
    return filtered[..., inside, inside]


def _local_smoothing(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur inside a disc at a random position, with a soft edge."""
    count, rows, columns = len(images), *images.shape[-2:]
    y, x = (0.2 + 0.6 * torch.rand(2, count, 1, 1, generator=generator)).unbind()
    radius = 0.1 * 3.5 ** torch.rand(count, 1, 1, generator=generator)  # as a share of the side, 0.1 to 0.35
    down, right = ((torch.arange(side) + 0.5) / side for side in (rows, columns))
    inside = torch.sigmoid((radius - torch.hypot(down[:, None] - y, right[None] - x)) / 0.02)[:, None]
    return torch.lerp(images, _blur(images, amount), inside.expand_as(images))


# Amounts: standard deviation in pixels (blur, local smoothing) or of values in [0, 1] (noise), 100 - quality (JPEG),
# factor (downscaling), shortest wavelength kept in pixels (ringing).
DEGRADATIONS: dict[str, Degradation] = {
    "blur": Degradation(0.3, 2.0, lambda images, amount, _: _blur(images, amount)),
    "noise": Degradation(0.01, 0.1, _noise),
    "jpeg": Degradation(8.0, 80.0, _jpeg),
    "downscaling": Degradation(1.15, 4.0, _downscaling),
    "ringing": Degradation(2.2, 8.0, _ringing),
    "local smoothing": Degradation(0.6, 3.0, _local_smoothing),
}
