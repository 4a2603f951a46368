"""The refiner: training, sampling and storage."""

import json
import math

import numpy as np
import pytest
import torch

from medgen.config import Refiner as Params
from medgen.errors import UserError
from medgen.priors.refiner import (
    Refiner,
    load_refiner,
    patch_size,
    save_disabled,
    save_refiner,
)

PARAMS = Params(enabled=True, channels=8, blocks=1, sampling_steps=2)
LATENT = (2, 4, 4)


def create(image_shape=(1, 16, 16), num_classes=3, params=PARAMS, trained=True):
    """A refiner; `trained` adds noise to its weights, whose output is 0 before training."""
    channels, *sides, width = image_shape
    generator = torch.Generator().manual_seed(1)
    scales = torch.full((channels,), 0.2), torch.ones(channels, *sides, width // 2 + 1)
    refiner = Refiner.create(params, image_shape, num_classes, *scales, torch.rand(LATENT, generator=generator))
    if trained:
        generator = torch.Generator().manual_seed(2)
        for parameter in refiner.network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return refiner


def refined(refiner, decoded, labels=None, seed=0, level=0.0):
    levels = torch.full((len(decoded),), level)
    return refiner.refine(decoded, levels, labels, torch.Generator().manual_seed(seed))


class Decoder:
    """Fills an image with the mean of its latent."""

    conditional, space = False, None

    def decode(self, latent, label=None, conditions=None):
        return latent.mean((1, 2, 3)).sigmoid()[:, None, None, None].expand(-1, 1, 16, 16)


@pytest.mark.parametrize(
    ("sides", "patch"),
    [
        ((16, 16), 1),
        ((32, 32), 1),
        ((63, 63), 1),
        ((64, 64), 2),
        ((128, 128), 4),
        ((256, 256), 4),
        ((512, 512), 4),
        ((64, 48), 1),  # a grid of 32 × 24 would be too small
        ((64, 96), 2),
        ((66, 66), 2),
        ((130, 130), 2),  # 4 does not divide it
        ((65, 128), 1),
        ((224, 224), 4),
        ((16, 16, 16), 2),
        ((28, 28, 28), 2),
        ((96, 80, 64), 2),
        ((12, 28, 28), 1),  # a grid of 6 × 14 × 14 would be too small
    ],
)
def test_a_patch_leaves_a_grid_of_at_least_32_positions_a_side_or_8_in_volumes(sides, patch):
    assert patch_size((1, *sides)) == patch


@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (3, 16, 16), (1, 17, 23), (1, 64, 66), (3, 15, 64), (1, 16, 20, 28), (1, 12, 17, 16)]
)
def test_refined_images_have_the_shape_and_range_of_their_input(shape):
    refiner, decoded = create(shape), torch.rand(2, *shape)
    images = refined(refiner, decoded, torch.tensor([0, 2]))
    assert images.shape == decoded.shape and images.dtype == torch.float32
    assert float(images.min()) >= 0.0 and float(images.max()) <= 1.0
    levels, labels = torch.rand(2), torch.tensor([1, -1])
    loss = refiner.loss(refiner.network, decoded, decoded, levels, labels, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.shape == () and bool(loss.isfinite())


def test_the_same_seed_gives_the_same_network_and_images():
    first, second, other = create(), create(), create(params=PARAMS.model_copy(update={"seed": 1}))
    decoded = torch.rand(3, 1, 16, 16)
    assert refined(first, decoded).equal(refined(second, decoded))
    assert not refined(first, decoded).equal(refined(first, decoded, seed=1))
    assert not refined(first, decoded).equal(refined(other, decoded))


def test_creation_leaves_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    create()
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize(("steps", "solver"), [(1, "euler"), (3, "midpoint")])
def test_an_untrained_refiner_adds_noise_of_the_residuals_spectrum(steps, solver):
    refiner = create(
        (1, 8, 8), params=PARAMS.model_copy(update={"sampling_steps": steps, "solver": solver}), trained=False
    )
    refiner.spectrum = symmetric(torch.rand(1, 8, 5, generator=torch.Generator().manual_seed(3)) + 0.1)
    refiner.residual_scale = torch.tensor([0.01])  # so that no pixel is clamped
    residual = (refined(refiner, torch.full((4000, 1, 8, 8), 0.5)) - 0.5) / 0.01
    power = torch.fft.rfft2(residual, norm="ortho").abs().square().mean(0)
    torch.testing.assert_close(power, refiner.spectrum, rtol=0.12, atol=0.0)


def test_an_untrained_refiner_of_volumes_adds_noise_of_the_residuals_spectrum():
    """By NumPy: the power depends on all three frequencies."""
    params = PARAMS.model_copy(update={"solver": "euler", "sampling_steps": 1})
    refiner = create((1, 4, 8, 6), params=params, trained=False)
    depth, height, width = np.meshgrid(*(np.fft.fftfreq(side) for side in (4, 8, 6)), indexing="ij")
    expected = 1.0 / (0.05 + depth**2 + 2.0 * height**2 + 3.0 * width**2)
    refiner.spectrum = torch.from_numpy(expected[None, ..., :4]).float()
    refiner.residual_scale = torch.tensor([0.01])  # so that no voxel is clamped
    residual = (refined(refiner, torch.full((1500, 1, 4, 8, 6), 0.5)).double().numpy() - 0.5) / 0.01
    power = (np.abs(np.fft.fftn(residual[:, 0], axes=(1, 2, 3), norm="ortho")) ** 2).mean(0)
    np.testing.assert_allclose(power, expected, rtol=0.18)


def test_the_gain_multiplies_each_frequency_of_a_refined_image():
    refiner = create((1, 16, 16), trained=False)
    refiner.residual_scale = torch.tensor([0.01])
    decoded = torch.full((2, 1, 16, 16), 0.5)
    plain = refined(refiner, decoded)
    refiner.gain = 0.5 + torch.arange(9).expand(16, 9) / 8  # of the horizontal frequency
    expected = torch.fft.irfft2(torch.fft.rfft2(plain) * refiner.gain)
    torch.testing.assert_close(refined(refiner, decoded), expected)


def test_the_exact_velocity_leads_to_the_residual():
    """The arc y = cos θ · n + sin θ · r gives n from y and r, and so the velocity."""
    refiner = create((1, 16, 16), params=PARAMS.model_copy(update={"sampling_steps": 32}))
    generator = torch.Generator().manual_seed(3)
    refiner.spectrum = symmetric(10.0 ** (3.0 * torch.rand(1, 16, 9, generator=generator) - 1.5))
    residual = 0.01 * torch.randn(2, 1, 16, 16, generator=generator)
    white = torch.fft.rfft2(residual / refiner.residual_scale.item()) / refiner.spectrum.sqrt()

    def network(y, time, *_):
        angle = refiner._angle(time)
        noise = (torch.fft.rfft2(y) - angle.sin() * white) / angle.cos()
        return torch.fft.irfft2(angle.cos() * white - angle.sin() * noise, s=(16, 16))

    refiner.network = torch.nn.Identity()
    refiner.network.forward = network
    decoded = torch.full((2, 1, 16, 16), 0.5)
    torch.testing.assert_close(refined(refiner, decoded), decoded + residual, rtol=0.0, atol=3e-4)


def test_frequencies_of_more_power_are_ahead_and_all_reach_the_end():
    refiner = create((1, 4, 4))
    refiner.spectrum = torch.tensor([0.01, 1.0, 100.0]).expand(1, 4, 3)
    begin, middle, end = refiner._angle(torch.tensor([0.0, 0.5, 1.0]))[:, 0, 0]
    assert begin.tolist() == [0.0, 0.0, 0.0]
    assert middle[0] < middle[1] < middle[2]
    torch.testing.assert_close(middle[1], torch.tensor(math.pi / 4))
    torch.testing.assert_close(end, torch.full((3,), math.pi / 2))


def symmetric(spectrum):
    """The spectrum with equal power at mirrored frequencies, as in every real image."""
    mirrored = spectrum.flip(1).roll(1, 1)
    columns = torch.arange(spectrum.shape[2])
    alone = (columns == 0) | (columns == spectrum.shape[2] - 1)
    return torch.where(alone, 0.5 * (spectrum + mirrored), spectrum)


def test_sample_adds_noise_to_latents_decodes_and_refines():
    refiner = create()
    latents = torch.randn(2, *LATENT)
    drawn = refiner.sample(Decoder(), latents, None, torch.Generator().manual_seed(5))
    generator, levels = torch.Generator().manual_seed(5), torch.full((2,), PARAMS.sampling_noise)
    noised = refiner.noise_latents(latents, levels, generator)
    assert drawn.equal(refiner.refine(Decoder().decode(noised), levels, None, generator))


def test_latent_noise_has_the_deviation_of_each_dimension_times_the_level():
    refiner = create()
    levels = torch.tensor([0.0, 0.5, 2.0]).repeat_interleave(4000)
    latents = torch.ones(12000, *LATENT)
    noise = refiner.noise_latents(latents, levels, torch.Generator().manual_seed(0)) - latents
    assert not noise[:4000].any()
    for number, level in ((1, 0.5), (2, 2.0)):
        found = noise[4000 * number : 4000 * (number + 1)].std(0)
        torch.testing.assert_close(found, level * refiner.latent_scale, rtol=0.06, atol=1e-3)


@pytest.mark.parametrize(("guidance", "is_conditional"), [(0.0, False), (1.0, True), (2.0, True)])
def test_guidance_extrapolates_from_unconditional_to_conditional(guidance, is_conditional):
    """One step of Euler's rule is linear in the velocity."""
    params = PARAMS.model_copy(update={"solver": "euler", "sampling_steps": 1})
    decoded, label = torch.full((2, 1, 16, 16), 0.5), torch.tensor([1, 2])

    def images(strength, labels):
        return refined(create(params=params.model_copy(update={"guidance": strength})), decoded, labels)

    without, plain, guided = images(1.0, None), images(1.0, label), images(guidance, label)
    assert not plain.equal(without)
    inside = ((guided > 0.0) & (guided < 1.0) & (plain > 0.0) & (plain < 1.0)) & (without > 0.0) & (without < 1.0)
    expected = without + guidance * (plain - without)
    torch.testing.assert_close(guided[inside], expected[inside], rtol=0.0, atol=1e-5)
    assert guided.equal(without) is not is_conditional


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_label_minus_one_is_no_label(num_classes, guidance):
    refiner = create(num_classes=num_classes, params=PARAMS.model_copy(update={"guidance": guidance}))
    decoded = torch.rand(2, 1, 16, 16)
    assert refined(refiner, decoded, torch.tensor([-1, -1])).equal(refined(refiner, decoded))
    if not num_classes:
        assert refined(refiner, decoded, torch.tensor([0, 1])).equal(refined(refiner, decoded))


def test_images_of_a_batch_do_not_affect_each_other():
    refiner = create(params=PARAMS.model_copy(update={"guidance": 2.0}))
    decoded = torch.rand(2, 1, 16, 16)
    both, none = (refined(refiner, decoded, torch.tensor(labels)) for labels in ([1, -1], [-1, -1]))
    torch.testing.assert_close(both[1], none[1], rtol=0.0, atol=1e-5)
    assert not both[0].equal(none[0])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 16, 20)])
def test_a_saved_refiner_loads_unchanged(tmp_path, shape):
    refiner = create(shape)
    save_refiner(tmp_path / "a", refiner, "m")
    loaded = load_refiner(tmp_path / "a", "m")
    assert loaded is not None
    assert loaded.params == PARAMS and loaded.image_shape == shape and loaded.num_classes == 3
    decoded, labels = torch.rand(2, *shape), torch.tensor([0, 2])
    assert refined(loaded, decoded, labels, level=0.3).equal(refined(refiner, decoded, labels, level=0.3))
    assert loaded.latent_scale.equal(refiner.latent_scale)
    save_refiner(tmp_path / "b", loaded, "m")
    for name in ("refiner.json", "refiner.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_disabled_refiner_loads_as_none_and_has_no_weights(tmp_path):
    save_refiner(tmp_path, create(), "m")
    save_disabled(tmp_path, "m")
    assert load_refiner(tmp_path, "m") is None
    assert [path.name for path in tmp_path.iterdir()] == ["refiner.json"]
    with pytest.raises(UserError, match="made for model m, expected model other; run `medgen refiner` again"):
        load_refiner(tmp_path, "other")


def without(folder, *keys):
    path = folder / "refiner.json"
    meta = json.loads(path.read_text())
    node = meta
    for key in keys[:-1]:
        node = node[key]
    del node[keys[-1]]
    path.write_text(json.dumps(meta))


def changed(folder, **values):
    path = folder / "refiner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "no description": (lambda folder: (folder / "refiner.json").unlink(), "not found; run `medgen refiner`"),
    "no weights": (lambda folder: (folder / "refiner.safetensors").unlink(), "not found; run `medgen refiner`"),
    "no JSON": (lambda folder: (folder / "refiner.json").write_text("{"), "not readable as JSON"),
    "no UTF-8": (lambda folder: (folder / "refiner.json").write_bytes(b"\xff"), "not readable as JSON"),
    "a list": (lambda folder: (folder / "refiner.json").write_text("[]"), "expected a JSON object"),
    "other weights": (
        lambda folder: (folder / "refiner.safetensors").write_bytes(b"x"),
        "damaged: its SHA-256 differs",
    ),
    "no model": (lambda folder: without(folder, "model"), "damaged"),
    "no classes": (lambda folder: without(folder, "num_classes"), "damaged"),
    "no parameters": (lambda folder: without(folder, "refiner"), "damaged"),
    "an older flow": (lambda folder: without(folder, "schema"), "found schema 1, expected 3"),
    "unknown parameter": (lambda folder: changed(folder, refiner={"chanels": 8}), "damaged"),
    "wider network": (lambda folder: changed(folder, refiner={"channels": 16}), "damaged"),
    "other images": (lambda folder: changed(folder, image_shape=[3, 16, 16]), "damaged"),
    "more classes": (lambda folder: changed(folder, num_classes=4), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_error_names_the_damaged_file_and_the_command(tmp_path, case):
    damage, message = DAMAGE[case]
    save_refiner(tmp_path, create(), "m")
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_refiner(tmp_path, "m")
    assert str(tmp_path) in str(caught.value) and "medgen refiner" in str(caught.value)


def test_the_refiner_of_another_model_is_refused(tmp_path):
    save_refiner(tmp_path, create(), "a" * 64)
    with pytest.raises(UserError, match=f"made for model {'a' * 12}, expected model {'b' * 12}"):
        load_refiner(tmp_path, "b" * 64)


@pytest.mark.parametrize(("sides", "bias"), [((8, 8), 0.04), ((4, 4, 4), 0.08)])  # the volume has half as many fields
def test_training_learns_the_distribution_of_the_residual(sides, bias):
    """Residuals are ±0.2 in fields of 2 pixels a side, with a random sign for each field."""
    params = PARAMS.model_copy(update={"channels": 16, "sampling_steps": 8})
    refiner = create((1, *sides), 0, params, trained=False)
    optimizer = torch.optim.Adam(refiner.network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)

    def fields(n):
        signs = torch.randint(2, (n, 1, *(side // 2 for side in sides)), generator=generator).mul(2).sub(1).float()
        for axis in range(2, signs.dim()):
            signs = signs.repeat_interleave(2, axis)
        return 0.2 * signs

    for _ in range(300):
        greys = torch.rand(16, generator=generator).view(16, 1, *[1] * len(sides))
        decoded = 0.3 + 0.4 * greys.expand(-1, 1, *sides)
        levels, labels = torch.rand(16, generator=generator), torch.full((16,), -1)
        loss = refiner.loss(refiner.network, decoded + fields(16), decoded, levels, labels, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoded = torch.full((64, 1, *sides), 0.5)
    residual = refined(refiner, decoded) - decoded
    assert abs(float(residual.mean())) < bias
    assert float(residual.std()) == pytest.approx(0.2, rel=0.2)
    inside = residual[..., ::2, ::2] - residual[..., 1::2, 1::2]  # of one field
    across = residual[..., 1:-1:2, 1:-1:2] - residual[..., 2::2, 2::2]  # of two
    assert float(inside.std()) < 0.5 * float(across.std()), "neighbours of one field are alike"


def test_images_that_are_not_square_are_refined():
    refiner, generator = create((1, 32, 48), num_classes=0), torch.Generator().manual_seed(0)
    decoded, levels = torch.rand(2, 1, 32, 48), torch.zeros(2)
    assert refiner.refine(decoded, levels, None, generator).shape == decoded.shape
    loss = refiner.loss(refiner.network, decoded, decoded.flip(0), levels, torch.full((2,), -1), generator)
    assert bool(torch.isfinite(loss))
