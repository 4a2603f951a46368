"""Pseudonyms of patients, and the salt that protects them."""

import hashlib
from pathlib import Path

import pytest

from medgen.errors import UserError
from medgen.ingest.patients import find_salt, has_salt, pseudonymize, write_salt


def reference_hmac(key: bytes, message: bytes) -> str:
    """HMAC-SHA256 by the formula of RFC 2104."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()


def test_pseudonyms_are_salted_hashes() -> None:
    assert pseudonymize(b"salt", "person17") == reference_hmac(b"salt", b"person17")[:16]
    assert pseudonymize(b"salt", "Müller^Ä") == reference_hmac(b"salt", "Müller^Ä".encode())[:16]
    assert pseudonymize(b"salt", "person17") != pseudonymize(b"other", "person17")
    assert len({pseudonymize(b"salt", f"person{i}") for i in range(1000)}) == 1000


def test_any_text_has_a_pseudonym() -> None:
    assert len({pseudonymize(b"salt", text) for text in ("", "\0", "\udcff", "x" * 100_000)}) == 4


def test_only_file_names_go_without_a_salt(tmp_path: Path) -> None:
    """The store lists file names anyway, and their pseudonyms decide splits that are the same on every machine."""
    assert not has_salt(tmp_path)
    assert find_salt(tmp_path, False) == find_salt(tmp_path / "elsewhere", False)
    assert len({find_salt(tmp_path, True) for _ in range(3)} | {find_salt(tmp_path, False)}) == 4


def test_each_dataset_gets_a_different_salt_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_salt(tmp_path / "a")
    write_salt(tmp_path / "b")
    first = find_salt(tmp_path / "a", True)
    write_salt(tmp_path / "a")
    assert has_salt(tmp_path / "a")
    assert find_salt(tmp_path / "a", True) == first
    assert len({first, find_salt(tmp_path / "b", True), find_salt(tmp_path, False)}) == 3
    assert len(first) == 32
    assert [file.name for file in (tmp_path / "a").iterdir()] == [".salt"]


@pytest.mark.parametrize("content", [b"", b"abc", b"g" * 64, b"0" * 63, b"0" * 1_000_000, b"\xff" * 64])
def test_an_invalid_salt_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".salt").write_bytes(content)
    with pytest.raises(UserError, match=r"\.salt: not a salt; expected 64 hexadecimal digits"):
        find_salt(tmp_path, True)


def test_a_salt_that_cannot_be_read_or_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / ".salt").mkdir()  # cannot be opened, by root neither
    with pytest.raises(UserError, match=r"\.salt: cannot be read \(Is a directory\); make the file readable"):
        find_salt(tmp_path, True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"\.salt: cannot be written .*Make the folder writable for the first run"):
        write_salt(tmp_path / "file")
