"""Answers of the server: JSON, images, and errors in MLflow's form."""

import json
from typing import Any

from mlflow.exceptions import MlflowException
from starlette.responses import Response

MAX_MESSAGE = 400  # characters


class ImagesResponse(Response):
    """An answer with images, which the log and the metrics count."""

    def __init__(self, content: bytes | str, media_type: str, num_images: int) -> None:
        super().__init__(content, media_type=media_type)
        self.num_images = num_images


class RequestError(Exception):
    """A request that is answered with an error; `error_code` is one of MLflow's."""

    def __init__(self, status: int, error_code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.response = json_response({"error_code": error_code, "message": message}, status, named)


def json_response(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer with `tree` as JSON."""
    return Response(json.dumps(tree), status, headers, "application/json")


def invalid(message: str) -> RequestError:
    """400: a value of the request is invalid."""
    return RequestError(400, "INVALID_PARAMETER_VALUE", message)


def bad_body(reason: str) -> RequestError:
    """400: the body is not JSON of MLflow's protocol."""
    return RequestError(400, "BAD_REQUEST", f"body: {reason}")


def busy(reason: str) -> RequestError:
    """503: the server has too much to do."""
    return RequestError(503, "TEMPORARILY_UNAVAILABLE", f"busy: {reason}; try again", Retry_After="5")


def mlflow_error(error: MlflowException) -> RequestError:
    """The error of MLflow or the model without the request, which MLflow puts before the message."""
    message = error.message.rpartition("Error: ")[2] if error.message.startswith("Failed to") else error.message
    message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return RequestError(status, error.error_code, message)
