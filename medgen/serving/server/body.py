"""Check the body of a request before MLflow converts it, which takes far more time and memory than parsing it."""

import json
import math
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from .responses import bad_body, invalid

FORMATS = ("dataframe_records", "dataframe_split", "inputs", "instances")  # of MLflow's protocol
MAX_ROWS = 1024  # of a table, or images of an array: MLflow checks each value in Python
MAX_TABLE_MARKS = 2**15  # brackets and commas: three times those of MAX_ROWS complete rows
MAX_NUMBERS = 2**24  # in an array of images


def parse_body(body: bytes, is_table: bool = True) -> dict[str, Any]:
    """The JSON object of a body; rejects what MLflow would answer with a stack trace or with the body itself.

    Brackets and commas are counted first: 16 MiB of `[[]]` would take seconds to parse and 400 MB.

    Raises:
        RequestError: the body is not a JSON object of MLflow's protocol, or has too many rows or images.
    """
    if is_table and sum(map(body.count, (b"[", b"{", b","))) > MAX_TABLE_MARKS:
        raise bad_body(f"more values than {MAX_ROWS} rows have; send fewer rows")
    if not is_table:
        marks = body.translate(None, b" \t\r\n")
        if marks.count(b"]]]") > MAX_ROWS:  # each image ends with those of its last pixel, its last row and its own
            raise _too_many_images()
        if b"[]" in marks:
            raise bad_body("found an empty list; expected images N x H x W x C")
    try:
        tree = json.loads(body.decode(), parse_constant=_parse_finite, parse_float=_parse_finite)
    except UnicodeDecodeError as error:
        raise bad_body(f"not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise bad_body("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise bad_body(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise bad_body("a number is not finite or has too many digits") from None
    if not isinstance(tree, dict):
        raise bad_body('expected an object such as {"dataframe_records": [{"n": 1}]}')
    if sum(name in tree for name in FORMATS) != 1 or set(tree) - {*FORMATS, "params"}:
        raise bad_body(f"expected one of the fields {', '.join(FORMATS)}, and no other")
    if not isinstance(tree.get("params"), dict | None):
        raise bad_body("params: expected an object")
    return tree


def check_table(data: Any, columns: list[str]) -> None:
    """Raise an error for unknown columns, which MLflow would drop: a misspelt label would count as no label."""
    try:
        table = pd.DataFrame(data)
    except Exception:
        raise invalid(f"rows: not a table with the columns {', '.join(columns)}") from None
    if len(table) > MAX_ROWS:
        raise invalid(f"rows: found {len(table)}; expected 1 to {MAX_ROWS}")
    if unknown := sorted({str(name) for name in table.columns} - set(columns)):
        raise invalid(f"{unknown[0][:40]}: unknown column; expected {', '.join(columns)}")


def check_images(tree: dict[str, Any]) -> None:
    """Raise an error unless a parsed body has a list of images (N, H, W, C) within the limits.

    Only the first image's size is looked at: MLflow refuses images of different sizes.
    """
    images = tree.get("inputs", tree.get("instances"))
    if not isinstance(images, list):
        raise bad_body("expected the field inputs with a list of images N x H x W x C")
    shape: list[int] = []
    first: Any = images
    while isinstance(first, list) and len(shape) < 4:
        shape.append(len(first))
        first = first[0] if first else None
    if len(images) > MAX_ROWS:
        raise _too_many_images()
    if math.prod(shape) > MAX_NUMBERS:
        raise invalid(f"images: {' x '.join(map(str, shape))} numbers; expected at most {MAX_NUMBERS}")


def _too_many_images() -> Exception:
    return invalid(f"images: more than {MAX_ROWS} in one request; send fewer")


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number
