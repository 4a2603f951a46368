"""Signed versions and promotions: with trusted keys in the project, nothing without a valid signature is used."""

import subprocess
from pathlib import Path

import pytest

from medgen.config import Project
from medgen.errors import UserError
from medgen.registry.signatures import is_trusted, sign


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Private key file and public key of two people, made as the documentation says."""
    made = {}
    for name in ("alice", "mallory"):
        path = tmp_path / f"{name}.pem"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True)
        public = subprocess.run(["openssl", "pkey", "-in", path, "-pubout"], check=True, capture_output=True, text=True)
        made[name] = path, public.stdout.splitlines()[1]
    return made


def test_only_signatures_by_trusted_keys_count(tmp_path, keys, monkeypatch):
    project = Project(tmp_path)
    assert sign("text") == "" and is_trusted(project, "text", "")  # no keys: nothing is signed or required
    signatures = {}
    for name, (path, _) in keys.items():
        monkeypatch.setenv("MEDGEN_SIGNING_KEY", str(path))
        signatures[name] = sign("text")
    (tmp_path / "trusted_keys.txt").write_text(f"# the board\n{keys['alice'][1]}  Alice\n")
    assert is_trusted(project, "text", signatures["alice"])
    for content, signature in (("text", signatures["mallory"]), ("other", signatures["alice"]), ("text", "")):
        assert not is_trusted(project, content, signature)


def test_errors_name_the_key(tmp_path, keys, monkeypatch):
    monkeypatch.setenv("MEDGEN_SIGNING_KEY", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match=r"MEDGEN_SIGNING_KEY: .*none\.pem: not readable .*openssl genpkey"):
        sign("text")
    (tmp_path / "trusted_keys.txt").write_text(f"{keys['alice'][1]}\nAAAA\n")
    with pytest.raises(UserError, match=r"trusted_keys\.txt, line 2: not an Ed25519 public key"):
        is_trusted(Project(tmp_path), "text", "")
