"""The refiner itself: what it learns and draws, and that its files come back as they were written."""

import json
import math

import pytest
import torch

from medgen.config import Refiner as Params
from medgen.errors import UserError
from medgen.priors.refiner import Refiner, load_refiner, patch_size, save_none, save_refiner

PARAMS = Params(enabled=True, channels=8, blocks=1, sampling_steps=2)
LATENT = (2, 4, 4)


def start(image_shape=(1, 16, 16), num_classes=3, params=PARAMS, trained=True):
    """A refiner; `trained` gives its output weights values, which are 0 before training."""
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(1)
    scales = torch.full((channels,), 0.2), torch.ones(channels, height, width // 2 + 1)
    refiner = Refiner.start(params, image_shape, num_classes, *scales, torch.rand(LATENT, generator=generator))
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

    conditional = False

    def decode(self, latent, label=None):
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
    ],
)
def test_a_patch_leaves_a_grid_of_32_positions_a_side_or_more(sides, patch):
    assert patch_size((1, *sides)) == patch


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (1, 17, 23), (1, 64, 66), (3, 15, 64)])
def test_images_of_any_size_and_colour_keep_their_shape_and_range(shape):
    refiner, decoded = start(shape), torch.rand(2, *shape)
    images = refined(refiner, decoded, torch.tensor([0, 2]))
    assert images.shape == decoded.shape and images.dtype == torch.float32
    assert float(images.min()) >= 0.0 and float(images.max()) <= 1.0
    levels, labels = torch.rand(2), torch.tensor([1, -1])
    loss = refiner.loss(refiner.network, decoded, decoded, levels, labels, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.shape == () and bool(loss.isfinite())


def test_the_same_seed_gives_the_same_network_and_the_same_images():
    first, second, other = start(), start(), start(params=PARAMS.model_copy(update={"seed": 1}))
    decoded = torch.rand(3, 1, 16, 16)
    assert refined(first, decoded).equal(refined(second, decoded))
    assert not refined(first, decoded).equal(refined(first, decoded, seed=1))
    assert not refined(first, decoded).equal(refined(other, decoded))


def test_starting_one_leaves_torchs_own_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    start()
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize(("steps", "solver"), [(1, "euler"), (3, "midpoint")])
def test_an_untrained_refiner_draws_noise_of_the_residuals_spectrum(steps, solver):
    refiner = start(
        (1, 8, 8), params=PARAMS.model_copy(update={"sampling_steps": steps, "solver": solver}), trained=False
    )
    refiner.spectrum = symmetric(torch.rand(1, 8, 5, generator=torch.Generator().manual_seed(3)) + 0.1)
    refiner.residual_scale = torch.tensor([0.01])  # so that no pixel is cut off at 0 or 1
    residual = (refined(refiner, torch.full((4000, 1, 8, 8), 0.5)) - 0.5) / 0.01
    power = torch.fft.rfft2(residual, norm="ortho").abs().square().mean(0)
    torch.testing.assert_close(power, refiner.spectrum, rtol=0.12, atol=0.0)


def test_the_gain_multiplies_each_frequency_of_a_refined_image():
    refiner = start((1, 16, 16), trained=False)
    refiner.residual_scale = torch.tensor([0.01])
    decoded = torch.full((2, 1, 16, 16), 0.5)
    plain = refined(refiner, decoded)
    refiner.gain = 0.5 + torch.arange(9).expand(16, 9) / 8  # of the horizontal frequency
    expected = torch.fft.irfft2(torch.fft.rfft2(plain) * refiner.gain)
    torch.testing.assert_close(refined(refiner, decoded), expected)


def test_a_network_that_knows_the_residual_brings_it_back():
    """By the definition of the arc, y = cos θ · n + sin θ · r: here n follows from y, and with it the velocity."""
    refiner = start((1, 16, 16), params=PARAMS.model_copy(update={"sampling_steps": 32}))
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


def test_frequencies_of_more_power_go_ahead_and_all_arrive():
    refiner = start((1, 4, 4))
    refiner.spectrum = torch.tensor([0.01, 1.0, 100.0]).expand(1, 4, 3)
    begin, middle, end = refiner._angle(torch.tensor([0.0, 0.5, 1.0]))[:, 0, 0]
    assert begin.tolist() == [0.0, 0.0, 0.0]
    assert middle[0] < middle[1] < middle[2]
    torch.testing.assert_close(middle[1], torch.tensor(math.pi / 4))
    torch.testing.assert_close(end, torch.full((3,), math.pi / 2))


def symmetric(spectrum):
    """The power that both a frequency and its mirror image have, as every real image does."""
    mirrored = spectrum.flip(1).roll(1, 1)
    columns = torch.arange(spectrum.shape[2])
    alone = (columns == 0) | (columns == spectrum.shape[2] - 1)
    return torch.where(alone, 0.5 * (spectrum + mirrored), spectrum)


def test_a_drawn_latent_is_noised_decoded_and_refined():
    refiner = start()
    latents = torch.randn(2, *LATENT)
    drawn = refiner.draw(Decoder(), latents, None, torch.Generator().manual_seed(5))
    generator, levels = torch.Generator().manual_seed(5), torch.full((2,), PARAMS.sampling_noise)
    noised = refiner.noise_latents(latents, levels, generator)
    assert drawn.equal(refiner.refine(Decoder().decode(noised), levels, None, generator))


def test_noise_has_the_deviation_of_each_dimension_times_the_level():
    refiner = start()
    levels = torch.tensor([0.0, 0.5, 2.0]).repeat_interleave(4000)
    latents = torch.ones(12000, *LATENT)
    noise = refiner.noise_latents(latents, levels, torch.Generator().manual_seed(0)) - latents
    assert not noise[:4000].any()
    for number, level in ((1, 0.5), (2, 2.0)):
        found = noise[4000 * number : 4000 * (number + 1)].std(0)
        torch.testing.assert_close(found, level * refiner.latent_scale, rtol=0.06, atol=1e-3)


@pytest.mark.parametrize(("guidance", "is_conditional"), [(0.0, False), (1.0, True), (2.0, True)])
def test_guidance_is_the_strength_of_the_label(guidance, is_conditional):
    """0 ignores it, 1 takes the conditional velocity, 2 goes as far again; a step of Euler's rule shows it plainly."""
    params = PARAMS.model_copy(update={"solver": "euler", "sampling_steps": 1})
    decoded, label = torch.full((2, 1, 16, 16), 0.5), torch.tensor([1, 2])

    def images(strength, labels):
        return refined(start(params=params.model_copy(update={"guidance": strength})), decoded, labels)

    without, plain, guided = images(1.0, None), images(1.0, label), images(guidance, label)
    assert not plain.equal(without)
    inside = ((guided > 0.0) & (guided < 1.0) & (plain > 0.0) & (plain < 1.0)) & (without > 0.0) & (without < 1.0)
    expected = without + guidance * (plain - without)
    torch.testing.assert_close(guided[inside], expected[inside], rtol=0.0, atol=1e-5)
    assert guided.equal(without) is not is_conditional


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_minus_one_is_no_label(num_classes, guidance):
    refiner = start(num_classes=num_classes, params=PARAMS.model_copy(update={"guidance": guidance}))
    decoded = torch.rand(2, 1, 16, 16)
    assert refined(refiner, decoded, torch.tensor([-1, -1])).equal(refined(refiner, decoded))
    if not num_classes:
        assert refined(refiner, decoded, torch.tensor([0, 1])).equal(refined(refiner, decoded)), "it knows no classes"


def test_labels_of_one_batch_do_not_touch_each_other():
    refiner = start(params=PARAMS.model_copy(update={"guidance": 2.0}))
    decoded = torch.rand(2, 1, 16, 16)
    both, none = (refined(refiner, decoded, torch.tensor(labels)) for labels in ([1, -1], [-1, -1]))
    torch.testing.assert_close(both[1], none[1], rtol=0.0, atol=1e-5)
    assert not both[0].equal(none[0])


def test_files_come_back_as_they_were_written(tmp_path):
    refiner = start((3, 16, 16))
    save_refiner(tmp_path / "a", refiner, "m")
    loaded = load_refiner(tmp_path / "a", "m")
    assert loaded is not None
    assert loaded.params == PARAMS and loaded.image_shape == (3, 16, 16) and loaded.num_classes == 3
    decoded, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 2])
    assert refined(loaded, decoded, labels, level=0.3).equal(refined(refiner, decoded, labels, level=0.3))
    assert loaded.latent_scale.equal(refiner.latent_scale)
    save_refiner(tmp_path / "b", loaded, "m")
    for name in ("refiner.json", "refiner.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_none_comes_back_as_none_and_leaves_no_weights(tmp_path):
    save_refiner(tmp_path, start(), "m")
    save_none(tmp_path, "m")
    assert load_refiner(tmp_path, "m") is None
    assert [path.name for path in tmp_path.iterdir()] == ["refiner.json"]
    with pytest.raises(UserError, match="made for model m, the model here is other; run `medgen refiner` again"):
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
    "no description": (lambda folder: (folder / "refiner.json").unlink(), "no refiner here; run `medgen refiner`"),
    "no weights": (lambda folder: (folder / "refiner.safetensors").unlink(), "no refiner here; run `medgen refiner`"),
    "no JSON": (lambda folder: (folder / "refiner.json").write_text("{"), "damaged"),
    "no UTF-8": (lambda folder: (folder / "refiner.json").write_bytes(b"\xff"), "damaged"),
    "a list": (lambda folder: (folder / "refiner.json").write_text("[]"), "damaged"),
    "other weights": (lambda folder: (folder / "refiner.safetensors").write_bytes(b"x"), "not the file that"),
    "no model": (lambda folder: without(folder, "model"), "damaged"),
    "no classes": (lambda folder: without(folder, "num_classes"), "damaged"),
    "no parameters": (lambda folder: without(folder, "refiner"), "damaged"),
    "an older flow": (lambda folder: without(folder, "schema"), "found schema 1, expected 3: of another medgen"),
    "unknown parameter": (lambda folder: changed(folder, refiner={"chanels": 8}), "damaged"),
    "wider network": (lambda folder: changed(folder, refiner={"channels": 16}), "damaged"),
    "other images": (lambda folder: changed(folder, image_shape=[3, 16, 16]), "damaged"),
    "more classes": (lambda folder: changed(folder, num_classes=4), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_message(tmp_path, case):
    damage, message = DAMAGE[case]
    save_refiner(tmp_path, start(), "m")
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_refiner(tmp_path, "m")
    assert str(tmp_path) in str(caught.value) and "medgen refiner" in str(caught.value)


def test_a_refiner_of_another_model_is_refused(tmp_path):
    save_refiner(tmp_path, start(), "a" * 64)
    with pytest.raises(UserError, match=f"made for model {'a' * 12}, the model here is {'b' * 12}"):
        load_refiner(tmp_path, "b" * 64)


def test_it_learns_the_spread_that_the_decoder_left_out():
    """Images are their decoded mean ± 0.2 in fields of 2×2 pixels, each field's sign by chance."""
    params = PARAMS.model_copy(update={"channels": 16, "sampling_steps": 8})
    refiner = start((1, 8, 8), 0, params, trained=False)
    optimizer = torch.optim.Adam(refiner.network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)

    def fields(n):
        signs = torch.randint(2, (n, 1, 4, 4), generator=generator).mul(2).sub(1).float()
        return 0.2 * signs.repeat_interleave(2, 2).repeat_interleave(2, 3)

    for _ in range(300):
        decoded = 0.3 + 0.4 * torch.rand(16, 1, 1, 1, generator=generator).expand(-1, 1, 8, 8)
        levels, labels = torch.rand(16, generator=generator), torch.full((16,), -1)
        loss = refiner.loss(refiner.network, decoded + fields(16), decoded, levels, labels, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoded = torch.full((64, 1, 8, 8), 0.5)
    residual = refined(refiner, decoded) - decoded
    assert abs(float(residual.mean())) < 0.04
    assert float(residual.std()) == pytest.approx(0.2, rel=0.2)
    inside = residual[..., ::2, ::2] - residual[..., 1::2, 1::2]  # of one field
    across = residual[..., 1:-1:2, 1:-1:2] - residual[..., 2::2, 2::2]  # of two
    assert float(inside.std()) < 0.5 * float(across.std()), "neighbours of one field are alike"
