"""Radial power against NumPy and known waves; blur and noise change the expected bands."""

import numpy as np
import pytest
import torch

from medgen.metrics.spectrum import NUM_BANDS, band_ratios, radial_power, spectrum_distance


def test_radial_power_of_colour_images_agrees_with_numpy() -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    window = np.outer(*[0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16)] * 2)  # periodic Hann
    expected = np.zeros(8)
    counts = np.zeros(8)
    for channel in image[0].numpy().astype(float):
        power = np.abs(np.fft.fft2((channel - channel.mean()) * window)) ** 2 / 256
        for i in range(16):
            for j in range(16):
                radius = round(float(np.hypot(min(i, 16 - i), min(j, 16 - j))))
                if 1 <= radius <= 8:
                    expected[radius - 1] += power[i, j] / 3
                    counts[radius - 1] += 1 / 3
    assert radial_power(image)[0].tolist() == pytest.approx((expected / counts).tolist(), rel=1e-4)


def test_radial_power_of_volumes_agrees_with_numpy() -> None:
    shape = (8, 12, 10)
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    windows = [0.5 - 0.5 * np.cos(2 * np.pi * np.arange(side) / side) for side in shape]
    centred = volume[0, 0].numpy().astype(float)
    power = np.abs(np.fft.fftn((centred - centred.mean()) * np.einsum("i,j,k->ijk", *windows))) ** 2 / np.prod(shape)
    cycles = [8 * np.fft.fftfreq(side) for side in shape]  # of the shortest side
    found = {radius: [] for radius in range(1, 5)}
    for index in np.ndindex(*shape):
        radius = round(float(np.sqrt(sum(axis[i] ** 2 for axis, i in zip(cycles, index, strict=True)))))
        if radius in found:
            found[radius].append(power[index])
    expected = [np.mean(values) for values in found.values()]
    assert radial_power(volume)[0].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("frequency", "size"), [(3, 64), (20, 64), (40, 128)])
def test_a_wave_has_its_maximum_power_at_its_frequency(frequency: int, size: int) -> None:
    wave = 0.5 + 0.4 * torch.sin(2 * torch.pi * frequency * torch.arange(size) / size)
    power = radial_power(wave.expand(size, size)[None, None])[0]
    assert int(power.argmax()) + 1 == frequency


def test_uint8_and_floats_agree(textured) -> None:
    images = (textured() * 255).round()
    torch.testing.assert_close(radial_power(images.to(torch.uint8)), radial_power(images / 255.0))


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [
        ({}, (0.9, 1.1), (0.9, 1.1)),
        ({"blur": 0.5}, (0.9, 1.1), (0.0, 0.6)),
        ({"blur": 1.0}, (0.8, 1.1), (0.0, 0.1)),
        ({"noise": 0.05}, (0.9, 1.1), (1.5, 99.0)),
        ({"contrast": 0.8}, (0.55, 0.75), (0.55, 0.75)),
    ],
    ids=["other images", "blur 0.5 px", "blur 1 px", "noise", "less contrast"],
)
def test_bands_show_blur_noise_and_contrast(
    textured, change: dict, low: tuple[float, float], high: tuple[float, float]
) -> None:
    real, made = radial_power(textured(40)), radial_power(textured(40, seed=1, **change))
    ratios = band_ratios(made, real)
    assert len(ratios) == NUM_BANDS
    assert low[0] <= ratios[0] <= low[1]
    assert high[0] <= ratios[-1] <= high[1]
    assert (spectrum_distance(made, real) < 0.1) == (not change)


def test_blank_images_have_a_finite_distance(textured) -> None:
    power = radial_power(torch.zeros(3, 1, 32, 32))
    assert spectrum_distance(power, power) == 0.0
    assert np.isfinite(spectrum_distance(power, radial_power(textured(3, 32))))
