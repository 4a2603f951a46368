"""Tests of weights: local files, downloads from a local server, and checksums."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from medgen.datasets import weights
from medgen.errors import UserError

CONTENT = bytes(range(256)) * 1200  # of the server
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Any) -> Path:
    """Path of small test weights in an empty weights folder."""
    entry = weights.WeightsFile(url=server.url, sha256=SHA256, size=len(CONTENT), use="tests")
    monkeypatch.setattr(weights, "WEIGHTS", {"small": entry})
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights" / "weights.bin"


def test_missing_weights_are_not_downloaded(path: Path, server: Any) -> None:
    with pytest.raises(UserError) as error:
        weights.weights_path("small")
    for hint in ("medgen weights fetch small", str(path), "MEDGEN_WEIGHTS", server.url):
        assert hint in str(error.value)
    assert server.ranges == []
    assert weights.list_weights() == {"small": None}


def test_fetched_weights_are_found_and_checked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.fetch_weights("small") == path
    assert weights.weights_path("small") == weights.checked_weights("small") == path
    weights.verify_weights()
    assert weights.list_weights() == {"small": path}
    weights.show_weights()
    output = capsys.readouterr().out
    assert "is correct" in output and "use" in output


def test_base_url_replaces_the_publishers(path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = weights.WeightsFile(url="https://example.invalid/weights.bin", sha256=SHA256, size=len(CONTENT), use="")
    monkeypatch.setitem(weights.WEIGHTS, "small", entry)
    assert weights.fetch_weights("small", base_url=server.url.rpartition("/")[0] + "/") == path


def test_damaged_weights(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="307199 bytes; expected 307200"):
        weights.weights_path("small")
    path.write_bytes(CONTENT[:-1] + b"x")
    for verify in (weights.checked_weights, weights.verify_weights):
        with pytest.raises(UserError, match="SHA-256"):
            verify("small")


@pytest.mark.parametrize("name", sorted(weights.WEIGHTS))
def test_error_explains_a_download_on_another_machine(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as error:
        weights.checked_weights(name)
    entry = weights.WEIGHTS[name]
    for hint in (f"medgen weights fetch {name}", entry.url, str(tmp_path / entry.file_name), "MEDGEN_WEIGHTS"):
        assert hint in str(error.value)


def test_verify_without_any_weights(path: Path) -> None:
    with pytest.raises(UserError, match="no weights found"):
        weights.verify_weights()


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'vgg16'"):
        weights.weights_path("vgg19")


def test_file_names_hold_the_first_digits_of_the_hash() -> None:
    for entry in weights.WEIGHTS.values():
        if entry.sha256:
            assert entry.sha256[:8] in entry.file_name
            assert len(entry.sha256) == 64


def test_the_first_download_is_the_reference_where_the_publisher_gives_no_hash(
    path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = weights.WeightsFile(url=server.url, sha256="", size=300_000, use="tests")
    monkeypatch.setitem(weights.WEIGHTS, "small", entry)
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    with pytest.raises(UserError, match="not recorded; run `medgen weights fetch small`"):
        weights.checked_weights("small")
    path.unlink()
    assert weights.fetch_weights("small") == weights.checked_weights("small") == path
    path.write_bytes(CONTENT[::-1])
    for refuse in (weights.checked_weights, weights.fetch_weights):
        with pytest.raises(UserError, match="SHA-256"):
            refuse("small")
