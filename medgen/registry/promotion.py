"""Which version is champion: `medgen promote`, `rollback`, `history`.

Aliases say who stands where: `candidate` is the version registered last, `champion` the one that is used, `previous`
the champion before it. The ledger says why.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgen.config import Project, Registry, Tracking
from medgen.errors import Refused, UserError, printable
from medgen.metrics.comparison import Comparison
from medgen.registry.evaluations import compare_versions, read_evaluation
from medgen.registry.gates import COPIES, DICE, MMD, NOTHING, SHORT, SSIM, Gate, are_alike, check_gates
from medgen.registry.ledger import MAX_WHY, Entry, append, champions, entries, entry, turn, write_file
from medgen.registry.mlflow_ui import about_model, plain
from medgen.registry.versions import (
    CANDIDATE,
    CHAMPION,
    EVALUATION,
    JUDGED_ON,
    PREVIOUS,
    Version,
    aliases,
    all_versions,
    answering,
    find,
)
from medgen.tracking.mlflow_descriptions import is_ours, marked
from medgen.tracking.mlflow_sync import connect

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LEDGER = "promotions.jsonl"
NUM_TOLD = 10  # last changes, in the registered model's description
SHOWN = {SSIM: "ssim", MMD: "mmd", COPIES: "copies", DICE: "dice"}  # metric -> heading
UNCHANGED = "nothing was changed: start the server first"


def promote(
    project: Project, *, tracking: Tracking, registry: Registry, version: int | None = None, force: str | None = None
) -> Entry | None:
    """Makes a version the champion, where all gates of `registry.gates` are passed.

    Args:
        project: whose registry.
        tracking: where the registry is.
        registry: its model's name, and the gates.
        version: its number; None is the candidate.
        force: why it is to become champion though gates are not passed.

    Returns:
        What was written to the ledger; None where the version is champion already.

    Raises:
        Refused: a gate was not passed, or another promotion was quicker.
        UserError: there is no such version, or the store does not answer.
    """
    name = registry.model_name
    if force is not None:
        _check_why("--force", force)
    with answering(project, tracking, UNCHANGED):
        client, _ = connect(project, tracking)
        standing = aliases(client, name)
        candidate = find(client, name, CANDIDATE if version is None else version)
        changes = entries(client, name)
        is_champion, is_last = standing.get(CHAMPION) == candidate.number, champions(changes)[-1:] == [candidate.number]
        if is_champion and is_last:
            print(f"{candidate.uri} is the champion already")
            return None
        known = {version.number: version for version in all_versions(client, name)}
        numbers = [number for number in (*champions(changes), standing.get(CHAMPION)) if number in known]
        earlier = [known[number] for number in numbers if number != candidate.number]
        champion = earlier[-1] if earlier else None  # where it or its alias was deleted, the last on record
        comparisons = _compare(project, tracking, candidate, _references(candidate, earlier))
        gates = check_gates(candidate, champion, registry.gates, comparisons, earlier)
        _print(gates, candidate, champion)
        failed = list(dict.fromkeys(gate.name for gate in gates if not gate.passed))
        if failed and force is None:
            to_evaluate = [version for version, comparison in comparisons if comparison is None]
            raise Refused(_refusal(candidate, champion, failed, standing.get(CHAMPION), to_evaluate))
        why = force or "all gates passed"
        metrics = {key: candidate.metrics[key] for key in SHOWN if key in candidate.metrics}
        new = entry("promote", name, standing.get(CHAMPION), candidate.number, why, bool(failed), metrics, failed)
        _change(client, project, name, new, previous=champion.number if champion else None)
    forced = f", although {', '.join(failed)} failed" if failed else ""
    print(f"{candidate.uri} is now the champion{forced}")
    return new


def rollback(project: Project, *, tracking: Tracking, registry: Registry, why: str = "rolled back") -> Entry:
    """Makes the champion before the present one champion again; once more, the one before that.

    Raises:
        UserError: there is none, it was deleted, or the store does not answer.
        Refused: another promotion was quicker.
    """
    name = registry.model_name
    _check_why("--why", why)
    with answering(project, tracking, UNCHANGED):
        client, _ = connect(project, tracking)
        champion, changes = aliases(client, name).get(CHAMPION), entries(client, name)
        known = {version.number: version for version in all_versions(client, name)}
        earlier = [number for number in _before(champion, champions(changes)) if number in known]
        if not earlier:
            raise UserError(
                f"models:/{name}: the champion is {champion or 'none'}, and the record has none before it that is "
                "still registered; `medgen promote --version N` makes another version champion"
            )
        target = known[earlier[-1]]
        metrics = {key: target.metrics[key] for key in SHOWN if key in target.metrics}
        new = entry("rollback", name, champion, target.number, why, metrics=metrics)
        left = [number for number in earlier if number != target.number]
        _change(client, project, name, new, previous=left[-1] if left else None)
    print(f"{target.uri} is the champion again, in place of {champion or 'none'}")
    return new


def history(
    project: Project, *, tracking: Tracking, registry: Registry, dataset: str | None = None, as_json: bool = False
) -> dict[str, Any]:
    """Prints all versions, what each was made from, and how the champion changed.

    Args:
        project: whose registry.
        tracking: where the registry is.
        registry: its model's name.
        dataset: only versions trained on it: what its fingerprint or its data's md5 begins with.
        as_json: prints JSON instead.

    Raises:
        UserError: nothing is registered, no version was trained on that dataset, or the store does not answer.
    """
    name = registry.model_name
    with answering(project, tracking, "its history cannot be read: start the server first"):
        client, _ = connect(project, tracking)
        versions = all_versions(client, name)
        if not versions:
            raise UserError(f"models:/{name}: no versions yet; run `medgen register` (or `dvc repro`) first")
        standing, changes = aliases(client, name), entries(client, name)
    if dataset is not None:
        versions = [version for version in versions if _was_trained_on(version, dataset)]
        if not versions:
            raise UserError(
                f"--dataset {dataset}: no version of models:/{name} was trained on it; expected what the fingerprint "
                "(artifacts/dataset/dataset.json) or the md5 (data.dvc) of a dataset begins with"
            )
        shown = {version.number for version in versions}
        changes = [change for change in changes if {change.before, change.after} & shown]
    found = {
        "model": name,
        "aliases": standing,
        "versions": [_plain(version, standing) for version in versions],
        "promotions": [asdict(change) for change in changes],
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_versions(versions, standing)
        _print_changes(changes)
        if dataset is None and changes and standing.get(CHAMPION) != changes[-1].after:
            _say(
                f"The champion is version {standing.get(CHAMPION, 'none')}, the last change says "
                f"{changes[-1].after}: it was cut short, or the alias was moved by other means. "
                "`medgen promote --version N` puts one on record."
            )
    return found


def _change(client: "MlflowClient", project: Project, name: str, new: Entry, previous: int | None) -> None:
    """Writes to the ledger and moves the aliases, unless the champion is not what it was when `new` was decided."""
    with turn(client, name) as check:
        now = aliases(client, name).get(CHAMPION)
        if now != new.before:
            raise Refused(
                f"version {new.after} is not promoted: while its gates were looked at, version {now} became champion "
                f"in place of {new.before or 'none'}; look at `medgen history`, and run the command again"
            )
        # first the word, then the deed: what a kill leaves half done is seen in the history
        check()
        append(client, name, new)
        check()
        if previous is None:
            client.delete_registered_model_alias(name, PREVIOUS)
        else:
            client.set_registered_model_alias(name, PREVIOUS, str(previous))
        client.set_registered_model_alias(name, CHAMPION, str(new.after))
        _tell(client, name)
        try:
            write_file(client, name, project.reports / LEDGER)
        except OSError as error:  # the registry has it, and the next change will write it
            warning = f"warning: {project.reports / LEDGER}: not written: {error.strerror}"
            Console(stderr=True, highlight=False).print(warning, style="yellow", markup=False, soft_wrap=True)


def _tell(client: "MlflowClient", name: str) -> None:
    """The last changes in the registered model's description, unless a person has written that."""
    model = client.get_registered_model(name)
    if not is_ours(model.description, model.tags):
        return
    told = about_model(name, [_line(change) for change in entries(client, name)[: -NUM_TOLD - 1 : -1]])
    client.update_registered_model(name, told)
    for key, value in marked(told).items():
        client.set_registered_model_tag(name, key, value)


def _line(change: Entry) -> str:
    """One change, as an item of a Markdown list."""
    forced = f", forced against {', '.join(change.gates)}" if change.forced else ""
    instead = f" in place of {change.before}" if change.before else ""
    when = change.time[:16].replace("T", " ")
    return f"- {when}: version {change.after}{instead}{forced}, by {plain(change.who)}: {plain(change.why)}"


def _references(candidate: Version, champions: Sequence[Version]) -> list[Version]:
    """The champions that a candidate is compared with: the last one, and the best that was evaluated alike.

    Each step of a chain may be too small to see; compared with the best one, their sum is not. Champions of an older
    medgen, whose per-image values were not kept, count only while they are the last.
    """
    if not champions:
        return []
    alike = [version for version in champions if EVALUATION in version.tags and are_alike(candidate, version)]
    scores = {version.number: version.metrics.get(MMD, -version.metrics.get(DICE, 0.0)) for version in alike}
    best = min(reversed(alike), key=lambda version: scores[version.number], default=champions[-1])
    return list({version.number: version for version in (champions[-1], best)}.values())


def _compare(
    project: Project, tracking: Tracking, candidate: Version, references: Sequence[Version]
) -> list[tuple[Version, list[Comparison] | None]]:
    """How much worse a candidate is than each of the references; None where their evaluations cannot be compared."""
    alike = [version for version in references if are_alike(candidate, version)]
    own = read_evaluation(candidate, project, tracking) if alike else None
    found: list[tuple[Version, list[Comparison] | None]] = []
    for version in references:
        other = read_evaluation(version, project, tracking) if own and version in alike else None
        found.append((version, compare_versions(own, other) if own and other else None))
    return found


def _before(champion: int | None, standing: Sequence[int]) -> list[int]:
    """The champions before this one, oldest first; all, where the record does not know it."""
    if champion is None or champion not in standing:
        return list(standing)
    last = len(standing) - 1 - list(reversed(standing)).index(champion)
    return [number for number in standing[:last] if number != champion]


def _check_why(option: str, why: str) -> None:
    if not why.strip() or len(why) > MAX_WHY or not why.isprintable():
        odd = "" if why.isprintable() else ", some of which cannot be printed"
        raise UserError(f"{option}: expected a reason of 1 to {MAX_WHY} printable characters, found {len(why)}{odd}")


def _refusal(
    candidate: Version,
    champion: Version | None,
    failed: Sequence[str],
    stays: int | None,
    to_evaluate: Sequence[Version],
) -> str:
    text = f"{candidate.uri} is not promoted: {', '.join(failed)} failed"
    if stays:
        text += f"; version {stays} stays champion"
    if champion and champion.number != stays:
        text += f"; version {champion.number}, the last champion on record, was the reference"
    text += "."
    versions = [*to_evaluate, candidate]
    if missing := [version for version in versions if not _is_evaluated(version)] or (versions if to_evaluate else []):
        commands = " and ".join(f"`medgen evaluate --model {version.uri}`" for version in missing)
        text += f" To evaluate all alike: {commands}, then promote again."
    return f'{text} `--force "why"` promotes all the same, and is recorded'


def _is_evaluated(version: Version) -> bool:
    """Returns whether a version has metrics and the per-image values they come from."""
    return {JUDGED_ON, EVALUATION} <= version.tags.keys() and bool({SSIM, DICE} & version.metrics.keys())


def _was_trained_on(version: Version, dataset: str) -> bool:
    return any(version.tags.get(key, "").startswith(dataset) for key in ("dataset.fingerprint", "data.md5"))


def _plain(version: Version, standing: Mapping[str, int]) -> dict[str, Any]:
    return {
        "version": version.number,
        "aliases": sorted(alias for alias, number in standing.items() if number == version.number),
        "created": version.created,
        "run": version.tags.get("run", "unknown"),
        "mlflow_run": version.run_id,
        "git_commit": version.tags.get("git.commit", "unknown"),
        "git_dirty": version.tags.get("git.dirty", "unknown"),
        "dataset": version.tags.get("dataset.fingerprint", "unknown"),
        "data_md5": version.tags.get("data.md5", "unknown"),
        "params": version.tags.get("params.fingerprint", "unknown"),
        "metrics": dict(sorted(version.metrics.items())),
    }


def _say(text: str) -> None:
    Console(highlight=False).print(printable(text), markup=False, soft_wrap=True)


def _cells(*texts: object) -> list[Text]:
    """Plain text: a name or a reason may hold what rich takes for markup."""
    return [Text(printable(str(text))) for text in texts]


def _print(gates: Sequence[Gate], candidate: Version, champion: Version | None) -> None:
    against = f"version {champion.number}, the champion" if champion else "no champion yet"
    table = Table(title=f"{candidate.uri} against {against}", title_justify="left")
    for heading in ("gate", f"version {candidate.number}", "champion", "wanted", "passed"):
        table.add_column(heading, overflow="fold")
    for gate in gates:
        table.add_row(*_cells(gate.name, gate.candidate, gate.champion, gate.wanted, "yes" if gate.passed else "NO"))
    console = Console(highlight=False)
    console.print(table)
    if compared := [gate for gate in gates if gate.difference]:
        title = "Compared on the same images; positive is worse"
        details = Table(title=title, title_justify="left")
        for heading in ("gate", "difference (95 %)", "p", "smallest visible"):
            details.add_column(heading, overflow="fold")
        for gate in compared:
            details.add_row(*_cells(gate.name, gate.difference, gate.p, gate.detectable))
        console.print(details)


def _print_versions(versions: Sequence[Version], standing: Mapping[str, int]) -> None:
    keys = [key for key in SHOWN if any(key in version.metrics for version in versions)]
    table = Table(title=f"Versions of models:/{versions[0].name}", title_justify="left")
    for heading in ("", "alias", "commit", "dataset", "data", *(SHOWN[key] for key in keys)):
        table.add_column(heading, no_wrap=True)
    for version in versions:
        plain = _plain(version, standing)
        hashes = (plain[key][:SHORT] for key in ("git_commit", "dataset", "data_md5"))
        numbers = (f"{version.metrics[key]:.4g}" if key in version.metrics else NOTHING for key in keys)
        table.add_row(*_cells(version.number, "\n".join(plain["aliases"]), *hashes, *numbers))
    Console(highlight=False).print(table)


def _print_changes(changes: Sequence[Entry]) -> None:
    if not changes:
        _say("No version was promoted yet: `medgen promote` makes the candidate champion.")
        return
    table = Table(title="Champions", title_justify="left")
    for heading in ("when (UTC)", "who", "did", "from", "to", "why"):
        table.add_column(heading, overflow="fold")
    for change in changes:
        did = f"{change.action}, forced" if change.forced else change.action
        when = change.time[:16].replace("T", " ")
        table.add_row(*_cells(when, change.who, did, change.before or NOTHING, change.after, change.why))
    Console(highlight=False).print(table)
