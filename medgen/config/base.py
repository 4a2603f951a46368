"""Base class and number types of the sections of params.yaml; hashes and seeds made from values."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# upper bounds are far above use; they keep a mistyped number from filling the memory
Count = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]  # channels or dimensions
Depth = Annotated[int, Field(ge=1, le=256)]  # layers
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
WITH_CREDENTIALS = {"credentials": True}  # context of a dump that is only used in this process
SECRET_QUERY = re.compile(r"pass|pwd|token|secret|key|sig|credential", re.IGNORECASE)  # in the name of a query's value


def without_credentials(url: str) -> str:
    """The URL without user, password, and secrets in its query, for messages and records.

    A password may contain any character, also those that must be escaped in a URL, so everything up to the last @ is
    removed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or rest.startswith("/"):  # a file
        return url
    host = rest.rpartition("@")[2]
    address, mark, query = host.partition("?")
    kept = [part for part in query.split("&") if part and not SECRET_QUERY.search(part.partition("=")[0])]
    return f"{scheme}://{address}{mark if kept else ''}{'&'.join(kept)}"


def _dump_url(url: str, info: SerializationInfo) -> str:
    return url if info.context == WITH_CREDENTIALS else without_credentials(url)


def _check_url(url: str) -> str:
    urlsplit(url)  # raises ValueError, for example for http://[::1
    return url


Url = Annotated[
    str, AfterValidator(_check_url), PlainSerializer(_dump_url)
]  # a dump, such as for a record, has no credentials


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[Mapping[str, str]] = {}  # earlier name of a key -> its name

    @model_validator(mode="before")
    @classmethod
    def _rename_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {cls.renamed.get(key, key): value for key, value in values.items()}


class FamilySection(Section):
    """A section whose `name` chooses a family, with keys that only some families use.

    A dump has the chosen family's keys only, so that the others do not change a fingerprint.
    """

    family_keys: ClassVar[Mapping[str, frozenset[str]]]  # family -> its keys, besides those of all families
    new_keys: ClassVar[tuple[str, ...]] = ()  # left out of a dump at their defaults, see `without_defaults`

    @classmethod
    def foreign_keys(cls, name: str | None) -> frozenset[str]:
        """Keys that the family does not use; none if the family is not known."""
        own = cls.family_keys.get(name or "")
        return frozenset() if own is None else frozenset().union(*cls.family_keys.values()) - own

    @model_serializer(mode="wrap")
    def _own_keys_only(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = self.foreign_keys(getattr(self, "name", None))
        own = {key: value for key, value in dump(self).items() if key not in foreign}
        return without_defaults(self, own, *self.new_keys)


def without_defaults(section: Section, dump: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A dump without those of `keys` that have their default: keys of later versions, which change no fingerprint."""
    fields = type(section).model_fields
    return {
        key: value for key, value in dump.items() if key not in keys or getattr(section, key) != fields[key].default
    }


def fingerprint(*parts: object) -> str:
    """First twelve hexadecimal digits of the SHA-256 of JSON-serialisable values or sections."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def seed_of(*parts: int) -> int:
    """63-bit seed from integers such as (seed, step, rank); neighbouring integers give unrelated seeds."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
