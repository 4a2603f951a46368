"""The code that MLflow runs when it loads a registered version, beside the medgen package, model/, prior/, refiner/.

    generator = mlflow.pyfunc.load_model("models:/medgen@candidate")
    images = generator.predict(pandas.DataFrame({"n": [4], "label": ["NORMAL"], "seed": [0]}))
    images = generator.predict(pandas.DataFrame({"image": [base64.b64encode(open("chest.png", "rb").read()).decode()]}))

Each row asks for `n` new images, or brings an `image` to be reconstructed: a PNG, JPEG, BMP or TIFF file in base64.
`label` is a class: of new images, where it may be left out for the mix of the train split; of an image for models that
look at labels. `seed` of new images may be left out for others each time. `refine` says whether the version's refiner
adds the detail that the decoder leaves out: by default true for new images and false for a reconstruction, which may
have a `seed` where it is true. The answer is uint8 (images, H, W, C).
"""

import base64
import binascii
import math
import reprlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from torch import Tensor

from medgen.errors import UserError
from medgen.ingest.formats.images import decode
from medgen.ingest.formats.raw import UnreadableImage
from medgen.ingest.transforms import to_square
from medgen.models import bundle
from medgen.priors import find_label, sample_images
from medgen.priors.generator import load_generator

# Of one call: what is read and made is held in memory.
MAX_VALUES = 2**24  # numbers in the answer
MAX_ROWS = 1024
MAX_FILE_BYTES = 32 * 2**20
MAX_PIXELS = 40_000_000  # of a picture; the largest detectors have 30 million
MAX_LABEL_LETTERS = 200
MAX_SEED = 2**53 - 1  # what a JSON number, and a column with gaps, holds exactly


class Generator(PythonModel):
    """A model, its prior and its refiner as one callable."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads them from the version's own files."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, prior, refiner = (Path(context.artifacts[part]) for part in ("model", "prior", "refiner"))
        loaded = load_generator(model, prior, refiner, device)
        self.model, self.info, self.prior, self.refiner = loaded.model, loaded.info, loaded.prior, loaded.refiner
        self.max_images = max(1, MAX_VALUES // math.prod(self.info.image_shape))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Rows of n or image, label, seed and refine -> images uint8 (N, H, W, C), in the order of the rows.

        Raises:
            MlflowException: a row is not to be answered, or all are too many; the scoring server answers 400 then.
        """
        try:
            if not 1 <= len(model_input) <= MAX_ROWS:
                raise UserError(f"rows: found {len(model_input)} with n or image; expected 1 to {MAX_ROWS}")
            rows = model_input.to_dict("records")
            requests = [self._request({name: row[name] for name in row if _is_given(row[name])}) for row in rows]
            total = sum(request.get("n", 1) for request in requests)
            if total > self.max_images:
                raise UserError(f"n: {total} images asked for; at most {self.max_images} at once")
            answers = [self._reconstruct(**row) if "image" in row else self._generate(**row) for row in requests]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        pixels = (torch.cat(answers) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)

    def _request(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row whose values are checked, all that can be before any image is made."""
        if ("n" in row) == ("image" in row):
            found = "both" if "n" in row else "neither"
            raise UserError(f"n, image: found {found} in a row; expected n for new images, or image to reconstruct")
        label = _label(row["label"]) if row.get("label", "") != "" else None
        refine = self._refine(row["refine"]) if "refine" in row else "n" in row and self.refiner is not None
        if "seed" in row and "image" in row and not refine:
            raise UserError("seed: found beside image, whose reconstruction draws nothing without refine; leave it out")
        seed = _whole("seed", row["seed"], 0, MAX_SEED) if "seed" in row else secrets.randbelow(2**31)
        if "image" in row:
            label_index = bundle.label_to_encode(self.model, self.info, label)
            return {"image": row["image"], "label": label_index, "seed": seed, "refine": refine}
        return {
            "n": _whole("n", row["n"], 1, self.max_images),
            "label": None if label is None else find_label(label, self.info.classes, self.prior, self.model),
            "seed": seed,
            "refine": refine,
        }

    def _refine(self, value: object) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise UserError(f"refine: found {reprlib.repr(value)}; expected true or false")
        if value and self.refiner is None:
            raise UserError("refine: found true, but this version has no refiner; leave it out")
        return bool(value)

    def _generate(self, n: int, label: int | None, seed: int, refine: bool) -> Tensor:
        labels = None if label is None else torch.full((n,), label)
        refiner = self.refiner if refine else None
        return sample_images(self.prior, self.model, n, labels, seed, refiner=refiner)  # (n, C, H, W) in [0, 1]

    @torch.no_grad()
    def _reconstruct(self, image: object, label: int | None, seed: int, refine: bool) -> Tensor:
        try:
            pixels = decode(_file(image), self.info.preprocess, max_pixels=MAX_PIXELS).pixels
        except UnreadableImage as error:
            raise UserError(f"image: not readable as an image: {error}") from None
        device = next(self.model.parameters()).device
        original = torch.from_numpy(to_square(pixels, self.info.preprocess))[None].to(device).float() / 255.0
        labels = None if label is None else torch.tensor([label], device=device)
        result = self.model.reconstruct(original, labels).float()  # (1, C, H, W) in [0, 1]
        if refine and self.refiner is not None:
            level = torch.zeros(1, device=device)  # no noise on the latent: it is the picture's own
            result = self.refiner.refine(result, level, labels, torch.Generator().manual_seed(seed))
        return result.cpu()


def _is_given(value: object) -> bool:
    """False for what a table holds where a row has nothing in a column."""
    return not (value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)))


def _whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number; one among rows without it arrives as float. True, "3" and 1.5 are more likely mistakes."""
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value == int(value):
        return int(value)
    raise UserError(f"{name}: found {reprlib.repr(value)}; expected a whole number from {low} to {high}")


def _label(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MAX_LABEL_LETTERS:
        raise UserError(f"label: found {reprlib.repr(value)}; expected a class by name or index")
    return str(value)


def _file(image: object) -> bytes:
    if not isinstance(image, str):
        raise UserError(f"image: found {type(image).__name__}; expected the text of a file in base64")
    if len(image) > MAX_FILE_BYTES * 4 // 3:
        raise UserError(f"image: more than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"image: no base64 ({error}); expected a PNG, JPEG, BMP or TIFF file in it") from None


mlflow.models.set_model(Generator())
