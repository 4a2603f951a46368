"""MLflow pyfunc of a registered segmentation model; see medgen/serving/pyfunc.py for generative models.

    segmenter = mlflow.pyfunc.load_model("models:/lung-masks@candidate")
    masks = segmenter.predict(images)

Images are uint8 (N, H, W, C) of any size; C is that of the training. Each gets the preprocessing of the training. The
result is uint8 (N, H, W, 1), the class number of each pixel of the preprocessed image.
"""

import math
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from medgen.data.images import to_floats
from medgen.ingest.transforms import preprocess_image
from medgen.metrics.segmentation import class_indices
from medgen.models import bundle

BATCH_SIZE = 32
# Limits of one call, whose input and output are held in memory.
MAX_IMAGES = 1024
MAX_PIXELS = 2**24  # of all images, and of all masks


class Segmenter(PythonModel):
    """A pyfunc of a segmentation model."""

    is_abandoned: Callable[[], bool] = staticmethod(lambda: False)  # set by the server: nobody waits for the result

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model from the version's files."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.info = bundle.load(Path(context.artifacts["model"]), self.device)

    @torch.no_grad()
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints as a schema
        """Images uint8 (N, H, W, C) -> class numbers uint8 (N, H, W, 1).

        Raises:
            MlflowException: the images have another shape or type, or are too many or too large; the scoring server
                responds with 400. Or the call is abandoned between two batches.
        """
        images, channels = np.asarray(model_input), self.info.image_shape[0]
        if images.ndim != 4 or images.shape[-1] != channels or images.dtype != np.uint8 or not images.size:
            raise MlflowException.invalid_parameter_value(
                f"images: found {images.dtype} {images.shape}; expected uint8 (N, H, W, {channels})"
            )
        num_pixels = len(images) * max(math.prod(images.shape[1:3]), math.prod(self.info.image_shape[1:]))
        if len(images) > MAX_IMAGES or num_pixels > MAX_PIXELS:
            raise MlflowException.invalid_parameter_value(
                f"images: found {len(images)} with {num_pixels} pixels (images or masks); expected at most "
                f"{MAX_IMAGES} with {MAX_PIXELS}"
            )
        if channels == 1:
            images = images[..., 0]
        masks = []
        for start in range(0, len(images), BATCH_SIZE):
            if self.is_abandoned():
                raise MlflowException("the call is abandoned: nobody waits for its result")
            inputs = [preprocess_image(image, self.info.preprocess) for image in images[start : start + BATCH_SIZE]]
            batch = to_floats(torch.from_numpy(np.stack(inputs)).to(self.device))
            masks.append(class_indices(self.model.predict(batch).prediction).to(torch.uint8).cpu())
        return torch.cat(masks)[..., None].numpy()


mlflow.models.set_model(Segmenter())
