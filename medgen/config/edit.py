"""Change values in the text of a params file, and keep comments and all other text.

ruamel.yaml finds the positions of the values. It does not write the file, because it would change indentation and
spaces in braces.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

Value = bool | int | float | str


def set_value(text: str, key: str, value: Value) -> str:
    """The YAML text with the value at a dotted key, which is added if it is missing.

    Raises:
        YAMLError: the text is not YAML.
    """
    node, parts = YAML().compose(text), key.split(".")
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
    before = text[:at] if at <= len(text) else text + newline(text)
    return f"{before}{' ' * node.start_mark.column}{key}: {written}{newline(text)}{text[at:]}"


def newline(text: str) -> str:
    """The line ending of a text."""
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
