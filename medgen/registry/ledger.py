"""The ledger of promotions: one entry for each change of the champion; entries are appended and never changed.

An entry is a tag `promotion.000001.KEY` of the registered model and a line of reports/promotions.jsonl. Only the holder
of `promotion_lock` may write. Each entry has a KEY of its own, so that a process that lost the lock without knowing it
overwrites no other entry.
"""

import json
import os
import random
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medgen.errors import UserError, printable
from medgen.registry.versions import get_registered_model
from medgen.tracking.mlflow_sync import current_user

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

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
            values = json.loads(tags[key])
            found.append(Entry(**{known.name: values[known.name] for known in fields(Entry)}))
        except (ValueError, TypeError, KeyError):
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
    numbers = [int(match[1]) for key in _tags(client, name) if (match := ENTRY_KEY.fullmatch(key))]
    client.set_registered_model_tag(name, f"promotion.{max(numbers, default=0) + 1:06d}.{entry.key}", entry.line)


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
