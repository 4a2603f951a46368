"""MLflow pyfunc of a registered segmentation model; see medgen/serving/pyfunc.py for generative models.

    segmenter = mlflow.pyfunc.load_model("models:/lung-masks@candidate")
    masks = segmenter.predict(images)

Images are uint8 (N, H, W, C) of any size; C is that of the training. Each gets the preprocessing of the training. The
result is uint8 (N, H, W, 1), the class number of each pixel of the preprocessed image. Volumes are (N, D, H, W, C).
"""

import math
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

from medgen.data.images import to_floats
from medgen.ingest.formats.raw import RawImage
from medgen.ingest.transforms import Stored, preprocess_raw
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
        """Images uint8 (N, H, W, C) -> class numbers uint8 (N, H, W, 1); volumes (N, D, H, W, C) -> (N, D, H, W, 1).

        Raises:
            MlflowException: the images have another shape or type, or are too many or too large; the scoring server
                responds with 400. Or the call is abandoned between two batches.
        """
        images, (channels, *sides) = np.asarray(model_input), self.info.image_shape
        if images.ndim != 2 + len(sides) or images.shape[-1] != channels or images.dtype != np.uint8 or not images.size:
            axes = "N, D, H, W" if len(sides) == 3 else "N, H, W"
            raise MlflowException.invalid_parameter_value(
                f"images: found {images.dtype} {images.shape}; expected uint8 ({axes}, {channels})"
            )
        num_pixels = len(images) * max(math.prod(images.shape[1:-1]), math.prod(sides))
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
            inputs = [self._preprocess(image) for image in images[start : start + BATCH_SIZE]]
            batch = to_floats(torch.from_numpy(np.stack(inputs)).to(self.device))
            masks.append(class_indices(self.model.predict(batch).prediction).to(torch.uint8).cpu())
        return torch.cat(masks)[..., None].numpy()

    def _preprocess(self, image: NDArray[np.uint8]) -> Stored:
        """The image, or a volume whose voxels are cubes, as the model's input."""
        spacing = (1.0, 1.0, 1.0) if self.info.preprocess.has_volumes else None
        return preprocess_raw(RawImage(image, (image.shape[1], image.shape[0]), "L", spacing), self.info.preprocess)


mlflow.models.set_model(Segmenter())
