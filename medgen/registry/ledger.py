"""Who became champion, when, for what reason: entries that are appended to the registered model and never changed.

Each is a tag `promotion.000001.KEY` of the registered model, and a line of reports/promotions.jsonl. Only who has the
`turn` may write: of two promotions at once one waits, and then sees what the other did. No two entries have one KEY, so
that even who lost its turn and does not know it overwrites nothing.
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
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medgen.errors import UserError, printable
from medgen.registry.versions import registered_model
from medgen.tracking.mlflow_sync import user

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CLAIM = "promoting."  # what the keys of claims begin with
ENTRY_KEY = re.compile(r"promotion\.(\d+)\.([0-9a-f]+)")
MAX_WHO = 200
MAX_WHY = 1000  # characters: MLflow's databases keep 5000 of a tag
PATIENCE_SECONDS = 60.0  # after which a claim that did not move is taken for that of a killed process
PAUSE_SECONDS = (0.1, 0.6)  # between two looks; drawn, so that two who saw each other do not meet again


@dataclass(frozen=True)
class Entry:
    """One change of the champion."""

    key: str  # tells it from all others, of other registries too
    model: str  # the registered model's name
    action: Literal["promote", "rollback"]
    time: str  # ISO 8601, UTC
    who: str
    before: int | None  # version that was champion
    after: int
    why: str
    forced: bool  # although a gate was not passed
    metrics: dict[str, float]  # of the version that became champion: what the gates look at
    gates: list[str]  # those that were not passed

    @property
    def line(self) -> str:
        """One line of promotions.jsonl."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def entry(
    action: Literal["promote", "rollback"],
    model: str,
    before: int | None,
    after: int,
    why: str,
    forced: bool = False,
    metrics: dict[str, float] | None = None,
    gates: Sequence[str] = (),
) -> Entry:
    """A new entry, by whoever runs this, now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(
        secrets.token_hex(8), model, action, now, who(), before, after, why, forced, metrics or {}, list(gates)
    )


def who() -> str:
    """Account and machine of whoever runs this: said, not proven."""
    return f"{user()}@{socket.gethostname()}".encode(errors="replace").decode()[:MAX_WHO]


def entries(client: "MlflowClient", name: str) -> list[Entry]:
    """All entries of a registered model, oldest first.

    Raises:
        UserError: somebody has changed one.
    """
    tags, known = _tags(client, name), {part.name for part in fields(Entry)}
    found = []
    for key in sorted(key for key in tags if ENTRY_KEY.fullmatch(key)):
        try:
            found.append(Entry(**{part: value for part, value in json.loads(tags[key]).items() if part in known}))
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                f"models:/{name}, tag {key}: no entry of the ledger any more; set it to what reports/promotions.jsonl "
                "says under that key, or delete the tag"
            ) from None
    return found


def champions(found: Sequence[Entry]) -> list[int]:
    """The versions that each promotion not rolled back made champion, oldest first."""
    standing: list[int] = []
    for one in found:
        if one.action == "rollback":
            while standing and standing[-1] != one.after:
                standing.pop()
        if standing[-1:] != [one.after]:
            standing.append(one.after)
    return standing


def append(client: "MlflowClient", name: str, new: Entry) -> None:
    """Adds an entry to the registered model. For who has the turn."""
    numbers = [int(found[1]) for key in _tags(client, name) if (found := ENTRY_KEY.fullmatch(key))]
    client.set_registered_model_tag(name, f"promotion.{max(numbers, default=0) + 1:06d}.{new.key}", new.line)


def write_file(client: "MlflowClient", name: str, file: Path) -> None:
    """Appends to promotions.jsonl the entries it lacks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    there = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    missing = [one.line for one in entries(client, name) if one.key not in there]
    with file.open("a", encoding="utf-8") as text:
        torn = "\n" if there and not there.endswith("\n") else ""  # by a power cut
        text.write(torn + "".join(f"{line}\n" for line in missing))
        text.flush()
        os.fsync(text.fileno())


@contextmanager
def turn(client: "MlflowClient", name: str) -> Iterator[Callable[[], None]]:
    """Lets one process of all machines at a time change the champion of a registered model.

    The store can do no more than set and list tags. So each writes a claim of its own and then looks: who sees no
    other claim has the turn, as whoever came later sees that one; who sees another takes its own back and tries again.

    Gives what is to be called just before anything is changed.

    Raises:
        UserError: by that call, when this process stood still for so long that others took the turn from it.
    """

    def check() -> None:
        if claim not in _claims(client, name):
            raise UserError(f"models:/{name}: this promotion stood still for too long and lost its turn; run it again")

    deadlines: dict[str, float] = {}  # of the claims of others, by our own clock: machines' clocks differ
    while True:
        claim = f"{CLAIM}{secrets.token_hex(8)}"
        client.set_registered_model_tag(name, claim, who())
        try:
            others = _claims(client, name)
            others.pop(claim, None)
            if not others:
                yield check
                return
        finally:
            client.delete_registered_model_tag(name, claim)
        if not deadlines:
            print(
                f"waiting: {printable(' and '.join(others.values()))} changes the champion of models:/{name} just now"
            )
        for other in others:
            if time.monotonic() > deadlines.setdefault(other, time.monotonic() + PATIENCE_SECONDS):
                client.delete_registered_model_tag(name, other)  # its process was killed: a turn takes seconds
        time.sleep(random.uniform(*PAUSE_SECONDS))


def _claims(client: "MlflowClient", name: str) -> dict[str, str]:
    return {key: holder for key, holder in _tags(client, name).items() if key.startswith(CLAIM)}


def _tags(client: "MlflowClient", name: str) -> dict[str, str]:
    model = registered_model(client, name)
    return dict(model.tags) if model else {}
