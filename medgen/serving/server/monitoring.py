"""Metrics in Prometheus' text format, and a log with one JSON object a line.

Neither contains anything of a request's content, which may identify a patient.
"""

import bisect
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds
REPEAT_SECONDS = 60.0  # in which a warning or error is logged once
MAX_MESSAGES = 1000  # that are remembered for it


class Metrics:
    """Counters of the server since its start."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self._buckets: dict[str, list[int]] = {}  # number of requests by path and bucket
        self._seconds: Counter[str] = Counter()  # by path
        self._totals: Counter[str] = Counter()

    def count(
        self, path: str, status: int, seconds: float, *, received_bytes: int, sent_bytes: int, images: int
    ) -> None:
        """Count one request; `status` is 0 for a client that left."""
        self._requests[path, status] += 1
        self._buckets.setdefault(path, [0] * (len(BUCKETS) + 1))[bisect.bisect_left(BUCKETS, seconds)] += 1
        self._seconds[path] += seconds  # type: ignore[assignment]  # Counter is typed for integers
        self._totals.update(received_bytes=received_bytes, sent_bytes=sent_bytes, images=images)

    def render(self, gauges: Mapping[str, float], totals: Mapping[str, float], model: str) -> str:
        """The text of /metrics, with values that others count."""
        lines = ["# TYPE medgen_model_info gauge", f"medgen_model_info{{uri={json.dumps(model)}}} 1"]
        lines.append("# TYPE medgen_requests_total counter")
        for (path, status), number in sorted(self._requests.items()):
            lines.append(f'medgen_requests_total{{path="{path}",status="{status}"}} {number}')
        lines.append("# TYPE medgen_request_seconds histogram")
        for path, numbers in sorted(self._buckets.items()):
            total = 0
            for bound, number in zip([*map(str, BUCKETS), "+Inf"], numbers, strict=True):
                total += number
                lines.append(f'medgen_request_seconds_bucket{{path="{path}",le="{bound}"}} {total}')
            lines.append(f'medgen_request_seconds_sum{{path="{path}"}} {self._seconds[path]:.6f}')
            lines.append(f'medgen_request_seconds_count{{path="{path}"}} {total}')
        for name, value in {**self._totals, **totals}.items():
            lines += [f"# TYPE medgen_{name}_total counter", f"medgen_{name}_total {value:g}"]
        for name, value in gauges.items():
            lines += [f"# TYPE medgen_{name} gauge", f"medgen_{name} {value:g}"]
        return "\n".join(lines) + "\n"


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object; `extra={"request": {…}}` gives further fields instead of a message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {"time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")}
        line["level"] = record.levelname
        line |= getattr(record, "request", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RepeatFilter(logging.Filter):
    """Drops a warning or error that was logged within the last minute, so that no client can fill the disk.

    The next one that passes says how many were dropped. asyncio, for example, logs a traceback for each connection that
    it cannot accept.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._logged: dict[tuple[str, str], float] = {}
        self._dropped: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the record is logged."""
        if record.levelno < logging.WARNING:
            return True
        key, now = (record.name, str(record.msg).partition("\n")[0]), self._clock()
        if now - self._logged.get(key, -REPEAT_SECONDS) < REPEAT_SECONDS:
            self._dropped[key] += 1
            return False
        if len(self._logged) >= MAX_MESSAGES:
            self._logged.clear()
        self._logged[key] = now
        if dropped := self._dropped.pop(key, 0):
            record.msg = f"{record.msg} ({dropped} more since the last such message)"
        return True
