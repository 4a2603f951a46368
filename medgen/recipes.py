"""Complete params files: `medgen recipe list · show · use`. Their first line says what they are."""

from pathlib import Path

from medgen.config import Project, load, unknown_name
from medgen.files import write_atomic


def known() -> dict[str, str]:
    """Name to first line of every recipe that ships with medgen."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in _files()}


def read(name: str) -> str:
    """The text of a recipe.

    Raises:
        UserError: there is no such recipe; lists the known ones.
    """
    paths = {path.stem: path for path in _files()}
    if name not in paths:
        raise unknown_name("recipe", name, paths)
    return paths[name].read_text(encoding="utf-8")


def use(name: str, project: Project) -> None:
    """Writes a recipe to params.yaml; the one before is kept as params.yaml.before."""
    text = read(name)
    path = project.root / "params.yaml"
    if path.exists():
        write_atomic(path.with_name("params.yaml.before"), path.read_bytes())
    write_atomic(path, text.encode())
    load(path)
    print(f"params.yaml is now recipe {name!r}; the one before is params.yaml.before. Next: dvc repro")


def _files() -> list[Path]:
    here = Path(__file__).parent
    installed, checkout = here / "recipes", here.parent / "recipes"
    return sorted((installed if installed.is_dir() else checkout).glob("*.yaml"))
