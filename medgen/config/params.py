"""Read params.yaml, with overrides, into sections."""

import difflib
import re
import unicodedata
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medgen.config.base import WITH_CREDENTIALS, FamilySection, Section
from medgen.config.compute import Compute
from medgen.config.data import Data, Preprocess
from medgen.config.evaluation import Evaluate, Utility
from medgen.config.model import Model
from medgen.config.parts import Features, Prior, Refiner
from medgen.config.registry import Registry, Tracking
from medgen.config.search import Tune
from medgen.config.training import Loss, Train
from medgen.errors import UserError

_MAX_BYTES = 1 << 20  # of a params file; those of medgen have a thousandth
_MAX_VALUES = 10_000  # in a params file, after aliases are replaced
_MAX_SHOWN = 400  # characters of a wrong value in a message
_INDEX = re.compile("[0-9]{1,9}")


class Params(Section):
    """All sections of params.yaml."""

    data: Data = Data()
    preprocess: Preprocess = Preprocess()
    features: Features = Features()
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    prior: Prior = Prior()
    refiner: Refiner = Refiner()
    utility: Utility = Utility()
    evaluate: Evaluate = Evaluate()
    tune: Tune = Tune()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    registry: Registry = Registry()

    @model_validator(mode="before")
    @classmethod
    def _name_the_model_after_the_dataset(cls, values: Any) -> Any:
        """Give each dataset a registered model of its own, unless registry.model_name is set."""
        if not isinstance(values, dict):
            return values
        data, registry = (values.get(name, {}) for name in ("data", "registry"))
        if not isinstance(data, dict) or not isinstance(registry, dict) or "model_name" in registry:
            return values
        name = to_name(str(data.get("name", "")))
        return {**values, "registry": {**registry, "model_name": name}} if name else values


def to_name(text: str) -> str:
    """The text with only ASCII letters, digits, dots, hyphens and underscores; "" if none of its characters is one."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub("[^A-Za-z0-9._]+", "-", plain).strip("-._")


def load(path: Path, overrides: Sequence[str] = (), required: bool = True) -> Params:
    """Read and validate a params file; `overrides` are `dotted.key=YAML value`.

    Raises:
        UserError: the file is missing (if it is required) or not YAML, a key is unknown or a value is invalid.
    """
    tree = _read_yaml(path) if required or path.exists() else {}
    for override in overrides:
        _apply(tree, override)
    return _validate(tree, str(path))


def replace(params: Params, values: Mapping[str, Any], source: str) -> Params:
    """Replace the values at dotted keys, such as train.phases.kl.epochs.

    Args:
        params: the other values.
        values: dotted key to value.
        source: origin of the values, for error messages.

    Raises:
        UserError: a key is unknown or a value is invalid.
    """
    tree = params.model_dump(mode="json", context=WITH_CREDENTIALS)
    for section, family in _families().items():
        if isinstance(name := values.get(f"{section}.name"), str):  # keys of the family before would be refused
            foreign = family.foreign_keys(name)
            tree[section] = {key: value for key, value in tree[section].items() if key not in foreign}
    for key, value in values.items():
        set_at(tree, key, value, f"{source}.{key}")
    return _validate(tree, source)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found. Run medgen in the folder of the params file, or name one with --params FILE"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a params file") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: more than {_MAX_BYTES >> 20} MiB; expected a params file")
    try:
        tree = _parse_yaml(content.decode())
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'train:', found {type(tree).__name__}")
    return tree


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        YAMLError, ValueError: the text is not YAML, is nested too deeply, or its aliases expand to too many values.
    """
    try:
        if _num_values(YAML(typ="safe", pure=True).compose(text), {}) > _MAX_VALUES:
            raise ValueError(f"aliases expand to more than {_MAX_VALUES} values; write the values out")
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _num_values(node: Any, known: dict[int, int]) -> int:
    """Number of values below a node, counting an alias as the values it stands for; `known` holds those of nodes."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1  # of a node inside itself
        children = getattr(node, "value", ())
        if isinstance(children, list):
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
        else:
            known[id(node)] = 1
    return known[id(node)]


def _validate(tree: Mapping[str, Any], source: str) -> Params:
    _check_keys(tree, source)
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # report the error within a list, and not the list as well
        inner = [item for item in errors if not any(_is_inside(other["loc"], item["loc"]) for other in errors)]
        raise UserError(f"{source}: " + "\n".join(_explain(item, tree) for item in inner)) from None


def _families() -> dict[str, type[FamilySection]]:
    """Sections whose `name` chooses a family."""
    kinds = {section: field.annotation for section, field in Params.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, FamilySection)}


def _check_keys(tree: Mapping[str, Any], source: str) -> None:
    """Warn of an earlier version's keys, and refuse keys of another model or prior family."""
    train = tree.get("train")
    if isinstance(train, Mapping) and isinstance(train.get("phases"), list):
        _warn_once(f"{source}: train.phases is now a mapping from name to phase, not a list")
    for section, field in Params.model_fields.items():
        kind, values = field.annotation, tree.get(section)
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(values, Mapping):
            for key in kind.renamed.keys() & values.keys():
                _warn_once(f"{source}: {section}.{key} is now {section}.{kind.renamed[key]}; rename it")
    for section, family in _families().items():
        values = tree.get(section)
        if not isinstance(values, Mapping):
            continue
        name = values.get("name", family.model_fields["name"].default)
        for key in sorted(family.foreign_keys(name) & {family.renamed.get(key, key) for key in values}):
            owners = ", ".join(owner for owner, keys in family.family_keys.items() if key in keys)
            raise UserError(f"{source}: {section}.{key} is a key of {owners}, and {section}.name is {name}; remove it")


@cache
def _warn_once(text: str) -> None:
    """Print a warning, which a command that reads its parameters several times does not repeat."""
    from medgen.console import warn  # rich is not needed without a warning

    warn(text)


def _is_inside(place: Sequence[str | int], outer: Sequence[str | int]) -> bool:
    return len(place) > len(outer) and tuple(place[: len(outer)]) == tuple(outer)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"--set {override}: expected key=value with a dotted key, such as train.batch_size=16")
    try:
        value = _parse_yaml(text)
    except (YAMLError, ValueError) as error:
        raise UserError(f"--set {override}: the value is not YAML: {error}") from None
    set_at(tree, key.strip(), value, f"--set {override}")


def set_at(tree: Any, key: str, value: Any, source: str) -> None:
    """Set the value at a dotted key of nested mappings and lists, creating missing mappings.

    Raises:
        UserError: the key leads through a value or past the end of a list; the message starts with `source`.
    """
    node, parts = tree, key.split(".")
    for position, part in enumerate(parts):
        if isinstance(node, MutableSequence):
            if not _INDEX.fullmatch(part) or part != str(int(part)) or int(part) >= len(node):
                raise UserError(f"{source}: {part!r} is not an index into a list of {len(node)}")
            part = int(part)  # type: ignore[assignment]  # an index from here on
        elif not isinstance(node, MutableMapping):
            raise UserError(f"{source}: {'.'.join(parts[:position])} holds a value, not a section")
        elif part not in node and _INDEX.fullmatch(part) and parts[:position] == ["train", "phases"]:
            part = _phase_name(node, int(part), source)
        elif part not in node or node[part] is None:
            node[part] = {}
        if position == len(parts) - 1:
            node[part] = value
        else:
            node = node[part]


def _phase_name(phases: Mapping[str, Any], number: int, source: str) -> str:
    """Name of a phase by its number, as earlier versions named phases."""
    names = list(phases)
    if number >= len(names):
        raise UserError(f"{source}: {number} is not a phase; expected one of {', '.join(names)}")
    _warn_once(f"{source}: phase {number} is now named {names[number]}; use the name")
    return names[number]


def _explain(error: Any, tree: Mapping[str, Any]) -> str:
    """One line for an error of pydantic, with the nearest known key for an unknown one."""
    parts = list(error["loc"])
    if parts[:2] == ["train", "phases"] and len(parts) > 2 and isinstance(tree["train"]["phases"], Mapping):
        parts[2] = list(tree["train"]["phases"])[parts[2]]
    key = ".".join(str(part) for part in parts)
    if error["type"] != "extra_forbidden":
        found = repr(error["input"])
        return f"{key}: {error['msg']} (found {found[:_MAX_SHOWN]}{'…' if len(found) > _MAX_SHOWN else ''})"
    siblings = _fields_at(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), siblings, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key}: unknown key; {hint}Known here: {', '.join(siblings)}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    section: Any = Params
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue  # a position in a list, or a key of tune.space
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return list(section.model_fields)
