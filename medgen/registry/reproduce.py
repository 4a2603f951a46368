"""Rebuild a registered version: `medgen history --reproduce VERSION` prints the commands, `--run` executes them.

With `--run` all stages run again in a git worktree of their own, with the code, parameters and data of the version.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medgen.config import Params, Project, Registry, Tracking, without_credentials
from medgen.console import show, warn
from medgen.errors import Refused, UserError, printable
from medgen.metrics.segmentation import update_old_keys
from medgen.priors.generator import content_hash
from medgen.registry.gates import DICE, MMD, SSIM
from medgen.registry.model_package import PARAMS_FILE, result_sections
from medgen.registry.origin import accept_commit, made_with_other_code
from medgen.registry.versions import CONTENT_TAG, EVALUATED_ON, Version, download_version, find_version, mlflow_client
from medgen.tracking.mlflow_sync import store_uri
from medgen.training.initial_weights import FETCHED, PIN, REGISTERED

MMD_INTERVAL = "generation/mmd_domain_ci_low", "generation/mmd_domain_ci_high"
TOLERANCE = 0.01  # of SSIM and Dice: rounding on another machine changes the same training by less
REPRO = ("repro", "--force", "--no-run-cache")  # runs all stages: results in DVC's cache would prove nothing


def reproduce(
    project: Project, *, tracking: Tracking, registry: Registry, version: int, run: bool = False
) -> dict[str, float]:
    """Print the commands that rebuild a version; with `run` rebuild it in a git worktree and compare the two.

    Returns:
        The metrics of the rebuilt model; empty without `run`.

    Raises:
        UserError: the version has no commit, this repository does not have the commit, or a stage failed.
        Refused: the rebuilt model differs from the version by more than rounding.
    """
    with mlflow_client(project, tracking, "start the server first") as (client, _):
        found = accept_commit(client, project.root, find_version(client, registry.model_name, version))
    commit = _commit(project, found)
    folder = _git(project.root, "rev-parse", "--show-prefix")  # the project's folder in its repository, such as "a/b/"
    files = _git(project.root, "ls-tree", "--name-only", commit).splitlines()  # in this folder
    data = next((name for name in ("data.dvc", *sorted(files)) if name.endswith(".dvc") and name in files), None)
    params_file = download_version(found.uri, project, tracking) / PARAMS_FILE  # versions of an older medgen have none
    params = json.loads(params_file.read_text(encoding="utf-8")) if params_file.exists() else None
    weights = _initial_weights(params)
    if params is not None and "params.yaml" in files and _are_committed(params, project.root, commit):
        params = None
    _check_data(project, found, commit, data)
    if "medgen" not in files and made_with_other_code(project.root, found):
        medgen = f"medgen {found.tags.get('version.medgen', 'unknown')}"
        warn(f"{found.uri} was made with {medgen}, whose code differs from the medgen that is installed here")
    if not run:
        _print_commands(project, tracking, found, commit, folder, data, params, weights)
        return {}
    if found.tags.get("git.dirty") != "false":
        raise UserError(
            f"{found.uri}: it was trained with uncommitted changes, so commit {commit[:12]} cannot rebuild it; run "
            "`medgen history --reproduce` without --run to print commands that come close"
        )
    metrics, is_identical = _rebuild_in_worktree(project, tracking, found, commit, folder, data, params)
    _compare(found, metrics, is_identical)
    return dict(metrics)


def _rebuild_in_worktree(
    project: Project,
    tracking: Tracking,
    version: Version,
    commit: str,
    folder: str,
    data: str | None,
    params: dict[str, Any] | None,
) -> tuple[Mapping[str, float], bool]:
    """Metrics of the rebuilt model, and whether its files equal the version's; removes the worktree on success."""
    tree = Path(tempfile.mkdtemp(prefix="medgen-rebuild-")) / "tree"
    _git(project.root, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        rebuilt = Project(tree / folder)
        _run_stages(rebuilt, project, tracking, data, params)
        metrics = update_old_keys(json.loads((rebuilt.reports / "metrics.json").read_text(encoding="utf-8")))
        content = content_hash(rebuilt.model, rebuilt.prior, rebuilt.refiner)
    except UserError as error:
        raise UserError(
            f"{error}. Its worktree is kept so that you can inspect it; run "
            f"`git worktree remove --force {shlex.quote(str(tree))}` to remove it"
        ) from None
    except BaseException:  # Ctrl-C
        _remove(project, tree)
        raise
    _remove(project, tree)
    return metrics, content == version.tags.get(CONTENT_TAG)


def _remove(project: Project, tree: Path) -> None:
    _git(project.root, "worktree", "remove", "--force", str(tree))
    tree.parent.rmdir()


def _commit(project: Project, version: Version) -> str:
    commit = version.tags.get("git.commit") or "unknown"
    _git(project.root, "rev-parse", "--show-toplevel")  # raises if git is not installed or this is no repository
    if commit == "unknown":
        raise UserError(f"{version.uri}: its commit is unknown, because it was trained outside a git repository")
    if not re.fullmatch("[0-9a-f]{40,64}", commit):
        raise UserError(
            f"{version.uri}: its tag git.commit is {commit[:80]!r}, so it was changed; expected 40 hexadecimal digits. "
            "Set it to the commit of the training"
        )
    try:
        _git(project.root, "cat-file", "-e", f"{commit}^{{commit}}")
    except UserError:
        raise UserError(
            f"{version.uri}: this repository does not have its commit {commit}; run `git fetch --all` (in a shallow "
            "clone `git fetch --unshallow`), or use the repository in which it was trained"
        ) from None
    return commit


def _check_data(project: Project, version: Version, commit: str, data: str | None) -> None:
    """Raise an error if the commit names other data than the version was trained on, which DVC did not track then."""
    expected = version.tags.get("data.md5") or "unknown"
    if data is None or expected == "unknown":
        return
    committed = YAML(typ="safe", pure=True).load(_git(project.root, "show", f"{commit}:./{data}"))
    if (found := committed["outs"][0].get("md5")) != expected:
        raise UserError(
            f"{version.uri}: it was trained on data with md5 {expected}, but {data} in its commit {commit[:12]} has "
            f"{found}, so it cannot be rebuilt from this commit"
        )


def _are_committed(params: dict[str, Any], root: Path, commit: str) -> bool:
    """Return True if the commit's params.yaml gives the same result as these parameters."""
    try:
        committed = YAML(typ="safe", pure=True).load(_git(root, "show", f"{commit}:./params.yaml"))
        return result_sections(Params.model_validate(committed)) == result_sections(Params.model_validate(params))
    except (YAMLError, ValidationError):  # of a medgen with other keys
        return False


def _print_commands(
    project: Project,
    tracking: Tracking,
    version: Version,
    commit: str,
    folder: str,
    data: str | None,
    params: dict[str, Any] | None,
    weights: str,
) -> None:
    parent = "../" * (1 + len(Path(folder).parts))  # of the repository
    tree = f"{parent}{version.name}-{version.number}"
    lines = [f"# {version.uri}"]
    if version.tags.get("git.dirty") != "false":
        lines.append("# trained with changes that are not in this commit: the result may differ")
    if (torch := version.tags.get("version.torch")) is not None:
        lines.append(f"# trained with torch {torch} on {version.tags.get('device', 'unknown')}")
    lines = [printable(" ".join(line.split())) for line in lines]  # anyone may edit a tag: it must not end the comment
    lines += [
        f"git worktree add --detach {shlex.quote(tree)} {commit}",
        f"cd {shlex.quote(os.path.join(tree, folder).rstrip('/'))}",
    ]
    if data:
        lines += [
            f"dvc config --local cache.dir {shlex.quote(str(_dvc_cache(project)))}",
            f"dvc checkout {shlex.quote(data)} || dvc pull {shlex.quote(data)}",
        ]
    if weights and not weights.startswith((REGISTERED, FETCHED)):
        lines.append(f"# its training started from {printable(weights)}: copy that folder here if the commit lacks it")
    if params is not None or weights.startswith(REGISTERED):
        lines.append(f"export MLFLOW_TRACKING_URI={shlex.quote(without_credentials(store_uri(project, tracking)))}")
    if params is not None:
        source = shlex.quote(f"{version.uri}/artifacts/{PARAMS_FILE}")
        lines += [
            "# its parameters differ from params.yaml in this commit",
            f"mlflow artifacts download --artifact-uri {source} --dst-path .",
            f"mv {PARAMS_FILE} params.yaml",
        ]
    lines += [
        "# set tracking.enabled: false in params.yaml to record and register nothing",
        f"dvc {' '.join(REPRO)}",
    ]
    print("\n".join(lines))


def _run_stages(
    tree: Project, project: Project, tracking: Tracking, data: str | None, params: dict[str, Any] | None
) -> None:
    """Run all stages in the worktree without recording or registering; DVC caches no result.

    Initial weights come from this project's registry or from its folder.
    """
    if data:
        _share_dvc(tree, project)
        try:
            _dvc(tree, "checkout", data)
        except UserError:
            _dvc(tree, "pull", data)
    path = tree.root / "params.yaml"
    values = params or YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    values["tracking"] = {"enabled": False}
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    source = _initial_weights(values)
    if source and not source.startswith((REGISTERED, FETCHED)) and not (tree.root / source).exists():
        if not (project.root / source).is_dir():
            raise UserError(f"train.init_from: {project.root / source}: not found; restore the folder")
        shutil.copytree(project.root / source, tree.root / source)
    _dvc(tree, *REPRO, "--no-commit", MLFLOW_TRACKING_URI=store_uri(project, tracking))


def _initial_weights(params: Mapping[str, Any] | None) -> str:
    """train.init_from without its hash; "" without one."""
    train = (params or {}).get("train") or {}
    return str(train.get("init_from") or "").partition(PIN)[0]


def _share_dvc(tree: Project, project: Project) -> None:
    """Give the worktree this project's DVC cache, local settings, and remotes with an address relative to it."""
    settings = project.root / ".dvc" / "config.local"
    if settings.is_file():
        shutil.copy(settings, tree.root / ".dvc" / "config.local")
    for line in _command(project.root, sys.executable, "-m", "dvc", "remote", "list").splitlines():
        name, address = line.split(maxsplit=1)
        path = project.root / address.removesuffix("(default)").strip()
        if path.is_dir():
            _dvc(tree, "remote", "modify", "--local", name, "url", str(path.resolve()))
    _dvc(tree, "config", "--local", "cache.dir", str(_dvc_cache(project)))


def _dvc_cache(project: Project) -> Path:
    """This project's DVC cache; the one of a new worktree is empty."""
    return Path(_command(project.root, sys.executable, "-m", "dvc", "cache", "dir").strip())


def _compare(version: Version, metrics: Mapping[str, float], is_identical: bool) -> None:
    """Print the metrics of the version and of the rebuilt model.

    Raises:
        Refused: they differ by more than rounding on another machine explains.
    """
    dataset = version.tags.get("dataset.fingerprint")
    common = sorted(version.metrics.keys() & metrics.keys())
    if (evaluated_on := version.tags.get(EVALUATED_ON)) not in (None, dataset):
        print(f"Its metrics were measured on another dataset, {evaluated_on}, so only its files are compared.")
        common = []
    different = [key for key in common if version.metrics[key] != metrics[key]]
    table = Table(title=f"{version.uri}, registered and rebuilt", title_justify="left")
    for heading in ("metric", "registered", "rebuilt"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for key in different or [key for key in (SSIM, MMD, DICE) if key in common]:
        table.add_row(key, f"{version.metrics[key]:.6g}", f"{metrics[key]:.6g}")
    show(table)
    if is_identical:
        print(
            "The same model, prior and refiner, byte for byte; "
            f"{len(common) - len(different)} of {len(common)} metrics are equal."
        )
        return
    failed = [key for key in (SSIM, DICE) if key in common and abs(version.metrics[key] - metrics[key]) > TOLERANCE]
    low, high = (version.metrics.get(end, version.metrics.get(MMD, 0.0)) for end in MMD_INTERVAL)
    if MMD in common and not low <= metrics[MMD] <= high:
        failed.append(MMD)
    if failed or not common:
        raise Refused(
            f"{version.uri}: the rebuilt model is another one: {', '.join(failed) or 'no metric in common'}. "
            "Compare the torch version and the device in the version's tags with this machine"
        )
    print(
        "An equivalent model: its bytes differ, as on another machine or with another number of threads; "
        f"{len(different)} of {len(common)} metrics differ, all within their tolerance."
    )


def _git(root: Path, *arguments: str) -> str:
    return _command(root, "git", *arguments).strip()


def _command(root: Path, *command: str) -> str:
    """The output of a command.

    Raises:
        UserError: the command is not installed or failed; with the last line of its error output.
    """
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found on this machine; install it first") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"`{shlex.join(command)}` failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def _dvc(tree: Project, *arguments: str, **variables: str) -> None:
    """Run a DVC command with its output on the terminal; its stages run with this Python interpreter."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path} | variables
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tree.root, env=environment, check=False)
    if done.returncode:
        raise UserError(f"`dvc {' '.join(arguments)}` ended with exit code {done.returncode}; see its output above")
