"""Hook of mkdocs.yml, and the generator of docs/parameters.md.

python docs/site.py     write docs/parameters.md from the schema in medgen/config/
make docs               build the site: docs/, the pages outside of it, and the reference of the Python API

The site's pages are those that GitHub shows, with two differences: links to README.md and other files outside docs/
become links within the site, and the reference is generated from docstrings.
"""

import ast
import inspect
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {  # page of the site: file outside docs/
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
REFERENCE = """# Reference of the Python API
[api.md](api.md) shows how to use it.

::: medgen.load
::: medgen.Model
::: medgen.open_dataset
::: medgen.Store
::: medgen.Split
::: medgen.evaluate
::: medgen.UserError
"""
YAML = {"None": "null", "True": "true", "False": "false"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/ and the reference."""
    from mkdocs.structure.files import File

    for page, name in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference.md", content=REFERENCE))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to the site's pages, and add the empty line before a list, which GitHub does not need."""
    source = page.file.src_uri
    folder = (ROOT / OUTSIDE.get(source, f"docs/{source}")).parent
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    parts[::2] = [_LINK.sub(lambda match: _site_link(match, folder), _separate_lists(part)) for part in parts[::2]]
    return "".join(parts)


def _site_link(match: re.Match[str], folder: Path) -> str:
    image, text, target = match.groups()
    path, mark, anchor = target.partition("#")
    if not path or "://" in path:
        return match[0]
    file = (folder / path).resolve().relative_to(ROOT).as_posix()
    page = next((page for page, name in OUTSIDE.items() if name == file), file.removeprefix("docs/"))
    if page == file:  # a file that is not part of the site
        return text
    return f"{image}[{text}]({page}{mark}{anchor})"


def _separate_lists(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        starts = re.match(r"([-*]|\d+\.) ", line)
        if starts and lines and lines[-1].strip() and not re.match(r"([-*]|\d+\.) |  ", lines[-1]):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def parameters() -> str:
    """The text of docs/parameters.md."""
    from medgen.config import Params

    tables = [line for name, field in Params.model_fields.items() for line in _section(name, field.annotation, 2)]
    return "\n".join([*HEAD, *tables]) + "\n"


HEAD = [
    "# Parameters",
    "Every key of `params.yaml`. `python docs/site.py` makes this page from the schema in `medgen/config/`. A key that",
    "is left out has its default. `--set SECTION.KEY=VALUE` overrides a value for one call. An unknown key is an error",
    "that names the closest known one.",
]


def _section(name: str, kind: Any, level: int) -> Iterator[str]:
    """Heading, description and table of a section, then those of the sections in it."""
    from medgen import config

    schema, comments = kind.model_json_schema(), _comments(kind)
    yield from ("", f"{'#' * level} {name}", inspect.getdoc(kind) or "", "", "| key | value | default | meaning |")
    yield "|---|---|---|---|"
    inner: list[tuple[str, str]] = []
    for key, field in kind.model_fields.items():
        values = schema["properties"][key]
        meaning = re.sub(r"\b(None|True|False)\b", lambda word: f"`{YAML[word[0]]}`", comments.get(key, ""))
        if families := ", ".join(family for family, keys in getattr(kind, "family_keys", {}).items() if key in keys):
            meaning = f"{families}: {meaning.removeprefix(families).lstrip(': ')}".removesuffix(": ")
        default = "" if field.is_required() else _show(field.get_default(call_default_factory=True))
        if reference := _reference(values):
            if reference not in (other for _, other in inner):
                inner.append((key, reference))
            place = f"{name}.{next(first for first, other in inner if other == reference)}"
            value = f"[{place}](#{place.replace('.', '')})"
        else:
            value = _describe(values)
        cells = (f"`{key}`", value, default and f"`{default}`", meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    for key, reference in inner:
        yield from _section(f"{name}.{key}", getattr(config, reference), level + 1)


def _reference(values: dict[str, Any]) -> str | None:
    """Name of the section that a key holds, or holds by name or in a list; None for a plain value."""
    options = [values, values.get("items", {}), values.get("additionalProperties", {}), *values.get("anyOf", [])]
    options += values.get("patternProperties", {}).values()
    found = next((option["$ref"] for option in options if isinstance(option, dict) and "$ref" in option), None)
    return found and found.rsplit("/", 1)[-1]


def _describe(values: dict[str, Any]) -> str:
    """Allowed values of a key, from its JSON schema."""
    if "anyOf" in values:
        return " or ".join(_describe(option) for option in values["anyOf"])
    if "enum" in values or "const" in values:
        return ", ".join(f"`{_show(value)}`" for value in values.get("enum", [values.get("const")]))
    kind = values["type"]
    if "prefixItems" in values:
        return f"list of {len(values['prefixItems'])}: {_describe(values['prefixItems'][0])}"
    if kind == "array":
        return f"list of: {_describe(values['items'])}"
    name = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}.get(
        kind, kind
    )
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits |= {"multipleOf": "a multiple of"}
    return ", ".join([name, *(f"{text} {values[key]:g}" for key, text in limits.items() if key in values)])


def _show(value: Any) -> str:
    """A value as YAML shows it."""
    if str(value) in YAML:
        return YAML[str(value)]
    if isinstance(value, BaseModel):  # its own table has the other defaults
        changed = value.model_dump(exclude_defaults=True)
        return ", ".join(f"{key}: {_show(one)}" for key, one in changed.items())
    if isinstance(value, dict):
        return ""
    if isinstance(value, tuple | list) and not any(isinstance(one, BaseModel) for one in value):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, tuple | list):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _comments(kind: type) -> dict[str, str]:
    """Comment of each key of a section: on its own line, or on the lines before it."""
    text = inspect.getsource(kind)
    comments = {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(text).body[0].body:  # type: ignore[attr-defined]  # the class
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            before = list(
                itertools.takewhile(lambda row: comments.get(row, ("", False))[1], range(node.lineno - 1, 0, -1))
            )
            rows = [*reversed(before), *range(node.lineno, (node.end_lineno or node.lineno) + 1)]
            found[node.target.id] = " ".join(comments[row][0] for row in rows if row in comments)
    return found


if __name__ == "__main__":
    from medgen.io import write_atomic

    write_atomic(ROOT / "docs" / "parameters.md", parameters().encode())
