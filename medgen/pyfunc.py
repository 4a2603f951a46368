"""What MLflow runs when it loads a registered version: this file, the medgen package beside it, model/ and prior/.

    generator = mlflow.pyfunc.load_model("models:/medgen@candidate")
    images = generator.predict(pandas.DataFrame({"n": [4], "label": ["NORMAL"], "seed": [0]}))
    images = generator.predict(pandas.DataFrame({"image": [base64.b64encode(open("chest.png", "rb").read()).decode()]}))

Each row asks for `n` new images, or brings an `image` to be reconstructed: a PNG, JPEG, BMP or TIFF file in base64.
`label` is a class: of new images, where it may be left out for the mix of the train split; of an image for models that
look at labels. `seed` of new images may be left out for others each time. The answer is uint8 (images, H, W, C).
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

from medgen import bundle
from medgen.data.formats.pictures import decode
from medgen.data.formats.raw import UnreadableImage
from medgen.data.squares import to_square
from medgen.errors import UserError
from medgen.priors import find_label, sample_images

# Of one call: what is read and made is held in memory.
MAX_VALUES = 2**24  # numbers in the answer
MAX_ROWS = 1024
MAX_FILE_BYTES = 32 * 2**20
MAX_PIXELS = 40_000_000  # of a picture; the largest detectors have 30 million
MAX_LABEL_LETTERS = 200
MAX_SEED = 2**53 - 1  # what a JSON number, and a column with gaps, holds exactly


class Generator(PythonModel):
    """A model and its prior as one callable."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads both from the version's own files."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, prior = (Path(context.artifacts[part]) for part in ("model", "prior"))
        self.model, self.info, self.prior = bundle.load_with_prior(model, prior, device)
        self.max_images = max(1, MAX_VALUES // math.prod(self.info.image_shape))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Rows of n, label, seed or image, label -> images uint8 (N, H, W, C), in the order of the rows.

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
        if "image" in row:
            if "seed" in row:
                raise UserError("seed: found beside image, whose reconstruction draws nothing; leave it out")
            return {"image": row["image"], "label": bundle.label_to_encode(self.model, self.info, label)}
        return {
            "n": _whole("n", row["n"], 1, self.max_images),
            "label": None if label is None else find_label(label, self.info.classes, self.prior, self.model),
            "seed": _whole("seed", row["seed"], 0, MAX_SEED) if "seed" in row else secrets.randbelow(2**31),
        }

    def _generate(self, n: int, label: int | None, seed: int) -> Tensor:
        labels = None if label is None else torch.full((n,), label)
        return sample_images(self.prior, self.model, n, labels, seed)  # (n, C, H, W) in [0, 1]

    @torch.no_grad()
    def _reconstruct(self, image: object, label: int | None) -> Tensor:
        try:
            pixels = decode(_file(image), self.info.preprocess, max_pixels=MAX_PIXELS).pixels
        except UnreadableImage as error:
            raise UserError(f"image: not readable as an image: {error}") from None
        device = next(self.model.parameters()).device
        original = torch.from_numpy(to_square(pixels, self.info.preprocess))[None].to(device).float() / 255.0
        labels = None if label is None else torch.tensor([label], device=device)
        return self.model.reconstruct(original, labels).float().cpu()  # (1, C, H, W) in [0, 1]


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
