"""Everything that is installed is named by its hash, where one can be known."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

DIGEST = "sha256:" + "0123456789abcdef" * 4


def test_packages_that_build_others_have_hashes(root: Path) -> None:
    text = (root / "build-requirements.txt").read_text()
    entries = re.sub(r"\\\n", " ", text).splitlines()[1:]
    versions = {}
    for entry in entries:
        name, version = re.fullmatch(
            r"([\w-]+)==(\S+)( ; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+", entry.strip()
        ).groups()[:2]
        versions[name] = version
    assert {"uv", "hatchling", "setuptools"} <= versions.keys()
    project = tomllib.loads((root / "pyproject.toml").read_text())
    for needed in map(Requirement, project["build-system"]["requires"]):
        assert versions[needed.name] in needed.specifier


def test_nothing_is_installed_without_a_hash_or_from_two_indexes(root: Path) -> None:
    for name in ("Dockerfile", "Makefile"):
        text = (root / name).read_text()
        assert not re.search("curl|wget|unsafe-|--extra-index", text)
        for command in re.findall(r"pip install(?:[^\n\\&]|\\\n)*", text):
            is_own = re.search("--no-deps( --editable)? [.]$", command.strip())
            assert is_own or "--require-hashes" in command or "--default-index" in command, command
        assert text.count("TORCH_INDEX") >= 2 and len(re.findall("--default-index", text)) == 1


def test_the_lock_names_one_index(root: Path) -> None:
    lock = tomllib.loads((root / "uv.lock").read_text())
    packages = [package for package in lock["package"] if package["source"].keys() != {"editable"}]
    assert {package["source"]["registry"] for package in packages} == {"https://pypi.org/simple"}
    for package in packages:
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
        assert files and all(file["hash"].startswith("sha256:") for file in files), package["name"]


def test_every_service_drops_its_privileges(compose: Callable[[Mapping[str, str]], dict[str, Any]]) -> None:
    services = compose({"POSTGRES_PASSWORD": "x"})["services"]
    assert services["postgres"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_pin_images_writes_digests(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Makefile", "Dockerfile", "compose.yaml"):
        shutil.copy(root / name, tmp_path)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f"#!/bin/sh\necho {DIGEST}\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:/usr/bin:/bin")
    for _ in range(2):  # a second run replaces the digests
        subprocess.run(["make", "pin-images"], cwd=tmp_path, check=True, capture_output=True)
    assert f"ARG BASE=python:3.12-slim-bookworm@{DIGEST}\n" in (tmp_path / "Dockerfile").read_text()
    assert f"image: postgres:17@{DIGEST}\n" in (tmp_path / "compose.yaml").read_text()
    docker.write_text("#!/bin/sh\nexit 1\n")
    failed = subprocess.run(["make", "pin-images"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and "no digest; expected docker" in failed.stdout


def test_the_former_store_is_ignored_by_git(root: Path, tmp_path: Path) -> None:
    """docs/operations.md moves it aside; an unknown file would close the gate on versions of uncommitted code."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for source in (root / ".gitignore", root / "medgen" / "projects" / "templates" / "gitignore"):
        shutil.copy(source, tmp_path / ".gitignore")
        names = ["mlflow.db.before", "mlartifacts.before/1/a"]
        found = subprocess.run(
            ["git", "check-ignore", *names], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert found.stdout.split() == names
