"""SSIM as matrix products, against pytorch_msssim's convolutions."""

import pytest
import pytorch_msssim
import torch
from torch import Tensor

from medgen.nn.ssim import ssim


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(shape, generator=generator)
    return original, (original + 0.1 * torch.randn(shape, generator=generator)).clamp(0.0, 1.0)


def reference(original: Tensor, reconstruction: Tensor) -> Tensor:
    value: Tensor = pytorch_msssim.ssim(original, reconstruction, data_range=1.0, size_average=False)
    return value


@pytest.mark.parametrize(
    "shape", [(4, 1, 64, 64), (2, 3, 16, 16), (1, 1, 40, 28), (2, 1, 256, 256), (2, 2, 12, 16, 20)]
)
def test_values_and_gradients_are_those_of_pytorch_msssim(shape: tuple[int, ...]) -> None:
    original, changed = pair(*shape)
    gradients = []
    for compare in (ssim, reference):
        leaf = changed.clone().requires_grad_()
        compare(original, leaf).mean().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(ssim(original, changed), reference(original, changed), atol=1e-6, rtol=0)
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 1e-5


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_flat_images_have_finite_gradients(grey: float) -> None:
    """A constant background has no variance; rounding must not turn its gradient into NaN."""
    flat = torch.full((1, 1, 32, 32), grey, requires_grad=True)
    value = ssim(flat.detach(), flat).mean()
    value.backward()
    assert value.item() == pytest.approx(1.0, abs=1e-5) and torch.isfinite(flat.grad).all()


def test_loss_does_not_run_pytorch_msssim(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes three times as long (docs/performance.md)."""
    from medgen.training.losses import ssim_loss

    monkeypatch.setattr(pytorch_msssim, "ssim", None)
    original, changed = pair(2, 1, 32, 32)
    assert 0.0 < ssim_loss(changed, original).item() < 1.0
