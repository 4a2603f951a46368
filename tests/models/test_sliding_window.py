"""Models trained on patches: windows cover the image, and their weighted mean is the whole image's result."""

import dataclasses

import pytest
import torch

from medgen.config import Model, Preprocess
from medgen.errors import UserError
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.models.sliding_window import Windows, by_windows

SIZES = {  # window and grid, in positions, and pixels per position
    "one window": ((4,), (4,), 2),
    "overlap": ((4, 4), (8, 4), 4),
    "odd": ((4, 5), (9, 11), 1),
    "volume": ((2, 3, 4), (5, 6, 7), 2),
    "window of one position": ((1, 1), (3, 2), 3),
}


@pytest.mark.parametrize(("size", "grid", "stride"), SIZES.values(), ids=SIZES)
def test_a_function_of_single_positions_gives_the_result_of_the_whole(size, grid, stride):
    """Weights of the windows over a position sum to 1, in an encoder, in a decoder and from image to image."""
    windows = Windows(size, grid, stride)
    image = torch.rand(2, 3, *(stride * side for side in grid))
    latent = torch.rand(2, 3, *grid)
    whole = torch.nn.functional.interpolate(latent, scale_factor=stride)
    torch.testing.assert_close(windows.apply(lambda part: 2.0 * part, image, stride, stride), 2.0 * image)
    torch.testing.assert_close(
        windows.apply(lambda part: torch.nn.functional.interpolate(part, scale_factor=stride), latent, 1, stride), whole
    )
    strided = (..., *[slice(None, None, stride)] * len(grid))
    torch.testing.assert_close(windows.apply(lambda part: part[strided], whole, stride, 1), latent)


def test_the_middle_of_a_window_weighs_most():
    """Two windows that overlap by half: the result is nearer to the one whose middle is nearer."""
    windows, calls = Windows((4,), (6,), 1), []

    def number(part):
        calls.append(part)
        return torch.full_like(part, float(len(calls)))

    result = windows.apply(number, torch.zeros(1, 1, 6), 1, 1)[0, 0]
    assert result[:2].tolist() == [1.0, 1.0] and result[4:].tolist() == [2.0, 2.0]
    assert 1.0 < result[2] < 1.5 < result[3] < 2.0


FAMILIES = {
    "spatial_vae": {"base_channels": 4, "latent_channels": 2, "latent_size": 8, "attention_resolutions": ()},
    "vqvae": {"base_channels": 4, "latent_channels": 2, "latent_size": 8, "attention_resolutions": ()},
    "autoencoder": {"base_channels": 2, "latent_channels": 2, "latent_size": 8},
    "unet": {"base_channels": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_model_trained_on_patches_is_loaded_to_work_by_windows(tmp_path, name, dims):
    """Each window gets the patch's result; where only one window is, that is the result of the whole image."""
    image_shape, patch = (1, *[32] * dims), (16,) * dims
    sizes = Model(name=name, dims=dims, **FAMILIES[name])
    torch.manual_seed(0)
    model = build_model(sizes, image_shape, 0).eval()
    size = 32 if dims == 2 else (32, 32, 32)
    preprocess = Preprocess(image_size=size, clahe_clip=0.0)
    info = BundleInfo(sizes, preprocess, image_shape, (), "d" * 12, "r" * 12, torch.__version__, patch=patch)
    bundle.save(tmp_path, model, info)
    loaded, found = bundle.load(tmp_path)
    assert found == info
    image, corner = torch.rand(2, *image_shape), (..., *[slice(16)] * dims)
    with torch.no_grad():
        result, whole = loaded.predict(image).prediction, model.predict(image[corner]).prediction
    assert result.shape == image.shape and bool(torch.isfinite(result).all())
    assert result.min() >= 0 and result.max() <= 1
    alone = (..., *[slice(8 if name == "unet" else 2)] * dims)  # the decoder sees overlapping latents farther in
    torch.testing.assert_close(result[alone], whole[alone], atol=2e-2, rtol=0)
    whole_info = dataclasses.replace(info, patch=None)
    bundle.save(tmp_path, model, whole_info)
    assert type(bundle.load(tmp_path)[0]) is type(model)
    assert "patch" not in (tmp_path / "model.json").read_text()


@pytest.mark.parametrize(
    ("name", "patch", "words"),
    [
        ("spatial_vae", (16,), "16; expected 2 sides of at most 32 x 32"),
        ("spatial_vae", (16, 64), "16 x 64; expected 2 sides of at most 32 x 32"),
        ("spatial_vae", (16, 18), "multiples of 4"),
        ("vae", (16, 16), "flat latent"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(name, patch, words):
    model = build_model(Model(name=name, base_channels=2, latent_channels=2), (1, 32, 32), 0)
    with pytest.raises(UserError, match=rf"train\.patch: .*{words}"):
        by_windows(model, patch, (1, 32, 32))
