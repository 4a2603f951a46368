"""From a version back to what made it: `medgen history --reproduce VERSION` says how, `--run` rebuilds it.

Rebuilt is in a work tree of its own, by the code, parameters and data that the version names, all stages anew.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from medgen import config
from medgen.config import Params, Project, Registry, Tracking
from medgen.errors import Refused, UserError
from medgen.metrics.segmentation import with_foreground
from medgen.priors.generator import content_hash
from medgen.registry.gates import DICE, MMD, SSIM
from medgen.registry.model_package import CONTENT_TAG, PARAMS, making
from medgen.registry.versions import JUDGED_ON, Version, answering, find, load
from medgen.tracking.mlflow_sync import connect, store_uri, without_password

MMD_ENDS = "generation/mmd_domain_ci_low", "generation/mmd_domain_ci_high"
TOLERANCE = 0.01  # of SSIM and Dice: what rounding on another machine makes of the same training
REPRO = ("repro", "--force", "--no-run-cache")  # all stages anew: what DVC has from before proves nothing


def reproduce(
    project: Project, *, tracking: Tracking, registry: Registry, version: int, run: bool = False
) -> dict[str, float]:
    """Prints the commands that rebuild a version; with `run` rebuilds it in a scratch work tree and compares.

    Returns:
        The metrics of what was rebuilt; nothing without `run`.

    Raises:
        UserError: the version does not say what made it, this repository does not have it, or a stage failed.
        Refused: what was rebuilt is not as good as the version says.
    """
    with answering(project, tracking, "start the server first"):
        client, _ = connect(project, tracking)
        found = find(client, registry.model_name, version)
    commit = _commit(project, found)
    folder = _git(
        project.root, "rev-parse", "--show-prefix"
    )  # of the project in its repository, with a slash behind it
    there = _git(project.root, "ls-tree", "--name-only", commit).splitlines()  # of this folder, relative to it
    data = next((name for name in ("data.dvc", *sorted(there)) if name.endswith(".dvc") and name in there), None)
    kept = load(found.uri, project, tracking) / PARAMS  # versions of an older medgen have none
    params = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
    if params is not None and "params.yaml" in there and _makes_the_same(params, project.root, commit):
        params = None  # the commit has them
    _check_data(project, found, commit, data)
    if not run:
        _print_commands(project, tracking, found, commit, folder, data, params)
        return {}
    if found.tags.get("git.dirty") != "false":
        raise UserError(
            f"{found.uri}: was trained with changes that commit {commit[:12]} does not hold, so it cannot be rebuilt; "
            "`medgen history --reproduce` without --run prints how to come near"
        )
    scratch = Path(tempfile.mkdtemp(prefix="medgen-rebuild-"))
    tree = scratch / "tree"
    _git(project.root, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        rebuilt = _rebuild(Project(tree / folder), project, data, params)
        metrics = with_foreground(json.loads((rebuilt.reports / "metrics.json").read_text(encoding="utf-8")))
        same = content_hash(rebuilt.model, rebuilt.prior, rebuilt.refiner) == found.tags.get(CONTENT_TAG)
    except UserError as error:
        raise UserError(
            f"{error}. Its work tree is left for a look; `git worktree remove --force {shlex.quote(str(tree))}` "
            "removes it"
        ) from None
    except BaseException:  # Ctrl-C
        _remove(project, tree)
        raise
    _remove(project, tree)
    _compare(found, metrics, same)
    return dict(metrics)


def _remove(project: Project, tree: Path) -> None:
    _git(project.root, "worktree", "remove", "--force", str(tree))
    tree.parent.rmdir()


def _commit(project: Project, version: Version) -> str:
    commit = version.tags.get("git.commit") or "unknown"
    _git(project.root, "rev-parse", "--show-toplevel")  # says so where there is no git, or no repository
    if commit == "unknown":
        raise UserError(f"{version.uri}: does not say from which commit it was made: it was trained outside of git")
    try:
        _git(project.root, "cat-file", "-e", f"{commit}^{{commit}}")
    except UserError:
        raise UserError(
            f"{version.uri}: made from commit {commit}, which this repository does not have; run `git fetch --all` "
            "(a shallow clone: `git fetch --unshallow`), or go to the repository it was trained in"
        ) from None
    return commit


def _check_data(project: Project, version: Version, commit: str, data: str | None) -> None:
    """Refuses a commit that does not name the data the version was trained on: that was not in DVC's care then."""
    wanted = version.tags.get("data.md5") or "unknown"
    if data is None or wanted == "unknown":
        return
    committed = YAML(typ="safe", pure=True).load(_git(project.root, "show", f"{commit}:./{data}"))
    if (found := committed["outs"][0].get("md5")) != wanted:
        raise UserError(
            f"{version.uri}: trained on data of md5 {wanted}, and {data} of its commit {commit[:12]} has {found}: it "
            "cannot be made again from there"
        )


def _makes_the_same(params: dict[str, Any], root: Path, commit: str) -> bool:
    """Whether the commit's params.yaml has the parameters that a version was made with."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "params.yaml"
        path.write_text(_git(root, "show", f"{commit}:./params.yaml") + "\n", encoding="utf-8")
        try:
            return making(config.load(path)) == making(Params.model_validate(params))
        except (UserError, ValidationError):  # of a medgen that knew other keys
            return False


def _print_commands(
    project: Project,
    tracking: Tracking,
    version: Version,
    commit: str,
    folder: str,
    data: str | None,
    params: dict[str, Any] | None,
) -> None:
    above = "../" * (1 + len(Path(folder).parts))  # beside the repository, not in it
    tree = f"{above}{version.name}-{version.number}"
    lines = [
        f"git worktree add --detach {shlex.quote(tree)} {commit}",
        f"cd {shlex.quote(os.path.join(tree, folder).rstrip('/'))}",
    ]
    if data:
        lines += [
            f"dvc config --local cache.dir {shlex.quote(str(_cache(project)))}",
            f"dvc checkout {data} || dvc pull {data}    # data md5 {version.tags.get('data.md5', 'unknown')}",
        ]
    if params is not None:
        lines += [
            "# its parameters are not those of params.yaml there",
            f"export MLFLOW_TRACKING_URI={shlex.quote(without_password(store_uri(project, tracking)))}",
            f"mlflow artifacts download --artifact-uri {version.uri}/artifacts/{PARAMS} --dst-path .",
            f"mv {PARAMS} params.yaml",
        ]
    lines += [
        "# with tracking.enabled: false in params.yaml nothing of it is recorded or registered",
        f"dvc {' '.join(REPRO)}",
    ]
    notes = [f"# {version.uri}"]
    if version.tags.get("git.dirty") != "false":
        notes.append("# trained with changes that are not in this commit: what comes out may differ")
    if (torch := version.tags.get("version.torch")) is not None:
        notes.append(f"# trained with torch {torch} on {version.tags.get('device', 'unknown')}")
    print("\n".join(notes + lines))


def _rebuild(there: Project, project: Project, data: str | None, params: dict[str, Any] | None) -> Project:
    """Runs all stages in the work tree; nothing of it is recorded or registered, or kept by DVC."""
    if data:
        _share_dvc(there, project)
        try:
            _dvc(there, "checkout", data)
        except UserError:
            _dvc(there, "pull", data)
    path = there.root / "params.yaml"
    plain = params or YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    plain["tracking"] = {**(plain.get("tracking") or {}), "enabled": False}
    path.write_text(json.dumps(plain, indent=2), encoding="utf-8")
    _dvc(there, *REPRO, "--no-commit")
    return there


def _share_dvc(there: Project, project: Project) -> None:
    """Gives the work tree this project's cache, its own settings, and remotes whose address is relative to it."""
    own = project.root / ".dvc" / "config.local"
    if own.is_file():
        shutil.copy(own, there.root / ".dvc" / "config.local")
    for line in _command(project.root, sys.executable, "-m", "dvc", "remote", "list").splitlines():
        name, address = line.split(maxsplit=1)
        place = project.root / address.removesuffix("(default)").strip()
        if place.is_dir():
            _dvc(there, "remote", "modify", "--local", name, "url", str(place.resolve()))
    _dvc(there, "config", "--local", "cache.dir", str(_cache(project)))


def _cache(project: Project) -> Path:
    """Where DVC keeps this project's files: a work tree has its own .dvc, which is empty."""
    return Path(_command(project.root, sys.executable, "-m", "dvc", "cache", "dir").strip())


def _compare(version: Version, metrics: Mapping[str, float], same: bool) -> None:
    """Prints registered beside rebuilt.

    Raises:
        Refused: they differ by more than the machine accounts for.
    """
    dataset = version.tags.get("dataset.fingerprint")
    both = sorted(version.metrics.keys() & metrics.keys())
    if (judged_on := version.tags.get(JUDGED_ON)) not in (None, dataset):
        print(f"Its metrics are of another dataset, {judged_on}, so only its files are compared.")
        both = []
    different = [key for key in both if version.metrics[key] != metrics[key]]
    table = Table(title=f"{version.uri}, registered and rebuilt", title_justify="left")
    for heading in ("metric", "registered", "rebuilt"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for key in different or [key for key in (SSIM, MMD, DICE) if key in both]:
        table.add_row(key, f"{version.metrics[key]:.6g}", f"{metrics[key]:.6g}")
    Console(highlight=False).print(table)
    if same:
        print(
            "The same model, prior and refiner, byte for byte; "
            f"{len(both) - len(different)} of {len(both)} metrics are equal."
        )
        return
    far = [key for key in (SSIM, DICE) if key in both and abs(version.metrics[key] - metrics[key]) > TOLERANCE]
    low, high = (version.metrics.get(end, version.metrics.get(MMD, 0.0)) for end in MMD_ENDS)
    if MMD in both and not low <= metrics[MMD] <= high:
        far.append(MMD)
    if far or not both:
        raise Refused(
            f"{version.uri}: what was rebuilt is another model: {', '.join(far) or 'no metric in common'}. Compare the "
            "versions of torch and the device among its tags"
        )
    print(
        f"As good: other bytes, as another machine or thread count makes; {len(different)} of {len(both)} metrics "
        "differ, none by more than chance."
    )


def _git(root: Path, *arguments: str) -> str:
    return _command(root, "git", *arguments).strip()


def _command(root: Path, *command: str) -> str:
    """What a command prints.

    Raises:
        UserError: it failed; with what it said.
    """
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found on this machine; install it first") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"`{shlex.join(command)}` failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def _dvc(there: Project, *arguments: str) -> None:
    """A DVC command that the user watches; its stages run with this very Python."""
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=there.root, env=environment, check=False)
    if done.returncode:
        raise UserError(f"`dvc {' '.join(arguments)}` ended with exit code {done.returncode}, for the reason above")
