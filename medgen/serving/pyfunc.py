"""MLflow pyfunc of a registered generative model: generates new images and reconstructs given ones.

    generator = mlflow.pyfunc.load_model("models:/medgen@candidate")
    images = generator.predict(pandas.DataFrame({"n": [4], "label": ["NORMAL"], "seed": [0]}))
    images = generator.predict(pandas.DataFrame({"image": [base64.b64encode(open("chest.png", "rb").read()).decode()]}))

Each row requests `n` new images, or the reconstruction of `image`: a PNG, JPEG, BMP or TIFF file in base64.
- `label`: class of the new images (by default drawn with the frequencies of the train split), or of the image to
  reconstruct, which a conditional model requires and others reject.
- `condition`: further conditions of the new images, such as view=AP,sex=F,findings=effusion+atelectasis; the value of a
  mask or image is its file in base64. Only versions that were trained with conditions have this column.
- `seed`: the same seed gives the same images; by default it is random. A reconstruction has one only with `refine`.
- `refine`: use the version's refiner, which adds detail that the decoder omits; by default true for new images and
  false for a reconstruction.
The result is (images, H, W, C), uint8 or with `preprocess.bits: 16` uint16. A model of volumes gives (N, D, H, W, C)
and reconstructs no `image`.
"""

import base64
import binascii
import math
import reprlib
import secrets
from collections.abc import Callable, Mapping
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

from medgen.data.conditions import ConditionField
from medgen.data.images import to_floats, to_stored
from medgen.errors import UserError
from medgen.ingest.formats.images import decode, image_size
from medgen.ingest.formats.raw import UnreadableImage
from medgen.ingest.transforms import paired_settings, preprocess_image, resize_mask, resize_paired
from medgen.models import bundle
from medgen.nn.conditions import Conditions
from medgen.priors import find_conditions, find_label, iterate_samples
from medgen.priors.generator import load_generator

# Limits of one call, whose input and output are held in memory.
MAX_VALUES = 2**24  # in the result
MAX_ROWS = 1024
MAX_FILE_BYTES = 32 * 2**20
MAX_PIXELS = 40_000_000  # of an image; the largest detectors have 30 million
MAX_TOTAL_PIXELS = 2**26  # of all images together; 1024 images of 256 x 256 have as many
MAX_LABEL_CHARACTERS = 200
MAX_SEED = 2**53 - 1  # the largest integer that JSON numbers and columns with missing values (float64) hold exactly


class Generator(PythonModel):
    """A pyfunc of a model, its prior and its refiner."""

    is_abandoned: Callable[[], bool] = staticmethod(lambda: False)  # set by the server: nobody waits for the result

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model, prior and refiner from the version's files."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, prior, refiner = (Path(context.artifacts[part]) for part in ("model", "prior", "refiner"))
        loaded = load_generator(model, prior, refiner, device)
        self.model, self.info, self.prior, self.refiner = loaded.model, loaded.info, loaded.prior, loaded.refiner
        self.max_images = max(1, MAX_VALUES // math.prod(self.info.image_shape))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8 | np.uint16]:
        """Rows of n or image, label, seed and refine -> images (N, H, W, C) as the dataset stores them, in that order.

        Volumes are (N, D, H, W, C).

        Raises:
            MlflowException: a row is invalid, or too many images are requested; the scoring server responds with 400.
                Or the call is abandoned between two rows or batches.
        """
        try:
            if not 1 <= len(model_input) <= MAX_ROWS:
                raise UserError(f"rows: found {len(model_input)} with n or image; expected 1 to {MAX_ROWS}")
            rows = model_input.to_dict("records")
            requests = [self._request({name: row[name] for name in row if _is_given(row[name])}) for row in rows]
            total = sum(request.get("n", 1) for request in requests)
            if total > self.max_images:
                raise UserError(f"n: {total} images requested; at most {self.max_images} in one call")
            num_pixels = sum(_count_pixels(request["image"]) for request in requests if "image" in request)
            if num_pixels > MAX_TOTAL_PIXELS:
                found, most = num_pixels / 1e6, MAX_TOTAL_PIXELS // 1_000_000
                raise UserError(f"image: {found:.0f} megapixels in all rows; at most {most} in one call")
            images = [self._reconstruct(**row) if "image" in row else self._generate(**row) for row in requests]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        stored = to_stored(torch.cat(images), self.info.preprocess.bits)
        return stored.movedim(1, -1).numpy()  # (N, H, W, C)

    def _request(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The validated values of a row; all rows are validated before any image is generated."""
        if ("n" in row) == ("image" in row):
            found = "both" if "n" in row else "neither"
            raise UserError(f"n, image: found {found} in a row; expected n for new images, or image to reconstruct")
        label = _check_label(row["label"]) if row.get("label", "") != "" else None
        refine = self._refine(row["refine"]) if "refine" in row else "n" in row and self.refiner is not None
        if "seed" in row and "image" in row and not refine:
            raise UserError("seed: found with image, but only a refined reconstruction is random; leave it out")
        seed = _check_integer("seed", row["seed"], 0, MAX_SEED) if "seed" in row else secrets.randbelow(2**31)
        if "image" in row and self.info.preprocess.has_volumes:
            raise UserError("image: found an image, but this model reconstructs volumes; use `medgen reconstruct`")
        condition = _check_condition(row.get("condition", ""))
        if condition and "image" in row:
            raise UserError("condition: found with image, but it is for new images only; leave it out")
        if "image" in row:
            label_index = bundle.label_to_encode(self.model, self.info, label)
            return {"image": _decode_base64(row["image"]), "label": label_index, "seed": seed, "refine": refine}
        return {
            "n": _check_integer("n", row["n"], 1, self.max_images),
            "label": None if label is None else find_label(label, self.info.classes, self.prior, self.model),
            "seed": seed,
            "refine": refine,
            "conditions": find_conditions(condition, self.info.space, self.prior, self.model, self._read_map),
        }

    def _refine(self, value: object) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise UserError(f"refine: found {reprlib.repr(value)}; expected true or false")
        if value and self.refiner is None:
            raise UserError("refine: found true, but this version has no refiner; leave it out")
        return bool(value)

    def _read_map(self, field: ConditionField, text: str) -> npt.NDArray[np.uint8]:
        """Class numbers of a mask or grey values of a paired image (1, H, W), from a file in base64."""
        content, preprocess, is_mask = _decode_base64(text), self.info.preprocess, field.kind == "mask"
        if preprocess.has_volumes:
            raise UserError(
                f"condition: {field.name}: a map of a volume, which only `medgen generate` and the API take"
            )
        try:
            settings = preprocess if is_mask else paired_settings(preprocess)
            raw = decode(content, settings, mask=is_mask, max_pixels=MAX_PIXELS)
            return resize_mask(raw.pixels, preprocess) if is_mask else resize_paired(raw, preprocess)
        except UnreadableImage as error:
            raise UserError(f"condition: not readable as {field.describe()}: {error}") from None

    def _generate(
        self, n: int, label: int | None, seed: int, refine: bool, conditions: Conditions | None = None
    ) -> Tensor:
        labels = None if label is None else torch.full((n,), label)
        of_all = None if conditions is None else conditions.expand(n)
        refiner = self.refiner if refine else None
        batches = []
        for images, _ in iterate_samples(self.prior, self.model, n, labels, seed, refiner=refiner, conditions=of_all):
            self._check_abandoned()
            batches.append(images)
        return torch.cat(batches)  # (n, C, H, W) in [0, 1]

    @torch.no_grad()
    def _reconstruct(self, image: bytes, label: int | None, seed: int, refine: bool) -> Tensor:
        self._check_abandoned()
        try:
            pixels = decode(image, self.info.preprocess, max_pixels=MAX_PIXELS).pixels
        except UnreadableImage as error:
            raise _unreadable(error) from None
        device = next(self.model.parameters()).device
        stored = torch.from_numpy(preprocess_image(pixels, self.info.preprocess))[None]
        original = to_floats(stored.to(device))
        labels = None if label is None else torch.tensor([label], device=device)
        result = self.model.reconstruct(original, labels).float()  # (1, C, H, W) in [0, 1]
        if refine and self.refiner is not None:
            level = torch.zeros(1, device=device)  # noise of the latent: it is encoded, not drawn from the prior
            result = self.refiner.refine(result, level, labels, torch.Generator().manual_seed(seed))
        return result.cpu()

    def _check_abandoned(self) -> None:
        if self.is_abandoned():
            raise MlflowException("the call is abandoned: nobody waits for its result")


def _is_given(value: object) -> bool:
    """Return True if a cell has a value: tables represent missing values in several ways."""
    return not (value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)))


def _check_integer(name: str, value: object, low: int, high: int) -> int:
    """The value as an integer. Columns with missing values hold floats; True, "3" and 1.5 are rejected as mistakes."""
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value == int(value):
        return int(value)
    raise UserError(f"{name}: found {reprlib.repr(value)}; expected a whole number from {low} to {high}")


def _check_label(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MAX_LABEL_CHARACTERS:
        raise UserError(f"label: found {reprlib.repr(value)}; expected a class by name or index")
    return str(value)


def _check_condition(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_FILE_BYTES:
        raise UserError(f"condition: found {reprlib.repr(value)}; expected a text such as view=AP,sex=F")
    return value


def _decode_base64(image: object) -> bytes:
    if not isinstance(image, str):
        raise UserError(f"image: found {type(image).__name__}; expected a file in base64 as text")
    if len(image) > MAX_FILE_BYTES * 4 // 3:
        raise UserError(f"image: more than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"image: invalid base64 ({error}); expected a PNG, JPEG, BMP or TIFF file in base64") from None


def _count_pixels(image: bytes) -> int:
    """The number of pixels of an image file by its header, so that all are counted before any is decoded."""
    try:
        width, height = image_size(image, MAX_PIXELS)
    except UnreadableImage as error:
        raise _unreadable(error) from None
    return width * height


def _unreadable(error: UnreadableImage) -> UserError:
    return UserError(f"image: not readable as an image: {error}")


mlflow.models.set_model(Generator())
