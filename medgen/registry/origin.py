"""The origin of a version: a commit that contains, by content, the files that its parts were made from.

The commit may be older than the version, or have been made after it: train first, look at the result, commit then.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medgen.console import note
from medgen.registry.versions import Version
from medgen.tracking.lineage import SECTIONS, find_changes, find_commit, hash_files

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FILES_TAG = "files"  # hashes of what all parts of the version were made from, as JSON


def origin_tags(root: Path, stages: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The tags of a version's origin, from the lineage of each of its parts and of its metrics.

    git.commit is a commit that contains the files of all parts, and git.dirty "false". Without one it is the commit of
    the last stage, and git.dirty "true"; "unknown" if the origin of a part is unknown.
    """
    commits = [stage.get("git.commit", "unknown") for stage in stages]
    states = {stage.get("git.dirty", "unknown") for stage in stages}
    tags = {"git.commit": "unknown" if "unknown" in commits else commits[-1]}
    tags["git.dirty"] = next((state for state in ("true", "unknown") if state in states), "false")
    recorded = [stage.get(FILES_TAG, "unknown") for stage in stages]
    if "unknown" in recorded:  # recorded by an older medgen, or made elsewhere
        return tags | {FILES_TAG: "unknown"}
    files = {key: digest for text in recorded for key, digest in json.loads(text).items()}
    tags[FILES_TAG] = json.dumps(files, sort_keys=True)
    if (commit := find_commit(root, files, commits[::-1])) is not None:
        return tags | {"git.commit": commit, "git.dirty": "false"}
    return tags if tags["git.dirty"] == "unknown" else tags | {"git.dirty": "true"}


def is_known(tags: Mapping[str, str]) -> bool:
    """Return True if the origin is good: a commit contains the files, and the hash of the data is known."""
    known = all(tags.get(key, "unknown") not in ("", "unknown") for key in ("git.commit", "data.md5"))
    return known and tags.get("git.dirty") == "false"


def accept_commit(client: "MlflowClient", root: Path, version: Version) -> Version:
    """The version, with a commit of this repository as its origin if it has none and the commit contains its files."""
    files = _files(version)
    if version.tags.get("git.dirty") == "false" or not files:
        return version
    commit = find_commit(root, files, [version.tags.get("git.commit", "unknown")])
    if commit is None:
        return version
    # git.dirty last: after a crash in between, the same command continues
    for key, value in (origin := {"git.commit": commit, "git.dirty": "false"}).items():
        client.set_model_version_tag(version.name, str(version.number), key, value)
    note(f"Commit {commit[:12]} contains the files that {version.uri} was made from: it is now the version's origin")
    return replace(version, tags={**version.tags, **origin})


def made_with_other_code(root: Path, version: Version) -> bool:
    """Return True if the version was made with other code than the medgen that runs now."""
    code = {key: digest for key, digest in _files(version).items() if key.startswith("medgen:")}
    return bool(find_changes(root, None, code))


def how_to_commit(root: Path, version: Version) -> str:
    """The commands that give a version an origin, and the reason why it has none."""
    files = _files(version)
    changed = find_changes(root, None, files)
    has_data = version.tags.get("data.md5", "unknown") not in ("", "unknown")
    if files and not changed and has_data:
        add = shlex.join(["git", "add", *_file_names(find_changes(root, "HEAD", files))])
        return (
            "The files that it was made from are in no commit. Commit them, and promote again: "
            f'`{add} && git commit -m "Train version {version.number}" && medgen promote --version {version.number}`'
        )
    if not has_data:
        reason = "DVC did not track its data: run `dvc add DATA && git add DATA.dvc`, where DATA is its folder"
    elif changed:
        reason = f"Since it was made, these have changed: {', '.join(changed)}"
    else:
        reason = (
            "The files that it was made from are unknown: an older medgen or another machine made it or a part of it"
        )
    uncommitted = _file_names(find_changes(root, "HEAD", hash_files(root, SECTIONS)))
    commit = [f'{shlex.join(["git", "add", *uncommitted])} && git commit -m "Train again"'] if uncommitted else []
    commands = " && ".join([*commit, "dvc repro --force", "medgen promote"])
    return f"{reason}. {'Commit, then run again' if commit else 'Run again'}: `{commands}`"


def _file_names(keys: Sequence[str]) -> list[str]:
    """The files of keys such as params.yaml:train."""
    return sorted({key.partition(":")[0] for key in keys})


def _files(version: Version) -> dict[str, str]:
    """The hashes of the version's files; {} if they are unknown."""
    try:
        found: dict[str, str] = dict(json.loads(version.tags.get(FILES_TAG, "{}")))
    except (ValueError, TypeError):  # anyone may edit a tag
        return {}
    return found
