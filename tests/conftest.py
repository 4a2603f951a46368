"""Fixtures every room shares."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Folder of real images by name, from MEDGEN_TEST_DATA or ../shared/data; skips by name where absent."""

    def find(name: str) -> Path:
        base = Path(os.environ.get("MEDGEN_TEST_DATA", ROOT.parent / "shared" / "data"))
        folder = base / name
        if not folder.exists():
            pytest.skip(f"real data {name!r} is not here (set MEDGEN_TEST_DATA)")
        return folder

    return find
