"""Hash the source code that each stage of dvc.yaml runs, so that DVC reruns the stages whose code has changed.

medgen code     (the first stage of `dvc repro`)

artifacts/code/STAGE.json lists the files that the stage's module imports, directly or through others. Comments,
docstrings and blank lines do not count, and neither does code that cannot change a result.
"""

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from medgen.config import Project
from medgen.console import say
from medgen.io import hash_file, to_json, write_atomic

STAGES = {
    "preprocess": "medgen.ingest.preprocess",
    "features": "medgen.training.extractor",
    "train": "medgen.training.train",
    "prior": "medgen.training.prior",
    "refiner": "medgen.training.refiner",
    "utility": "medgen.evaluation.utility",
    "evaluate": "medgen.evaluation.evaluate",
}
# code that cannot change a stage's result: where runs are recorded, where data comes from, messages, file writing
IGNORED = ("tracking", "datasets", "console.py", "errors.py", "io.py", "machine.py", "source.py")
# files that decide the result of every training
TRAINING = tuple(
    f"training/{name}.py" for name in ("augment", "guard", "loader", "loop", "losses", "optimizers", "state")
)
NUM_NAMES = 3  # changed files that a line names
PACKAGE = Path(__file__).parent


def run(project: Project) -> None:
    """Write artifacts/code/STAGE.json for each stage: source file to the SHA-256 of its code.

    Prints a line for each stage whose code differs from the file that the last call wrote.
    """
    for stage, module in STAGES.items():
        path = project.root / "artifacts" / "code" / f"{stage}.json"
        hashes = stage_hashes(module)
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else hashes
        if changed := [name for name in sorted({*before, *hashes}) if before.get(name) != hashes.get(name)]:
            more = f" and {len(changed) - NUM_NAMES} more files" if len(changed) > NUM_NAMES else ""
            say(f"code of stage {stage} changed: {', '.join(changed[:NUM_NAMES])}{more}")
        write_atomic(path, to_json(hashes))


def stage_hashes(module: str, package: Path = PACKAGE) -> Mapping[str, str]:
    """SHA-256 of the code of each file that can change the result of a stage's module, by sorted path.

    `package` is a folder with medgen's source: the code that runs, or that of a commit.
    """
    files = {path for path in imported_files(module, package) if path.parts[0] not in IGNORED}
    hashes = {path: hash_code(package / path) for path in files}
    for folder in {path.parent for path in files if path.parent != Path()}:
        templates = (package / folder / "templates").glob("*")
        hashes |= {path.relative_to(package): hash_file(path) for path in templates}
    return {f"medgen/{path.as_posix()}": hashes[path] for path in sorted(hashes)}


def imported_files(module: str, package: Path = PACKAGE) -> set[Path]:
    """Files of medgen, relative to its folder, that a module imports, directly or through others; itself included."""
    found: set[Path] = set()
    seen, names = {module}, [module]
    while names:
        top, *parts = names.pop().split(".")
        for length in range(1, len(parts) + 1) if top == "medgen" else ():  # a package's __init__ runs first
            place = package.joinpath(*parts[:length])
            for path in (place.with_suffix(".py"), place / "__init__.py"):
                if path.is_file() and (relative := path.relative_to(package)) not in found:
                    found.add(relative)
                    more = set(_imported_names(path.read_text(encoding="utf-8"))) - seen
                    seen |= more
                    names += more
    return found


@cache
def fingerprint(*patterns: str) -> str:
    """SHA-256 of the code of medgen's files that match glob patterns relative to its folder."""
    files = sorted(path for pattern in patterns for path in PACKAGE.glob(pattern))
    lines = (f"{path.relative_to(PACKAGE).as_posix()} {hash_code(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_code(path: Path) -> str:
    """SHA-256 of a Python file without its comments, docstrings and blank lines; the same for every Python version."""
    return _hash_text(path.read_text(encoding="utf-8"))


@cache
def _hash_text(text: str) -> str:
    """`hash_code` of a file's text, which several stages and commits share."""
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            for row in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[row] = ""
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()


@cache
def _imported_names(text: str) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
