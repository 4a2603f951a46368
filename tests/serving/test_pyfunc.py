"""The pyfunc flavours of a version: limits of one call, and calls that nobody waits for."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from medgen.config import Preprocess
from medgen.ingest.formats.images import decode, image_size
from medgen.ingest.formats.raw import UnreadableImage
from medgen.serving import pyfunc, pyfunc_masks

SIDE = 16


class Decoder(torch.nn.Module):
    """A model that counts its calls."""

    conditional, space = False, None

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_calls = 0

    def decode(self, latents: torch.Tensor, labels: Any, conditions: Any = None) -> torch.Tensor:
        self.num_calls += 1
        return torch.zeros(len(latents), 1, SIDE, SIDE)

    def reconstruct(self, images: torch.Tensor, labels: Any) -> torch.Tensor:
        self.num_calls += 1
        return images


@pytest.fixture
def generator() -> pyfunc.Generator:
    generator: Any = pyfunc.Generator()
    generator.model, generator.refiner = Decoder(), None
    sample = SimpleNamespace(sample=lambda n, labels, random: torch.zeros(n, 4), frequencies=(), conditional=False)
    generator.prior = sample
    generator.info = SimpleNamespace(classes=(), space=None, preprocess=Preprocess(image_size=SIDE, clahe_tiles=2))
    generator.max_images = 2**16
    return generator


@pytest.fixture
def segmenter() -> pyfunc_masks.Segmenter:
    segmenter: Any = pyfunc_masks.Segmenter()
    segmenter.device = "cpu"
    segmenter.info = SimpleNamespace(image_shape=(1, 512, 512), preprocess=Preprocess(image_size=SIDE, clahe_tiles=2))
    segmenter.model = SimpleNamespace(predict=lambda images: SimpleNamespace(prediction=images))
    return segmenter


def png(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def after(calls: int) -> Any:
    """A function that returns False so many times, and then True."""
    left = iter([False] * calls)
    return lambda: next(left, True)


def test_abandoned_call_stops_between_batches(generator: pyfunc.Generator) -> None:
    generator.is_abandoned = after(2)
    with pytest.raises(MlflowException, match="abandoned"):
        generator.predict(None, pd.DataFrame({"n": [64 * 100]}))
    assert generator.model.num_calls == 3
    generator.is_abandoned = lambda: False
    assert generator.predict(None, pd.DataFrame({"n": [130]})).shape == (130, SIDE, SIDE, 1)


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_images_have_the_bits_and_sides_of_the_dataset(generator: pyfunc.Generator, bits: int, dtype: Any) -> None:
    """A reconstruction of 16 bits, 24 x 16 pixels, is the file's own grey values; the model returns what it gets."""
    generator.info.preprocess = Preprocess(
        image_size=(24, 16), clahe_clip=0.0, bits=bits, window={"low": 0, "high": 65535}
    )
    pixels = np.random.default_rng(0).integers(0, 2**16, (24, 16), dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = generator.predict(None, pd.DataFrame({"image": [base64.b64encode(file.getvalue()).decode()]}))
    assert (found.dtype, found.shape) == (dtype, (1, 24, 16, 1))
    expected = pixels if bits == 16 else np.round(pixels / 257)
    np.testing.assert_allclose(found[0, ..., 0].astype(int), expected, atol=1)


def test_abandoned_call_stops_between_rows(generator: pyfunc.Generator) -> None:
    generator.is_abandoned = after(2)
    with pytest.raises(MlflowException, match="abandoned"):
        generator.predict(None, pd.DataFrame({"image": [png(40, 40)] * 100}))
    assert generator.model.num_calls == 2


def test_pixels_of_all_images_together_are_limited_before_any_is_decoded(
    generator: pyfunc.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1024 images of 40 megapixels, 5 KB each, kept the server busy for ten minutes."""
    monkeypatch.setattr(pyfunc, "decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(MlflowException, match="image: 40960 megapixels in all rows; at most 67 in one call"):
        generator.predict(None, pd.DataFrame({"image": [png(8000, 5000)] * 1024}))


@pytest.mark.parametrize("shape", [(1025, 1, 1, 1), (65, 1, 1, 1), (1, 2**13, 2**12, 1)])
def test_number_and_size_of_images_are_limited(segmenter: pyfunc_masks.Segmenter, shape: tuple[int, ...]) -> None:
    """Masks are of 512 x 512 here: 64 of them have 2^24 pixels. Two million images of 1 x 1 took 9 GB."""
    with pytest.raises(MlflowException, match=rf"found {shape[0]} with \d+ pixels .* at most 1024 with 16777216"):
        segmenter.predict(None, np.zeros(shape, np.uint8))


def test_abandoned_masks_stop_between_batches(segmenter: pyfunc_masks.Segmenter) -> None:
    segmenter.is_abandoned = after(0)
    with pytest.raises(MlflowException, match="abandoned"):
        segmenter.predict(None, np.zeros((2, 8, 8, 1), np.uint8))


def test_jpeg_of_many_scans_is_refused() -> None:
    """Each scan visits all pixels: a file of 400 KB with 6,300 scans took 13 s."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 100).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    preprocess = Preprocess(image_size=SIDE, clahe_tiles=2)
    assert decode(data, preprocess).size == image_size(data) == (64, 64)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(UnreadableImage, match="more than 100 scans"):
        decode(data[:-2] + scan * 200 + data[-2:], preprocess)
