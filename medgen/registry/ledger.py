"""Who became champion, when, for what reason: entries that are appended to the registered model and never changed.

Each is a tag `promotion.000001`, ... of the registered model, and a line of reports/promotions.jsonl. Only who has the
`turn` may write: of two promotions at once one waits, and then sees what the other did.
"""

import json
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medgen.errors import UserError
from medgen.tracking.mirror import user

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ENTRY, CLAIM = "promotion.", "promoting."  # what the keys of tags begin with
MAX_WHY = 1000  # characters: MLflow's databases keep 5000 of a tag
PATIENCE_SECONDS = 60.0  # after which a claim that did not move is taken for that of a killed process
PAUSE_SECONDS = (0.1, 0.6)  # between two looks; drawn, so that two who saw each other do not meet again


@dataclass(frozen=True)
class Entry:
    """One change of the champion."""

    key: str  # tells it from all others, of other registries too
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
    before: int | None,
    after: int,
    why: str,
    forced: bool = False,
    metrics: dict[str, float] | None = None,
    gates: Sequence[str] = (),
) -> Entry:
    """A new entry, by whoever runs this, now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    who = f"{user()}@{socket.gethostname()}"
    return Entry(secrets.token_hex(8), action, now, who, before, after, why, forced, metrics or {}, list(gates))


def entries(client: "MlflowClient", name: str) -> list[Entry]:
    """All entries of a registered model, oldest first."""
    tags = client.get_registered_model(name).tags
    return [Entry(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(ENTRY)]


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


def append(client: "MlflowClient", name: str, new: Entry, file: Path) -> None:
    """Adds an entry to the registered model, and to the file with all that the file lacks. For who has the turn."""
    number = 1 + max((int(key.removeprefix(ENTRY)) for key in _tags(client, name) if key.startswith(ENTRY)), default=0)
    client.set_registered_model_tag(name, f"{ENTRY}{number:06d}", new.line)
    file.parent.mkdir(parents=True, exist_ok=True)
    there = file.read_text(encoding="utf-8") if file.exists() else ""
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
        client.set_registered_model_tag(name, claim, f"{user()}@{socket.gethostname()}")
        try:
            if not (others := _claims(client, name) - {claim}):
                yield check
                return
        finally:
            client.delete_registered_model_tag(name, claim)
        for other in others:
            if time.monotonic() > deadlines.setdefault(other, time.monotonic() + PATIENCE_SECONDS):
                client.delete_registered_model_tag(name, other)  # its process was killed: a turn takes seconds
        time.sleep(random.uniform(*PAUSE_SECONDS))


def _claims(client: "MlflowClient", name: str) -> set[str]:
    return {key for key in _tags(client, name) if key.startswith(CLAIM)}


def _tags(client: "MlflowClient", name: str) -> dict[str, Any]:
    return dict(client.get_registered_model(name).tags)
