"""Responses of a loaded model to requests of MLflow's protocol."""

import gc
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from numpy.typing import NDArray
from PIL import Image
from starlette.responses import Response

from .body import FORMATS, check_images, check_table, parse_body
from .responses import ImagesResponse, bad_body, mlflow_error

SHEET_GAP = 2  # pixels between the images of a contact sheet


class ServedModel:
    """A loaded model that answers requests of MLflow's protocol, one at a time."""

    def __init__(self, model: PyFuncModel) -> None:
        self._model = model
        self._code: Any = model.unwrap_python_model()  # type: ignore[no-untyped-call]
        self._schema: Any = model.metadata.get_input_schema()  # type: ignore[no-untyped-call]

    def respond(self, body: bytes, as_png: bool, is_abandoned: Callable[[], bool]) -> Response:
        """The model's images for a request's body, as JSON or PNG.

        Args:
            is_abandoned: returns True when nobody waits for the answer any more; the model then stops.

        Raises:
            RequestError: the body is invalid.
            Exception: the model failed.
        """
        self._code.is_abandoned = is_abandoned  # code of an earlier medgen does not read it and runs to its end
        gc.disable()  # a body or an answer is millions of objects without cycles, and each collection visits them all
        try:
            return self._respond(body, as_png)
        finally:
            gc.enable()

    def _respond(self, body: bytes, as_png: bool) -> Response:
        is_table = self._schema.has_input_names()
        tree = parse_body(body, is_table)
        tree.pop("params", None)  # no model of medgen has any
        if not is_table:
            check_images(tree)
        try:
            data = scoring_server.infer_and_parse_data(tree, self._schema)
        except MlflowException as error:
            raise mlflow_error(error) from None
        except Exception:
            raise bad_body(f"not valid as {' or '.join(FORMATS)}") from None
        del tree
        if is_table:
            check_table(data, self._schema.input_names())
        try:
            images: NDArray[Any] = self._model.predict(data)  # (N, H, W, C) or (N, D, H, W, C), uint8 or uint16
        except MlflowException as error:
            raise mlflow_error(error) from None
        if not as_png:
            return ImagesResponse(json.dumps({"predictions": images.tolist()}), "application/json", len(images))
        if self._schema.is_tensor_spec():  # class numbers, spread over the grey levels to make them visible
            images = images * np.uint8(255 // max(1, int(images.max())))
        if images.ndim == 5:
            images = images[:, images.shape[1] // 2]  # the middle slices
        return ImagesResponse(contact_sheet(images), "image/png", len(images))


def contact_sheet(images: NDArray[Any]) -> bytes:
    """A PNG file of images (N, H, W, 1 or 3), row by row in a grid with about as many rows as columns.

    Grey images have as many bits as given, 8 or 16; colours have 8, since Pillow writes no others.
    """
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    white = np.iinfo(images.dtype).max
    tiles = np.full((rows * columns, height + SHEET_GAP, width + SHEET_GAP, channels), white, images.dtype)
    tiles[:n, :height, :width] = images
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)  # (rows, H + gap, columns, W + gap, C)
    sheet = grid.reshape(rows * tiles.shape[1], columns * tiles.shape[2], channels)[:-SHEET_GAP, :-SHEET_GAP]
    pixels = sheet[..., 0] if channels == 1 else (sheet / (white / 255)).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
