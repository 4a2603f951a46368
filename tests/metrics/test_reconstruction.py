"""Reconstruction metrics against other libraries and their formulas; the mean over a split is exact."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from medgen.metrics import latent, reconstruction


def smooth(count: int, size: int, seed: int = 0, channels: int = 1) -> Tensor:
    """Random images with structure at several scales, (count, channels, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        torch.nn.functional.interpolate(
            torch.rand(count, channels, side, side, generator=generator), size, mode="bilinear"
        )
        for side in (3, 8, size)
    ]
    return torch.stack(layers).mean(dim=0)


def noisy(images: Tensor, amount: float = 0.1) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + amount * noise).clamp(0.0, 1.0)


def test_pixel_errors_follow_their_formulas() -> None:
    original = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])
    changed = torch.tensor([[[[0.2, 1.0]]], [[[0.5, 0.5]]]])
    assert reconstruction.l1(original, changed).tolist() == pytest.approx([0.1, 0.0])
    assert reconstruction.mse(original, changed).tolist() == pytest.approx([0.02, 0.0])
    assert reconstruction.psnr(original, changed).tolist() == pytest.approx(
        [10 * math.log10(1 / 0.02), 100.0], rel=1e-5
    )


def test_ssim_agrees_with_the_formula() -> None:
    original, changed = smooth(1, 24), noisy(smooth(1, 24))
    x, y = original[0, 0].double().numpy(), changed[0, 0].double().numpy()
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(24 - 10):
        for left in range(24 - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 0.01**2)
                * (2 * covariance + 0.03**2)
                / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
            )
    assert reconstruction.ssim(original, changed).item() == pytest.approx(np.mean(values), abs=1e-5)


@pytest.mark.parametrize("measure", ["l1", "mse", "ssim", "ms_ssim"])
def test_metrics_of_colour_images_are_means_over_channels(measure: str) -> None:
    original = smooth(2, 100, channels=3)
    changed = noisy(original)
    changed[:, 1] = changed[:, 1] ** 2
    compare = getattr(reconstruction, measure)
    channels = [compare(original[:, i : i + 1], changed[:, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(compare(original, changed), torch.stack(channels).mean(dim=0))
    together = reconstruction.score_images(original, changed)[:, reconstruction.score_names(100).index(measure)]
    assert together.mean().item() == pytest.approx(torch.stack(channels).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("size", "window"), [(176, 11), (161, 11), (128, 7), (97, 7), (96, None), (64, None)])
def test_ms_ssim_uses_the_largest_window_that_fits(size: int, window: int | None) -> None:
    assert reconstruction.ms_ssim_window(size) == window
    original, changed = smooth(2, size), noisy(smooth(2, size))
    if window is None:
        with pytest.raises(ValueError, match="97 pixels"):
            reconstruction.ms_ssim(original, changed)
        return
    assert reconstruction.ms_ssim(original, original).tolist() == pytest.approx([1.0, 1.0])
    values = reconstruction.ms_ssim(original, changed)
    assert ((values > 0.3) & (values < 0.999)).all()


def test_ms_ssim_agrees_with_torchmetrics() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    original, changed = smooth(2, 176), noisy(smooth(2, 176))
    expected = multiscale_structural_similarity_index_measure(changed, original, data_range=1.0, reduction="none")
    torch.testing.assert_close(reconstruction.ms_ssim(original, changed), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("size", "has_ms_ssim"), [(32, False), (100, True)])
def test_batch_sizes_do_not_change_the_values(size: int, has_ms_ssim: bool) -> None:
    original = smooth(7, size)
    changed = original.clone()
    changed[6] = noisy(changed[6:7], 0.5)[0]  # the only image of the last batch
    together = reconstruction.score_images(original, changed)
    pairs = zip(original.split(3), changed.split(3), strict=True)
    parts = torch.cat([reconstruction.score_images(*pair) for pair in pairs])
    torch.testing.assert_close(parts, together, atol=1e-6, rtol=0)
    ragged = dict(zip(reconstruction.score_names(size), parts.T, strict=True))
    assert ("ms_ssim" in ragged) == has_ms_ssim
    assert ragged["l1"].mean().item() == pytest.approx((original - changed).abs().mean().item(), rel=1e-5)
    assert ragged["ssim"].tolist() == pytest.approx(reconstruction.ssim(original, changed).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("num_train", "size", "channels"),
    [(40, 16, 1), (300, 16, 1), (40, 16, 3)],
    ids=["fewer images", "more images than pixels", "colour"],
)
def test_pca_agrees_with_sklearn(num_train: int, size: int, channels: int) -> None:
    from sklearn.decomposition import PCA

    train, test = (smooth(num_train, size, 0, channels), smooth(9, size, 1, channels))
    train, test = (train * 255).round().to(torch.uint8), (test * 255).round().to(torch.uint8)
    scores = reconstruction.pca_ssim(train, test, [1, 5, 20, 10_000])
    flat_train, flat_test = (images.flatten(1).double().numpy() / 255 for images in (train, test))
    for count in (1, 5, 20, 10_000):
        pca = PCA(min(count, num_train - 1, channels * size * size), svd_solver="full").fit(flat_train)
        rebuilt = torch.from_numpy(pca.inverse_transform(pca.transform(flat_test))).clamp(0, 1).reshape(test.shape)
        expected = reconstruction.ssim(test.double() / 255, rebuilt).double().mean().item()
        assert scores[count] == pytest.approx(expected, abs=1e-5)
    assert scores[20] < scores[10_000]


def test_pca_accepts_duplicate_and_equal_images() -> None:
    images = (smooth(6, 16) * 255).round().to(torch.uint8)
    assert reconstruction.pca_ssim(torch.cat([images, images]), images, [50])[50] == pytest.approx(1.0, abs=1e-4)
    equal = images[:1].repeat(5, 1, 1, 1)
    assert reconstruction.pca_ssim(equal, equal, [3])[3] == pytest.approx(1.0, abs=1e-6)


def test_kl_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(4, 3, 2, 2, generator=generator)
    posterior = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(latent.kl_nats(mean, logvar), expected)


def test_active_units_are_dimensions_that_vary_with_the_image() -> None:
    means = torch.zeros(100, 4)
    means[:, 1] = torch.linspace(-1, 1, 100)
    means[:, 2] = 5.0  # not zero, but the same for every image
    means[:, 3] = torch.linspace(-0.1, 0.1, 100)  # variance 0.0034
    sums = (values.double().reshape(100, 2, 2).sum(0) for values in (means, means.square()))
    assert latent.active_units(100, *sums) == 1
