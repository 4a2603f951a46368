"""What MLflow runs when it loads a registered version: this file, the medgen package beside it, model/ and prior/.

    generator = mlflow.pyfunc.load_model("models:/medgen@candidate")
    images = generator.predict(pandas.DataFrame({"n": [4], "label": ["NORMAL"], "seed": [0]}))

Each row asks for `n` images; `label` (a class name, or nothing for the mix of the train split) and
`seed` (nothing for another one each time) may be left out. The answer is uint8 (sum of n, H, W, C).
"""

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

from medgen import bundle
from medgen.errors import UserError
from medgen.priors import find_label, sample_images

MAX_IMAGES = 10_000  # of one call: what is made is held in memory


class Generator(PythonModel):
    """A model and its prior as one callable."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads both from the version's own files."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, prior = (Path(context.artifacts[part]) for part in ("model", "prior"))
        self.model, self.info, self.prior = bundle.load_with_prior(model, prior, device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Rows of n, label, seed -> images uint8 (sum of n, H, W, C), in the order of the rows.

        Raises:
            MlflowException: n is out of range or the label unknown; the scoring server answers 400 then.
        """
        requests = [self._request(row) for row in model_input.to_dict("records")]
        total = sum(n for n, _, _ in requests)
        if total > MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(f"n: {total} images asked for; at most {MAX_IMAGES} at once")
        return np.concatenate([self._generate(*request) for request in requests])

    def _request(self, row: Mapping[str, Any]) -> tuple[int, int | None, int]:
        n, label, seed = int(row["n"]), row.get("label"), row.get("seed", np.nan)
        if n < 1:
            raise MlflowException.invalid_parameter_value(f"n: found {n}; expected 1 to {MAX_IMAGES}")
        if pd.isna(label) or label == "":
            number = None
        else:
            try:
                number = find_label(str(label), self.info.classes, self.prior, self.model)
            except UserError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
        return n, number, secrets.randbelow(2**31) if pd.isna(seed) else int(seed)

    def _generate(self, n: int, label: int | None, seed: int) -> npt.NDArray[np.uint8]:
        labels = None if label is None else torch.full((n,), label)
        images = sample_images(self.prior, self.model, n, labels, seed)  # (n, C, H, W) in [0, 1]
        pixels = (images * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()  # (n, H, W, C)


mlflow.models.set_model(Generator())
