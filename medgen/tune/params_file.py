"""The best values in a params file: best.yaml beside it, or in the file itself; all other text stays as it was."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from medgen.config import Params, load, replace
from medgen.errors import UserError
from medgen.io import write_atomic
from medgen.tune.space import Value, value_at
from medgen.tune.study import Study, trial_name


def write_best(study: Study, trial: FrozenTrial, params_file: Path, folder: Path) -> Path:
    """Writes best.yaml: the params file with the trial's values, below lines that name study, trial and metrics.

    Raises:
        UserError: as `apply_best`.
    """
    scores = study.scores(trial)
    head = [
        f"# medgen tune, study {study.name}: {trial_name(trial)}, best of {len(study.trials)}",
        *(f"# val {name} {score:.5g}" for name, score in scores.items()),
        f"# {params_file.name} with this trial's values; `medgen tune --apply` writes them into it",
    ]
    text = _with_values(study, trial, params_file).removeprefix("\ufeff")
    path = folder / "best.yaml"
    write_atomic(path, ("".join(f"{line}{_newline(text)}" for line in [*head, "#"]) + text).encode())
    return path


def apply_best(study: Study, trial: FrozenTrial, params_file: Path) -> bool:
    """Writes the trial's values into the params file; all other text stays as it is.

    Returns:
        False where the file has these values already, and is not touched.

    Raises:
        UserError: the file is missing or no params file, or one that the values cannot be put into; it stays as it was.
    """
    text = _with_values(study, trial, params_file)
    if text.encode() == params_file.read_bytes():
        return False
    write_atomic(params_file, text.encode())
    return True


def _with_values(study: Study, trial: FrozenTrial, params_file: Path) -> str:
    """The text of the params file with the trial's values.

    ruamel finds the places; its own writing would lay out anew what it does not know how to keep, such as other
    indentation or spaces in braces.
    """
    source, values = trial_name(trial), study.tried(trial)
    own = load(params_file)
    wanted = replace(own, values, source)
    text = params_file.read_bytes().decode()  # read_text would turn \r\n into \n
    differing = {key: value for key, value in values.items() if not _has(own, key, value)}
    try:
        for key, value in differing.items():
            text = _put(text, key.split("."), value)
        found = Params.model_validate(YAML(typ="safe", pure=True).load(text))
    except (YAMLError, ValidationError):
        found = None
    if found != wanted:
        told = ", ".join(f"{key}: {as_yaml(value)}" for key, value in differing.items())
        raise UserError(
            f"{params_file}: the values of {source} cannot be put in (are there anchors or aliases?); write them "
            f"yourself: {told}"
        )
    return text


def _has(params: Params, key: str, value: Value) -> bool:
    try:
        return bool(value_at(params, key) == value)
    except UserError:  # it leads through null
        return False


def _put(text: str, parts: Sequence[str], value: Value) -> str:
    """The YAML text with the value at the key of these parts, which is added where it is missing."""
    node = YAML().compose(text)
    for depth, part in enumerate(parts):
        child = _child(node, part)
        if child is None:
            return _add(text, node, parts[depth:], value)
        node = child
    return _replaced(text, node, as_yaml(value))


def _child(node: Any, part: str) -> Any:
    if isinstance(node, SequenceNode):
        return node.value[int(part)]
    pairs = node.value if isinstance(node, MappingNode) else []
    return next((child for key, child in pairs if key.value == part), None)


def _replaced(text: str, node: Any, written: str) -> str:
    start, end = node.start_mark.index, node.end_mark.index
    return text[:start] + (written if start < end else f" {written}") + text[end:]  # nothing: right after its colon


def _add(text: str, node: Any, parts: Sequence[str], value: Value) -> str:
    """The text with a new key in a section: the last in its braces, or on a line of its own after its last value."""
    key, *inner = parts
    written = as_yaml(value)
    for part in reversed(inner):
        written = f"{{{part}: {written}}}"
    if isinstance(node, ScalarNode):  # null
        return _replaced(text, node, f"{{{key}: {written}}}")
    if node.flow_style:
        at = node.value[-1][1].end_mark.index if node.value else node.end_mark.index - 1
        return text[:at] + (", " if node.value else "") + f"{key}: {written}" + text[at:]
    last = node.value[-1][1]
    while isinstance(last, MappingNode | SequenceNode) and not last.flow_style:  # its own end is past all comments
        last = last.value[-1][1] if isinstance(last, MappingNode) else last.value[-1]
    at = last.end_mark.index
    if text[at - 1] != "\n":  # a block of text ends with its line
        at = (text + "\n").index("\n", at) + 1
    before = text[:at] if at <= len(text) else text + _newline(text)
    return f"{before}{' ' * node.start_mark.column}{key}: {written}{_newline(text)}{text[at:]}"


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def as_yaml(value: Value) -> str:
    """The value as YAML, as short as it can be said exactly."""
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return shortest(repr(value))
    reads = YAML(typ="safe", pure=True)
    try:
        plain = reads.load(f"[{value}]") == [value] and reads.load(f"{{a: {value}}}") == {"a": value}
    except YAMLError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)


def shortest(number: str) -> str:
    """1.50e-05 -> 1.5e-5."""
    return re.sub(r"(\.\d*?)0*e\+?(-?)0*(\d)", r"\1e\2\3", re.sub(r"^(-?\d+)e", r"\1.e", number)).replace(".e", "e")
