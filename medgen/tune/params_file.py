"""Write the best values into a copy of the params file (best.yaml), or into the file itself; keep all other text."""

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
    """Write best.yaml: the params file with the trial's values, below comments that name study, trial and metrics.

    Raises:
        UserError: as in `apply_best`.
    """
    scores = study.scores(trial)
    head = [
        f"# medgen tune, study {study.name}: {trial_name(trial)}, best of {len(study.trials)}",
        *(f"# val {name} {score:.5g}" for name, score in scores.items()),
        f"# {params_file.name} with this trial's values; `medgen tune --apply` writes them into it",
    ]
    text = _insert_values(study, trial, params_file).removeprefix("\ufeff")
    path = folder / "best.yaml"
    comments = "".join(f"{line}{_newline(text)}" for line in [*head, "#"])
    write_atomic(path, (comments + text).encode())
    return path


def apply_best(study: Study, trial: FrozenTrial, params_file: Path) -> bool:
    """Write the trial's values into the params file; all other text stays the same.

    Returns:
        False if the file has these values already; it is not written then.

    Raises:
        UserError: the file is missing or invalid, or the values cannot be written into it; it is not changed.
    """
    text = _insert_values(study, trial, params_file)
    if text.encode() == params_file.read_bytes():
        return False
    write_atomic(params_file, text.encode())
    return True


def _insert_values(study: Study, trial: FrozenTrial, params_file: Path) -> str:
    """The text of the params file with the trial's values.

    ruamel.yaml finds the positions of the values. It does not write the file, because it would change indentation and
    spaces in braces.
    """
    source, values = trial_name(trial), study.values_of(trial)
    own = load(params_file)
    wanted = replace(own, values, source)
    text = params_file.read_bytes().decode()  # read_text would convert \r\n to \n
    changes = {key: value for key, value in values.items() if not _has_value(own, key, value)}
    try:
        for key, value in changes.items():
            text = _set_value(text, key.split("."), value)
        found = Params.model_validate(YAML(typ="safe", pure=True).load(text))
    except (YAMLError, ValidationError):
        found = None
    if found != wanted:
        listed = ", ".join(f"{key}: {as_yaml(value)}" for key, value in changes.items())
        raise UserError(
            f"{params_file}: cannot insert the values of {source}, perhaps because of anchors or aliases; insert them "
            f"by hand: {listed}"
        )
    return text


def _has_value(params: Params, key: str, value: Value) -> bool:
    try:
        return bool(value_at(params, key) == value)
    except UserError:  # a section of the key is null
        return False


def _set_value(text: str, parts: Sequence[str], value: Value) -> str:
    """The YAML text with the value at the key with these parts, which is added if it is missing."""
    node = YAML().compose(text)
    for depth, part in enumerate(parts):
        child = _child(node, part)
        if child is None:
            return _add_key(text, node, parts[depth:], value)
        node = child
    return _replace_node(text, node, as_yaml(value))


def _child(node: Any, part: str) -> Any:
    if isinstance(node, SequenceNode):  # phases in earlier versions: a list of mappings with a name
        return next((item for item in node.value if getattr(_child(item, "name"), "value", None) == part), None)
    pairs = node.value if isinstance(node, MappingNode) else []
    return next((child for key, child in pairs if key.value == part), None)


def _replace_node(text: str, node: Any, written: str) -> str:
    start, end = node.start_mark.index, node.end_mark.index
    space = "" if start < end else " "  # an empty value starts directly after its colon
    return f"{text[:start]}{space}{written}{text[end:]}"


def _add_key(text: str, node: Any, parts: Sequence[str], value: Value) -> str:
    """The text with a new key at the end of a section, in its braces or on a line of its own."""
    key, *inner = parts
    written = as_yaml(value)
    for part in reversed(inner):
        written = f"{{{part}: {written}}}"
    if isinstance(node, ScalarNode):  # null
        return _replace_node(text, node, f"{{{key}: {written}}}")
    if node.flow_style:
        at = node.value[-1][1].end_mark.index if node.value else node.end_mark.index - 1
        return text[:at] + (", " if node.value else "") + f"{key}: {written}" + text[at:]
    last = node.value[-1][1]
    # the end mark of a block mapping or list is after the comments that follow it
    while isinstance(last, MappingNode | SequenceNode) and not last.flow_style:
        last = last.value[-1][1] if isinstance(last, MappingNode) else last.value[-1]
    at = last.end_mark.index
    if text[at - 1] != "\n":  # a block scalar ends after its line
        at = (text + "\n").index("\n", at) + 1
    before = text[:at] if at <= len(text) else text + _newline(text)
    return f"{before}{' ' * node.start_mark.column}{key}: {written}{_newline(text)}{text[at:]}"


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def as_yaml(value: Value) -> str:
    """The shortest exact YAML text of a value."""
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return shortest(repr(value))
    yaml = YAML(typ="safe", pure=True)
    try:
        is_plain = yaml.load(f"[{value}]") == [value] and yaml.load(f"{{a: {value}}}") == {"a": value}
    except YAMLError:
        is_plain = False
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def shortest(number: str) -> str:
    """Shorten a number in scientific notation: 1.50e-05 -> 1.5e-5."""
    return re.sub(r"(\.\d*?)0*e\+?(-?)0*(\d)", r"\1e\2\3", re.sub(r"^(-?\d+)e", r"\1.e", number)).replace(".e", "e")
