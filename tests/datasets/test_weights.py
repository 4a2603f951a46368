"""Weights are found, fetched from a server on loopback, and checked."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from medgen.datasets import weights
from medgen.errors import UserError

CONTENT = bytes(range(256)) * 1200  # what the server sends
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Any) -> Path:
    """A small known weight and an empty weights folder."""
    weight = weights.Weight(url=server.url, sha256=SHA256, size=len(CONTENT), use="tests")
    monkeypatch.setattr(weights, "WEIGHTS", {"small": weight})
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights" / "weights.bin"


def test_absent_weights_say_how_to_get_them_and_are_never_downloaded(known: Path, server: Any) -> None:
    with pytest.raises(UserError) as error:
        weights.weights_path("small")
    for hint in ("medgen weights fetch small", str(known), "MEDGEN_WEIGHTS", server.url):
        assert hint in str(error.value)
    assert server.ranges == []
    assert weights.list_weights() == {"small": None}


def test_fetched_weights_are_found_and_verified(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.fetch_weights("small") == known
    assert weights.weights_path("small") == weights.verify_weights("small") == known
    assert weights.list_weights() == {"small": known}
    weights.show_weights()
    assert "small" in capsys.readouterr().out


def test_a_mirror_serves_the_same_file(known: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = weights.Weight(url="https://example.invalid/weights.bin", sha256=SHA256, size=len(CONTENT), use="")
    monkeypatch.setitem(weights.WEIGHTS, "small", elsewhere)
    assert weights.fetch_weights("small", base_url=server.url.rpartition("/")[0] + "/") == known


def test_damaged_weights_are_noticed(known: Path) -> None:
    known.parent.mkdir()
    known.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="307199 bytes; expected 307200"):
        weights.weights_path("small")
    known.write_bytes(CONTENT[:-1] + b"x")
    for look in (weights.checked_weights, weights.verify_weights):
        with pytest.raises(UserError, match="SHA-256"):
            look("small")


@pytest.mark.parametrize("name", sorted(weights.WEIGHTS))
def test_a_machine_without_network_is_told_what_to_bring_and_where(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as error:
        weights.checked_weights(name)
    weight = weights.WEIGHTS[name]
    for hint in (f"medgen weights fetch {name}", weight.url, str(tmp_path / weight.file), "MEDGEN_WEIGHTS"):
        assert hint in str(error.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="did you mean 'vgg16'"):
        weights.weights_path("vgg19")


def test_known_files_carry_the_beginning_of_their_hash_in_their_name() -> None:
    for weight in weights.WEIGHTS.values():
        assert weight.sha256[:8] in weight.file
        assert len(weight.sha256) == 64
