"""MLflow pyfunc of a registered segmentation model; medgen/serving/pyfunc.py serves generative models.

    segmenter = mlflow.pyfunc.load_model("models:/lung-masks@candidate")
    masks = segmenter.predict(images)

Images are uint8 (N, H, W, C), C as the model was trained with, of any size; each goes through the preprocessing of the
training. The answer is uint8 (N, S, S, 1), the class number of each pixel of that square.
"""

from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from medgen.ingest.transforms import to_square
from medgen.metrics.segmentation import decide
from medgen.models import bundle

BATCH_SIZE = 32


class Segmenter(PythonModel):
    """A model that finds masks as a callable."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the model from the version's own files."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.info = bundle.load(Path(context.artifacts["model"]), self.device)

    @torch.no_grad()
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints as a schema
        """Images uint8 (N, H, W, C) -> class numbers uint8 (N, S, S, 1).

        Raises:
            MlflowException: the images have another shape; the scoring server answers 400 then.
        """
        images, channels = np.asarray(model_input), self.info.image_shape[0]
        if images.ndim != 4 or images.shape[-1] != channels or images.dtype != np.uint8 or not images.size:
            raise MlflowException.invalid_parameter_value(
                f"images: found {images.dtype} {images.shape}; expected uint8 (N, H, W, {channels})"
            )
        pictures = images[..., 0] if channels == 1 else images
        masks = []
        for start in range(0, len(pictures), BATCH_SIZE):
            squares = [to_square(picture, self.info.preprocess) for picture in pictures[start : start + BATCH_SIZE]]
            batch = torch.from_numpy(np.stack(squares)).to(self.device).float() / 255.0
            masks.append(decide(self.model.predict(batch).reconstruction).to(torch.uint8).cpu())
        return torch.cat(masks)[..., None].numpy()


mlflow.models.set_model(Segmenter())
