"""The ledger of promotions: one entry for each change of the champion; entries are appended and never changed.

An entry is a tag `promotion.000001.KEY` of the registered model and a line of reports/promotions.jsonl. Only the holder
of `promotion_lock` may write. Each entry has a KEY of its own, so that a process that lost the lock without knowing it
overwrites no other entry. Each entry contains the hash of all entries before it, so that a changed or deleted one is
found (`find_changes`), except for the last, which only the file shows.
"""

import hashlib
import json
import os
import random
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medgen.config import Project
from medgen.errors import UserError, printable
from medgen.registry.signatures import TRUSTED_KEYS, is_trusted, sign
from medgen.registry.versions import get_registered_model
from medgen.tracking.mlflow_sync import current_user

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LEDGER = "promotions.jsonl"
ADDED_FIELDS = {"previous": "", "signature": ""}  # that entries of an older medgen do not have
CLAIM = "promoting."  # prefix of the tags that claim the lock
ENTRY_KEY = re.compile(r"promotion\.(\d+)\.([0-9a-f]+)")
MAX_WHO = 200  # characters
MAX_WHY = 1000  # characters: MLflow's databases keep 5000 of a tag
CLAIM_TIMEOUT_SECONDS = 60.0  # after which a claim of another process counts as left by a killed process
RETRY_SECONDS = (0.1, 0.6)  # drawn between these, so that two processes that saw each other do not collide again


def account_and_host() -> str:
    """Account and host of this process; not authenticated."""
    return f"{current_user()}@{socket.gethostname()}".encode(errors="replace").decode()[:MAX_WHO]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One change of the champion, by default made now by this process."""

    key: str = field(default_factory=lambda: secrets.token_hex(8))  # unique, also among other registries
    model: str  # the registered model's name
    action: Literal["promote", "rollback"]
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    who: str = field(default_factory=account_and_host)
    before: int | None  # version that was champion
    after: int
    why: str
    forced: bool = False  # promoted although a gate failed
    metrics: dict[str, float] = field(default_factory=dict)  # of the new champion: the main metrics of the gates
    gates: list[str] = field(default_factory=list)  # names of the gates that failed
    previous: str = ""  # hash of the entries before this one; "": written by an older medgen
    signature: str = ""  # of the line without it; "": made without a key

    @property
    def line(self) -> str:
        """One line of promotions.jsonl."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def read_entries(client: "MlflowClient", name: str) -> list[Entry]:
    """All entries of a registered model, oldest first.

    Raises:
        UserError: an entry was changed and cannot be read.
    """
    tags, found = _tags(client, name), []
    for key in sorted(key for key in tags if ENTRY_KEY.fullmatch(key)):
        try:
            values = ADDED_FIELDS | json.loads(tags[key])
            found.append(Entry(**{known.name: values[known.name] for known in fields(Entry)}))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"models:/{name}, tag {key}: not a valid ledger entry, so it was changed; set it to the line of "
                "reports/promotions.jsonl with that key, or delete the tag"
            ) from None
    return found


def standing_champions(entries: Sequence[Entry]) -> list[int]:
    """Versions that became champion, oldest first, without those that were rolled back."""
    standing: list[int] = []
    for entry in entries:
        if entry.action == "rollback":
            while standing and standing[-1] != entry.after:
                standing.pop()
        if standing[-1:] != [entry.after]:
            standing.append(entry.after)
    return standing


def append_entry(client: "MlflowClient", name: str, entry: Entry) -> None:
    """Add an entry to the registered model; the caller holds `promotion_lock`."""
    lines = _numbered_lines(client, name)
    entry = replace(entry, previous=_hash(line for _, line in lines))
    entry = replace(entry, signature=sign(entry.line))
    number = max((number for number, _ in lines), default=0) + 1
    client.set_registered_model_tag(name, f"promotion.{number:06d}.{entry.key}", entry.line)


def find_changes(client: "MlflowClient", name: str, project: Project) -> list[str]:
    """One line for each sign that entries were changed or deleted after they were written, or forged.

    They are compared with reports/promotions.jsonl, which may lack entries that other machines wrote.
    """
    file = project.reports / LEDGER
    lines, problems = _numbered_lines(client, name), []
    entries = [ADDED_FIELDS | json.loads(line) for _, line in lines]
    chained = signed = False
    for (number, _), entry in zip(lines, entries, strict=True):
        before = [line for earlier, line in lines if earlier < number]
        if entry["previous"] != (_hash(before) if chained or entry["previous"] else ""):
            problems.append(f"entry {number} does not follow from those before it: one was changed or deleted")
        chained = chained or bool(entry["previous"])
        signature = entry["signature"]
        unsigned = json.dumps({**entry, "signature": ""}, sort_keys=True, ensure_ascii=False)
        must_be_signed = signed or signature or number == lines[-1][0]
        if must_be_signed and not is_trusted(project, unsigned, signature):
            problems.append(f"entry {number} has no signature by a key of {TRUSTED_KEYS}")
        signed = signed or bool(signature)  # a signed entry contains the hash of those before it
    in_registry = {entry["key"]: entry for entry in entries}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            copy = ADDED_FIELDS | json.loads(line)
            key, model, time_of_copy = copy["key"], copy["model"], copy["time"]
        except (ValueError, TypeError, KeyError):  # cut short by a power failure
            continue
        if model == name and in_registry.get(key) != copy:
            state = "differs from" if key in in_registry else "is missing, but is in"
            problems.append(f"the entry of {time_of_copy} in the registry {state} {file.name}: {line}")
    return problems


def _numbered_lines(client: "MlflowClient", name: str) -> list[tuple[int, str]]:
    """Number and text of all entries, in the order in which they were written."""
    tags = _tags(client, name)
    return [(int(match[1]), tags[key]) for key in sorted(tags) if (match := ENTRY_KEY.fullmatch(key))]


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def append_to_file(client: "MlflowClient", name: str, file: Path) -> None:
    """Append to promotions.jsonl the entries that it lacks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    missing = [entry.line for entry in read_entries(client, name) if entry.key not in written]
    with file.open("a", encoding="utf-8") as text:
        separator = "\n" if written and not written.endswith("\n") else ""  # after a line cut short by a power failure
        text.write(separator + "".join(f"{line}\n" for line in missing))
        text.flush()
        os.fsync(text.fileno())


@contextmanager
def promotion_lock(client: "MlflowClient", name: str) -> Iterator[Callable[[], None]]:
    """A lock across machines: only one process at a time may change the champion of a registered model.

    The MLflow store can only set and list tags. Each process therefore sets a claim tag and then lists the claims. If
    there is no other, it holds the lock, because any later process sees its claim. Otherwise it deletes its claim,
    waits and tries again.

    Yields:
        A function to call before each change. It raises UserError if this process was stopped for so long that
        another one took the lock.
    """

    def check() -> None:
        if claim not in _claims(client, name):
            raise UserError(
                f"models:/{name}: another process took over the promotion lock because this one was stopped for more "
                f"than {CLAIM_TIMEOUT_SECONDS:g} s; run the command again"
            )

    deadlines: dict[str, float] = {}  # of the other claims, by this machine's clock: clocks of machines differ
    while True:
        claim = f"{CLAIM}{secrets.token_hex(8)}"
        client.set_registered_model_tag(name, claim, account_and_host())
        try:
            others = _claims(client, name)
            others.pop(claim, None)
            if not others:
                yield check
                return
        finally:
            client.delete_registered_model_tag(name, claim)
        if not deadlines:
            print(f"waiting: {printable(' and '.join(others.values()))} is changing the champion of models:/{name}")
        for other in others:
            if time.monotonic() > deadlines.setdefault(other, time.monotonic() + CLAIM_TIMEOUT_SECONDS):
                # Left by a killed process: a living one holds the lock for seconds.
                client.delete_registered_model_tag(name, other)
        time.sleep(random.uniform(*RETRY_SECONDS))


def _claims(client: "MlflowClient", name: str) -> dict[str, str]:
    return {key: holder for key, holder in _tags(client, name).items() if key.startswith(CLAIM)}


def _tags(client: "MlflowClient", name: str) -> dict[str, str]:
    model = get_registered_model(client, name)
    return dict(model.tags) if model else {}
