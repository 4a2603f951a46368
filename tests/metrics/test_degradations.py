"""Degradations: each grows with severity, starts hardly visible and follows its definition."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from medgen.metrics.degradations import DEGRADATIONS, degrade


def images(channels: int = 1, side: int = 48) -> torch.Tensor:
    """Smooth structures with sharp edges and some noise."""
    random = torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return 0.3 + 0.3 * ((rows // 7 + columns // 5) % 2) + 0.1 * random


@pytest.mark.parametrize("kind", DEGRADATIONS)
@pytest.mark.parametrize(("channels", "side"), [(1, 32), (3, 48)])
def test_errors_grow_with_severity_and_are_reproducible(kind: str, channels: int, side: int) -> None:
    clean = images(channels, side)
    before = clean.clone()
    errors = []
    for severity in (0.0, 0.5, 1.0):
        found = degrade(clean, kind, torch.Generator().manual_seed(3), severity)
        assert found.shape == clean.shape
        assert found.min() >= 0.0
        assert found.max() <= 1.0
        assert found.equal(degrade(clean, kind, torch.Generator().manual_seed(3), severity))
        errors.append(float((found - clean).square().mean().sqrt()))
    assert 0 < errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.06
    assert clean.equal(before)


@pytest.mark.parametrize("severity", [0.0, 0.6, 1.0])
def test_blur_is_a_gaussian_blur_of_known_sigma(severity: float) -> None:
    clean = images(3)
    sigma = 0.3 * (2.0 / 0.3) ** severity
    expected = ndimage.gaussian_filter(clean.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, 6, 6))
    found = degrade(clean, "blur", torch.Generator().manual_seed(0), severity)
    assert np.abs(found.numpy() - expected).max() < 5e-3


def test_ringing_removes_only_high_frequencies() -> None:
    side = 64
    position = torch.arange(side) / side
    waves = [0.5 + 0.2 * torch.cos(2 * torch.pi * cycles * position).expand(1, 1, side, side) for cycles in (4, 24)]
    kept, removed = (degrade(wave, "ringing", torch.Generator(), 1.0) for wave in waves)  # cut at 8 cycles
    inside = (..., slice(16, -16), slice(16, -16))
    assert (kept - waves[0])[inside].abs().max() < 0.05
    assert (removed - 0.5)[inside].abs().max() < 0.05


def test_smoothing_is_local() -> None:
    clean = images()
    changed = (degrade(clean, "local smoothing", torch.Generator().manual_seed(1), 1.0) - clean).abs() > 1e-3
    assert 0.01 < changed.float().mean() < 0.6


def test_severities_differ_between_images() -> None:
    clean = images()[:1].repeat(20, 1, 1, 1)
    errors = (degrade(clean, "blur", torch.Generator().manual_seed(0)) - clean).square().mean(dim=(1, 2, 3))
    assert errors.max() > 4 * errors.min()
