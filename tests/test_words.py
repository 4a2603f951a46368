"""Docstrings, comments, messages and documents avoid words and openings that readers have to decode."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORDS = {  # regular expression: what to write instead
    r"mend(s|ed|ing)?": "fix",
    r"(un)?told": "conditional, unconditional; or name who passes the value",
    r"judg(e|es|ed|ing|e?ment)": "evaluate",
    r"(yardsticks?|mark to beat|held against)": "reference, baseline, compared with",
    r"beside (it|them|this|these|that|those)": "reference; or name the place",
    r"films?": "image, radiograph, X-ray",
    r"pictures?": "image, figure",
    r"(?<!\.)floors?": "layer, minimum, reference",
    r"(rooms?|houses?|doors?)": "package, entry point",
    r"seat(s|ed)?": "worker slot",
    r"numbers? (of|in) (a|the|its|their) (flattened )?latents?": "dimensions",
    r"nats (a|per) number": "nats per dimension",
    r"(how manyth|for want of|at will|reckons?|the deed|wit|gladly)": "a plain phrase",
    r"honest": "without copies, correct",
    r"flatter(s|ed|ing)?": "optimistic",
    r"of ours": "of medgen, or name it",
    r"go(es)? on": "continue, resume",
    r"look(s|ed)? through": "use, check",
    r"asks? the network": "evaluates the network",
    r"hoped( for)?": "target",
    r"say(s)? of": "describe, contain",
}
ALLOWED = r"\w*_floor\b|\b(SSIM|Dice) floor\b|\bFiLM\b"  # metric keys, parameters and a method's name
OPENINGS = {"what", "whether", "who", "whom", "whose", "how", "where", "why", "when", "which"}
DOCUMENTS = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("recipes/*.yaml"),
    *(ROOT / name for name in ("params.yaml", "dvc.yaml", "compose.yaml", "Makefile", "Dockerfile", ".env.example")),
    *ROOT.glob("slurm/*"),
]  # fmt: skip
PACKAGES = sorted(
    path for path in (ROOT / "medgen").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
)


def findings(line: int, text: str) -> Iterator[str]:
    """Each banned word in a text whose first line has this number."""
    text = re.sub(ALLOWED, lambda match: " " * len(match.group()), text)
    for pattern, instead in WORDS.items():
        for match in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE):
            yield f"{line + text.count(chr(10), 0, match.start())}: {match.group()!r}; write: {instead}"


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each comment, docstring and message of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.body[0].lineno, text


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.stem)
def test_a_package_is_written_in_plain_words(package: Path) -> None:
    found = []
    for path in sorted(package.rglob("*.py")) if package.is_dir() else [package]:
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        found += [f"{name}:{one}" for line, text in texts(source) for one in findings(line, text)]
        for line, text in docstrings(source):
            if re.split(r"\W", text, maxsplit=1)[0].lower() in OPENINGS:
                found.append(f"{name}:{line}: {text.splitlines()[0]!r}; begin with a verb or a noun")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_is_written_in_plain_words(path: Path) -> None:
    found = [f"{path.name}:{one}" for one in findings(1, path.read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)
