"""Conditions of images besides their class, as numbers for networks: findings, categories, numbers, mask and images.

Each condition of `preprocess.conditions` has a range of positions in a vector: first 1 if it is known and 0 if not,
then its values: 1 for the category or for each finding that the image has and 0 for the others, or a number from 0
(`low`) to 1 (`high`). All values of an unknown condition are 0. A mask and paired images are not part of the vector:
they are maps, and `map_fields` gives their channels.

space = store.conditions
vector = space.encode({"sex": "F", "age": "63", "findings": "effusion+atelectasis"})
vector = space.encode_request(parse_request("sex=F,age=63,findings=effusion+atelectasis"))

Shapes: N images, K values.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from medgen import config
from medgen.errors import UserError

MAX_VALUES = 200  # of a category or findings; a column with more is one of names or identifiers
FINDING_SEPARATORS = re.compile(r"[+|;]")
NO_FINDING = "no finding"  # as in ChestX-ray14: the image was examined and has none of the findings
_YEARS = re.compile(r"0*(\d+(?:\.\d+)?)([YMWD])", re.IGNORECASE)
_PER_YEAR = {"Y": 1, "M": 12, "W": 52, "D": 365}
_NEXT = re.compile(r",(?=[^,=]+=)")  # a comma before NAME=; others belong to a value


@dataclass(frozen=True)
class ConditionField:
    """One condition, with the values that the train split has."""

    name: str
    kind: Literal["category", "multilabel", "number", "mask", "image"]
    values: tuple[str, ...] = ()  # categories or findings, sorted
    low: float = 0.0  # of a number
    high: float = 1.0
    # of a map: known, then one for each class of a mask but the background, or the grey values of a paired image
    channels: Annotated[int, Field(ge=0, le=256)] = 0

    @property
    def size(self) -> int:
        """Length of the condition's range in the vector; 0 for a map."""
        return {"mask": 0, "image": 0, "number": 2}.get(self.kind, 1 + len(self.values))

    def describe(self) -> str:
        """Short description of the values that the condition takes."""
        match self.kind:
            case "number":
                return f"a number from {self.low:g} to {self.high:g}"
            case "mask":
                return f"a mask of {self.channels} classes"
            case "image":
                return "an image"
            case "multilabel":
                return f"any of {', '.join(self.values)}, joined by +; or {NO_FINDING}"
        return f"one of {', '.join(self.values)}"

    def encode(self, text: str) -> list[float]:
        """The condition's range for a cell of manifest.csv; an empty one or a value not in the train split is unknown.

        Raises:
            ValueError: the cell of a number holds none.
        """
        unknown = [0.0] * self.size
        if not text.strip():
            return unknown
        if self.kind == "number":
            part = (parse_number(text) - self.low) / (self.high - self.low)
            return [1.0, part] if 0.0 <= part <= 1.0 else unknown
        found = split_findings(text) if self.kind == "multilabel" else [text.strip()]
        if not set(found) <= set(self.values):
            return unknown
        return [1.0, *(float(value in found) for value in self.values)]

    def encode_request(self, value: object) -> list[float]:
        """The condition's range for a requested value: text, a number, or a list of findings.

        Raises:
            UserError: the value is unknown or out of range.
        """
        if self.kind == "number":
            try:
                number = parse_number(str(value))
            except ValueError:
                number = math.nan
            if isinstance(value, bool) or not self.low <= number <= self.high:
                raise UserError(f"condition: {self.name}: found {value!r:.80}; expected {self.describe()}")
            return self.encode(str(number))
        wanted = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
        if self.kind == "multilabel":
            wanted = [finding for text in wanted for finding in split_findings(text)]
        elif len(wanted) != 1:
            raise UserError(f"condition: {self.name}: found {len(wanted)} values; expected {self.describe()}")
        names = {name.lower(): name for name in self.values}
        found = [self._find(text, names) for text in wanted]
        return [1.0, *(float(name in found) for name in self.values)]

    def _find(self, text: str, names: Mapping[str, str]) -> str:
        if (key := text.strip().lower()) in names:
            return names[key]
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {names[near[0]]!r}? " if near else ""
        raise UserError(f"condition: {self.name}: unknown value {text[:80]!r}; {hint}Expected {self.describe()}")


@dataclass(frozen=True)
class ConditionSpace:
    """All conditions of a dataset, in the order of `preprocess.conditions`."""

    fields: tuple[ConditionField, ...]

    @classmethod
    def from_rows(cls, preprocess: config.Preprocess, rows: Iterable[Mapping[str, str]]) -> "ConditionSpace | None":
        """The conditions of `preprocess` with the values that rows of the train split have; None without conditions."""
        if not preprocess.conditions:
            return None
        found: dict[str, set[str]] = {name: set() for name in preprocess.conditions}
        for row in rows:
            for name, condition in preprocess.conditions.items():
                text = row.get(name, "").strip()
                if condition.kind == "multilabel":
                    found[name].update(split_findings(text))
                elif condition.kind == "category" and text:
                    found[name].add(text)
        fields = []
        for name, condition in preprocess.conditions.items():
            channels = {"mask": preprocess.mask_classes, "image": 2}.get(condition.kind, 0)
            low, high = (
                (0.0, 1.0) if condition.low is None or condition.high is None else (condition.low, condition.high)
            )
            fields.append(ConditionField(name, condition.kind, tuple(sorted(found[name])), low, high, channels))
        return cls(tuple(fields))

    @classmethod
    def load(cls, plain: object) -> "ConditionSpace | None":
        """The conditions that `dump` describes; None for an empty list."""
        fields = TypeAdapter(tuple[ConditionField, ...]).validate_python(plain)
        return cls(fields) if fields else None

    def dump(self) -> list[dict[str, Any]]:
        """Plain values for a JSON file."""
        plain: list[dict[str, Any]] = TypeAdapter(tuple[ConditionField, ...]).dump_python(self.fields, mode="json")
        return plain

    @property
    def size(self) -> int:
        """K, length of the vector."""
        return sum(field.size for field in self.fields)

    @property
    def mask(self) -> ConditionField | None:
        """The condition of kind mask, if there is one."""
        return next((field for field in self.fields if field.kind == "mask"), None)

    @property
    def images(self) -> tuple[ConditionField, ...]:
        """The conditions of kind image, in the order of the channels of a store's paired images."""
        return tuple(field for field in self.fields if field.kind == "image")

    @property
    def map_channels(self) -> int:
        """Channels of all maps as networks get them; 0 without any."""
        return sum(field.channels for field in self.fields)

    @property
    def map_fields(self) -> dict[str, tuple[ConditionField, slice]]:
        """Name of the mask and of each paired image to its description and its channels."""
        return _ranges((field, field.channels) for field in self.fields)

    @property
    def vector_fields(self) -> dict[str, tuple[ConditionField, slice]]:
        """Name of each condition but maps to its description and its range in the vector."""
        return _ranges((field, field.size) for field in self.fields)

    def encode(self, row: Mapping[str, str]) -> list[float]:
        """Vector (K,) of a row of a store's manifest.csv."""
        return [value for field, _ in self.vector_fields.values() for value in field.encode(row.get(field.name, ""))]

    def encode_rows(self, rows: Iterable[Mapping[str, str]]) -> NDArray[np.float32]:
        """Vectors (N, K) of rows of a store's manifest.csv."""
        vectors = [self.encode(row) for row in rows]
        return np.array(vectors, np.float32).reshape(len(vectors), self.size)

    def encode_request(self, request: Mapping[str, object]) -> list[float]:
        """Vector (K,) of the conditions requested by name; the others are unknown.

        Raises:
            UserError: a name or a value is unknown.
        """
        fields = self.vector_fields
        for name in request:
            if name not in fields:
                known = [field.name for field in self.fields]
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(f"condition: unknown name {name[:80]!r}; {hint}Known: {', '.join(known)}")
        vector = [0.0] * self.size
        for name, value in request.items():
            field, place = fields[name]
            vector[place] = field.encode_request(value)
        return vector


def _ranges(sizes: Iterable[tuple[ConditionField, int]]) -> dict[str, tuple[ConditionField, slice]]:
    """Consecutive ranges of the conditions whose size is not 0, by name."""
    ranges, start = {}, 0
    for field, size in sizes:
        if size:
            ranges[field.name] = (field, slice(start, start + size))
            start += size
    return ranges


def parse_request(text: str) -> dict[str, str]:
    """Names and values of a text such as view=AP,sex=F,findings=effusion+atelectasis.

    Raises:
        UserError: a part is not NAME=VALUE, or a name comes twice.
    """
    request: dict[str, str] = {}
    if not text.strip():
        return request
    for part in _NEXT.split(text):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not (name and equals and value):
            raise UserError(f"condition: found {part[:80]!r}, expected NAME=VALUE, such as view=AP,sex=F")
        if name in request:
            raise UserError(f"condition: {name} is given twice")
        request[name] = value.strip("\"'")
    return request


def parse_number(text: str) -> float:
    """The number in a text; an age as DICOM writes it, such as 063Y or 006M, in years.

    Raises:
        ValueError: the text is no finite number.
    """
    if match := _YEARS.fullmatch(text.strip()):
        return float(match[1]) / _PER_YEAR[match[2].upper()]
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def split_findings(text: str) -> list[str]:
    """Findings of a text such as Effusion|Atelectasis, in its order; none of an empty one or of No Finding."""
    parts = [part.strip() for part in FINDING_SEPARATORS.split(text)]
    return [part for part in parts if part and part.lower().replace("_", " ") != NO_FINDING]


def join_findings(names: Sequence[str]) -> str:
    """The text of findings, which `split_findings` reads; "No Finding" without any."""
    return "+".join(names) or NO_FINDING.title()
