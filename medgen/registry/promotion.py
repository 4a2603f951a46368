"""Champion of a registered model: `medgen promote`, `rollback` and `history`.

The alias `candidate` is the version that was registered last, `champion` the version in use and `previous` the former
champion. The ledger records every change of the champion with its reason.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from medgen.config import Project, Registry, Tracking
from medgen.console import say, show, warn
from medgen.errors import Refused, UserError, printable
from medgen.metrics.comparison import Comparison
from medgen.registry import ledger
from medgen.registry.evaluations import compare_versions, download_evaluation
from medgen.registry.gates import (
    COPIES,
    DATASET_NAME,
    DICE,
    HASH_LENGTH,
    MMD,
    NO_VALUE,
    SSIM,
    Gate,
    are_comparable,
    check_gates,
    of_different_datasets,
)
from medgen.registry.ledger import LEDGER, MAX_WHY, Entry
from medgen.registry.measurements import measurements, replaced_metrics
from medgen.registry.mlflow_ui import describe_model
from medgen.registry.origin import accept_commit, how_to_commit
from medgen.registry.versions import (
    CANDIDATE,
    CHAMPION,
    EVALUATED_ON,
    EVALUATION_DIGEST,
    PREVIOUS,
    Version,
    all_versions,
    find_version,
    get_aliases,
    list_registered,
    mlflow_client,
)
from medgen.tracking.mlflow_descriptions import escape, hash_tags, is_replaceable

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

NUM_DESCRIBED = 10  # last changes in the registered model's description
MAIN_METRICS = {SSIM: "ssim", MMD: "mmd", COPIES: "copies", DICE: "dice"}  # metric -> heading
UNCHANGED = "nothing was changed: start the server first"


def promote(
    project: Project, *, tracking: Tracking, registry: Registry, version: int | None = None, force: str | None = None
) -> Entry | None:
    """Make a version the champion if it passes all gates of `registry.gates`.

    Args:
        version: number of the version; None is the candidate.
        force: the reason to promote although gates fail.

    Returns:
        The new entry of the ledger; None if the version is champion already.

    Raises:
        Refused: a gate failed, or another promotion was faster.
        UserError: there is no such version, or the MLflow store does not answer.
    """
    name = registry.model_name
    if force is not None:
        _check_reason("--force", force)
    with mlflow_client(project, tracking, UNCHANGED) as (client, _):
        aliases = get_aliases(client, name)
        candidate = find_version(client, name, CANDIDATE if version is None else version)
        on_record = ledger.standing_champions(ledger.read_entries(client, name))
        if aliases.get(CHAMPION) == candidate.number and on_record[-1:] == [candidate.number]:
            print(f"{candidate.uri} is the champion already")
            return None
        candidate = accept_commit(client, project.root, candidate)
        known = all_versions(client, name)
        numbers = [number for number in (*on_record, aliases.get(CHAMPION)) if number in known]
        earlier = [known[number] for number in numbers if number != candidate.number]
        champion = earlier[-1] if earlier else None  # if it or its alias was deleted, the last one on record
        comparisons = _compare(project, tracking, candidate, select_references(candidate, earlier))
        gates = check_gates(candidate, champion, registry.gates, comparisons, earlier)
        _print_gates(gates, candidate, champion)
        failed = list(dict.fromkeys(gate.name for gate in gates if not gate.passed))
        if failed and force is None:
            not_compared = [
                reference
                for reference, comparison in comparisons
                if comparison is None and not of_different_datasets(candidate, reference)
            ]
            current = aliases.get(CHAMPION)
            raise Refused(_refusal(candidate, champion, failed, current, not_compared, project))
        entry = Entry(
            model=name,
            action="promote",
            before=aliases.get(CHAMPION),
            after=candidate.number,
            why=force or "all gates passed",
            forced=bool(failed),
            metrics=_main_metrics(candidate),
            gates=failed,
        )
        _change_champion(client, project, entry, previous=champion.number if champion else None)
    forced = f", although {', '.join(failed)} failed" if failed else ""
    print(f"{candidate.uri} is now the champion{forced}")
    return entry


def rollback(project: Project, *, tracking: Tracking, registry: Registry, why: str = "rolled back") -> Entry:
    """Make the former champion the champion again; a second rollback goes back to the one before that.

    Raises:
        UserError: there is no former champion, it was deleted, or the MLflow store does not answer.
        Refused: another promotion was faster.
    """
    name = registry.model_name
    _check_reason("--why", why)
    with mlflow_client(project, tracking, UNCHANGED) as (client, _):
        champion = get_aliases(client, name).get(CHAMPION)
        on_record = ledger.standing_champions(ledger.read_entries(client, name))
        known = all_versions(client, name)
        earlier = [number for number in _champions_before(champion, on_record) if number in known]
        if not earlier:
            raise UserError(
                f"models:/{name}: the champion is {champion or 'none'}, and the record has no former champion that is "
                "still registered; run `medgen promote --version N` to make another version champion"
            )
        target = known[earlier[-1]]
        metrics = _main_metrics(target)
        entry = Entry(model=name, action="rollback", before=champion, after=target.number, why=why, metrics=metrics)
        others = [number for number in earlier if number != target.number]
        _change_champion(client, project, entry, previous=others[-1] if others else None)
    print(f"{target.uri} is the champion again, in place of {champion or 'none'}")
    return entry


def history(
    project: Project, *, tracking: Tracking, registry: Registry, dataset: str | None = None, as_json: bool = False
) -> dict[str, Any]:
    """Print and return all versions with their lineage, and all changes of the champion.

    Args:
        dataset: show only versions trained on the dataset whose fingerprint or data md5 starts with this.

    Raises:
        UserError: nothing is registered, no version was trained on that dataset, or the MLflow store does not answer.
        Refused: after all is printed, if an entry of the record was changed or deleted.
    """
    name = registry.model_name
    with mlflow_client(project, tracking, "its history cannot be read: start the server first") as (client, _):
        versions = list(all_versions(client, name).values())
        if not versions:
            raise UserError(
                f"models:/{name}: no versions yet; run `medgen register` (or `dvc repro`) first, or choose another "
                f"registered model with --set registry.model_name=NAME. {list_registered(client)}"
            )
        aliases, changes = get_aliases(client, name), ledger.read_entries(client, name)
        problems = ledger.find_changes(client, name, project)
    if dataset is not None:
        versions = [version for version in versions if _was_trained_on(version, dataset)]
        if not versions:
            raise UserError(
                f"--dataset {dataset}: no version of models:/{name} was trained on it; expected the first characters "
                "of a dataset's fingerprint (artifacts/dataset/dataset.json) or md5 (data.dvc)"
            )
        numbers = {version.number for version in versions}
        changes = [change for change in changes if {change.before, change.after} & numbers]
    found = {
        "model": name,
        "aliases": aliases,
        "versions": [_to_dict(version, aliases) for version in versions],
        "promotions": [asdict(change) for change in changes],
        "problems": problems,
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_versions(versions, aliases)
        for version in versions:
            if replaced := replaced_metrics(version, MAIN_METRICS):
                say(printable(replaced))
        _print_changes(changes)
        if dataset is None and changes and aliases.get(CHAMPION) != changes[-1].after:
            say(
                f"The champion is version {aliases.get(CHAMPION, 'none')}, but the last entry of the record says "
                f"{changes[-1].after}: that change was interrupted, or the alias was moved by other means. "
                "Run `medgen promote --version N` to put a champion on record."
            )
    if problems:
        raise Refused(printable(f"models:/{name}: its record of promotions was changed: {'; '.join(problems)}"))
    return found


def select_references(candidate: Version, champions: Sequence[Version]) -> list[Version]:
    """The champions to compare a candidate with: the last one, and the best one with a comparable evaluation.

    In a chain of promotions each step may be too small to detect; compared with the best champion, their sum is not.
    Champions of an older medgen, without stored per-image values, are compared only if they are the last.
    """
    if not champions:
        return []
    comparable = [one for one in champions if EVALUATION_DIGEST in one.tags and are_comparable(candidate, one)]
    scores = {version.number: version.metrics.get(MMD, -version.metrics.get(DICE, 0.0)) for version in comparable}
    best = min(reversed(comparable), key=lambda version: scores[version.number], default=champions[-1])
    return list({version.number: version for version in (champions[-1], best)}.values())


def _compare(
    project: Project, tracking: Tracking, candidate: Version, references: Sequence[Version]
) -> list[tuple[Version, list[Comparison] | None]]:
    """The references, each with its comparison with the candidate; None if the evaluations cannot be compared."""
    comparable = [version for version in references if are_comparable(candidate, version)]
    own = download_evaluation(candidate, project, tracking) if comparable else None
    found: list[tuple[Version, list[Comparison] | None]] = []
    for version in references:
        other = download_evaluation(version, project, tracking) if own and version in comparable else None
        found.append((version, compare_versions(own, other) if own and other else None))
    return found


def _change_champion(client: "MlflowClient", project: Project, entry: Entry, previous: int | None) -> None:
    """Write the ledger and move the aliases, unless the champion has changed since `entry` was made."""
    name = entry.model
    with ledger.promotion_lock(client, name) as check:
        champion = get_aliases(client, name).get(CHAMPION)
        if champion != entry.before:
            raise Refused(
                f"version {entry.after} is not promoted: while its gates were checked, version {champion} became "
                f"champion in place of {entry.before or 'none'}; see `medgen history`, and run the command again"
            )
        # Write the ledger entry before moving the aliases, so that a crash in between is visible in the history.
        check()
        ledger.append_entry(client, name, entry)
        check()
        if previous is None:
            client.delete_registered_model_alias(name, PREVIOUS)
        else:
            client.set_registered_model_alias(name, PREVIOUS, str(previous))
        client.set_registered_model_alias(name, CHAMPION, str(entry.after))
        _update_description(client, name)
        try:
            ledger.append_to_file(client, name, project.reports / LEDGER)
        except OSError as error:  # the registry has the entry, and the next change writes it to the file
            warn(f"{project.reports / LEDGER}: not written: {error.strerror}")


def _update_description(client: "MlflowClient", name: str) -> None:
    """Write the last changes to the registered model's description, unless a user has edited it."""
    model = client.get_registered_model(name)
    if not is_replaceable(model.description, model.tags):
        return
    last = ledger.read_entries(client, name)[: -NUM_DESCRIBED - 1 : -1]
    text = describe_model(name, [_line(change) for change in last])
    client.update_registered_model(name, text)
    for key, value in hash_tags(text).items():
        client.set_registered_model_tag(name, key, value)


def _line(change: Entry) -> str:
    """One change as an item of a Markdown list."""
    text = f"- {_minute(change)}: version {change.after}"
    text += f" in place of {change.before}" if change.before else ""
    text += f", forced although {', '.join(change.gates)} failed" if change.forced else ""
    return f"{text}, by {escape(change.who)}: {escape(change.why)}"


def _champions_before(champion: int | None, on_record: Sequence[int]) -> list[int]:
    """The champions before this one, oldest first; all of them if the record does not have this one."""
    if champion is None or champion not in on_record:
        return list(on_record)
    last = len(on_record) - 1 - list(reversed(on_record)).index(champion)
    return [number for number in on_record[:last] if number != champion]


def _check_reason(option: str, why: str) -> None:
    if not why.strip() or len(why) > MAX_WHY or not why.isprintable():
        found = f"{len(why)}" + ("" if why.isprintable() else ", some of them not printable")
        raise UserError(f"{option}: expected a reason of 1 to {MAX_WHY} printable characters, found {found}")


def _refusal(
    candidate: Version,
    champion: Version | None,
    failed: Sequence[str],
    current: int | None,
    not_compared: Sequence[Version],
    project: Project,
) -> str:
    """The message of a refused promotion, with the commands to run next."""
    text = f"{candidate.uri} is not promoted: {', '.join(failed)} failed"
    if current:
        text += f"; version {current} stays champion"
    if champion and champion.number != current:
        text += f"; version {champion.number}, the last champion on record, was the reference"
    text += "."
    if champion and of_different_datasets(candidate, champion):
        text += (
            f" {candidate.uri} was trained on dataset {candidate.tags[DATASET_NAME]}, {champion.uri} on "
            f"{champion.tags[DATASET_NAME]}: metrics on different datasets are not compared. Give each dataset a "
            "registered model of its own: remove registry.model_name from params.yaml, or set it to another name; then "
            "run `medgen register` and `medgen promote`."
        )
    versions = [*not_compared, candidate]
    to_evaluate = [version for version in versions if not _is_evaluated(version)] or (versions if not_compared else [])
    if to_evaluate:
        commands = " and ".join(f"`medgen evaluate --model {version.uri}`" for version in to_evaluate)
        text += f" To evaluate all in the same way, run {commands}, then promote again."
    if {"git commit", "data"} & set(failed):
        text += f" {how_to_commit(project.root, candidate)}."
    return f'{text} `--force "why"` promotes it nevertheless and records the reason'


def _is_evaluated(version: Version) -> bool:
    """Return True if a version has metrics and the per-image values they come from."""
    return {EVALUATED_ON, EVALUATION_DIGEST} <= version.tags.keys() and bool({SSIM, DICE} & version.metrics.keys())


def _was_trained_on(version: Version, dataset: str) -> bool:
    return any(version.tags.get(key, "").startswith(dataset) for key in ("dataset.fingerprint", "data.md5"))


def _main_metrics(version: Version) -> dict[str, float]:
    return {key: version.metrics[key] for key in MAIN_METRICS if key in version.metrics}


def _minute(change: Entry) -> str:
    """The time of a change in UTC, such as 2026-01-31 09:30."""
    return change.time[:16].replace("T", " ")


def _to_dict(version: Version, aliases: Mapping[str, int]) -> dict[str, Any]:
    return {
        "version": version.number,
        "aliases": sorted(alias for alias, number in aliases.items() if number == version.number),
        "created": version.created,
        "run": version.tags.get("run", "unknown"),
        "mlflow_run": version.run_id,
        "git_commit": version.tags.get("git.commit", "unknown"),
        "git_dirty": version.tags.get("git.dirty", "unknown"),
        "dataset": version.tags.get("dataset.fingerprint", "unknown"),
        "data_md5": version.tags.get("data.md5", "unknown"),
        "params": version.tags.get("params.fingerprint", "unknown"),
        "metrics": dict(sorted(version.metrics.items())),
        "measurements": measurements(version),
    }


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], fold: bool = True) -> Table:
    """A table without control characters, whose first column is never folded."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        is_whole = number == 0 or not fold
        table.add_column(heading, overflow="ellipsis" if is_whole else "fold", no_wrap=is_whole)
    for row in rows:
        table.add_row(*(printable(str(value)) for value in row))
    return table


def _print_gates(gates: Sequence[Gate], candidate: Version, champion: Version | None) -> None:
    reference = f"version {champion.number}, the champion" if champion else "no champion yet"
    headings = ("gate", f"version {candidate.number}", "champion", "required", "passed")
    rows = [(gate.name, gate.candidate, gate.champion, gate.required, "yes" if gate.passed else "NO") for gate in gates]
    show(_table(f"{candidate.uri} compared with {reference}", headings, rows))
    if compared := [(gate.name, gate.difference, gate.p, gate.detectable) for gate in gates if gate.difference]:
        title = "Differences on the same images; positive is worse"
        show(_table(title, ("gate", "difference (95 %)", "p", "smallest detectable"), compared))


def _print_versions(versions: Sequence[Version], aliases: Mapping[str, int]) -> None:
    keys = [key for key in MAIN_METRICS if any(key in version.metrics for version in versions)]
    headings = ("no.", "alias", "commit", "dataset", "data", *(MAIN_METRICS[key] for key in keys))
    rows = []
    for version in versions:
        values = _to_dict(version, aliases)
        hashes = (values[key][:HASH_LENGTH] for key in ("git_commit", "dataset", "data_md5"))
        metrics = (f"{version.metrics[key]:.4g}" if key in version.metrics else NO_VALUE for key in keys)
        rows.append((version.number, "\n".join(values["aliases"]), *hashes, *metrics))
    title = f"Versions of models:/{versions[0].name}"
    show(_table(title, headings, rows, fold=False))


def _print_changes(changes: Sequence[Entry]) -> None:
    if not changes:
        say("No version was promoted yet. Run `medgen promote` to make the candidate champion.")
        return
    rows = []
    for change in changes:
        action = f"{change.action}, forced" if change.forced else change.action
        rows.append((_minute(change), change.who, action, change.before or NO_VALUE, change.after, change.why))
    headings = ("time (UTC)", "who", "action", "from", "to", "why")
    show(_table("Changes of the champion", headings, rows))
