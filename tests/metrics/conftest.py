"""Images with a known spectrum, for metrics of sharpness and realism."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture
def textured() -> Callable[..., Tensor]:
    """Function that draws images whose power falls with frequency, as in radiographs, and degrades them."""

    def draw(
        count: int = 20, size: int = 64, seed: int = 0, blur: float = 0.0, noise: float = 0.0, contrast: float = 1.0
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.fft.fftfreq(size), torch.fft.fftfreq(size)
        falling = 1.0 / (torch.hypot(rows[:, None], columns[None]) * size).clamp_min(1.0)
        waves = torch.fft.ifft2(torch.fft.fft2(torch.randn(count, 1, size, size, generator=generator)) * falling).real
        images = 0.5 + 0.15 * contrast * waves / waves.std()
        if blur:
            images = torch.from_numpy(np.stack([cv2.GaussianBlur(one[0], (0, 0), blur) for one in images.numpy()]))
            images = images[:, None]
        return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0.0, 1.0)

    return draw
