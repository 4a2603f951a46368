"""Files that ship with medgen: recipes/, and params.yaml, dvc.yaml and .dvcignore for new projects."""

from pathlib import Path

_INSTALLED = Path(__file__).with_name("files")  # the wheel's copy; pyproject.toml lists the files
_CHECKOUT = Path(__file__).parents[2]


def find_shipped(name: str) -> Path:
    """Path of a shipped file or folder: in the installed package, or in the checkout that medgen runs from."""
    return (_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT) / name
