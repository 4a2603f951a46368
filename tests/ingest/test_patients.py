"""Pseudonyms of patients, and the salt that keeps them from being guessed."""

import hashlib
from pathlib import Path

import pytest

from medgen.errors import UserError
from medgen.ingest.patients import has_salt, pseudonym, salt_of, write_salt


def slow_hmac(key: bytes, message: bytes) -> str:
    """RFC 2104, written out."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()


def test_pseudonyms_are_salted_hashes() -> None:
    assert pseudonym(b"salt", "person17") == slow_hmac(b"salt", b"person17")[:16]
    assert pseudonym(b"salt", "Müller^Ä") == slow_hmac(b"salt", "Müller^Ä".encode())[:16]
    assert pseudonym(b"salt", "person17") != pseudonym(b"other", "person17")
    assert len({pseudonym(b"salt", f"person{i}") for i in range(1000)}) == 1000


def test_any_identifier_has_a_pseudonym() -> None:
    assert len({pseudonym(b"salt", text) for text in ("", "\0", "\udcff", "x" * 100_000)}) == 4


def test_a_dataset_without_a_salt_has_the_fixed_one(tmp_path: Path) -> None:
    assert not has_salt(tmp_path)
    assert salt_of(tmp_path) == salt_of(tmp_path / "elsewhere")


def test_a_written_salt_is_kept_and_each_dataset_has_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_salt(tmp_path / "a")
    write_salt(tmp_path / "b")
    first = salt_of(tmp_path / "a")
    write_salt(tmp_path / "a")
    assert has_salt(tmp_path / "a")
    assert salt_of(tmp_path / "a") == first
    assert len({first, salt_of(tmp_path / "b"), salt_of(tmp_path)}) == 3
    assert len(first) == 32
    assert [file.name for file in (tmp_path / "a").iterdir()] == [".salt"]


@pytest.mark.parametrize("content", [b"", b"abc", b"g" * 64, b"0" * 63, b"0" * 1_000_000, b"\xff" * 64])
def test_a_salt_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".salt").write_bytes(content)
    with pytest.raises(UserError, match=r"\.salt: not a salt; expected 64 hexadecimal digits"):
        salt_of(tmp_path)
