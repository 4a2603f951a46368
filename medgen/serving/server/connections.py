"""Connections of the server: a limit for all together, a time limit for idle ones, and an orderly end."""

import asyncio
import logging
import resource
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import App

IDLE_SECONDS = 10.0  # after which a connection without a request is closed
GRACE_SECONDS = 1.0  # for requests on their way when the server stops, on connections that are open already
STOP_SECONDS = 10  # for responses in progress when a signal stops the server
DRAIN_SECONDS = (
    150  # for responses in progress when another process takes over: more than the limits in app.py add up to
)
MAX_CONNECTIONS = 512
QUEUED_CONNECTIONS = 1024  # that the system holds until the server accepts them
ACCEPTED_AT_ONCE = 64
LOG = logging.getLogger("medgen.serving.app")


def max_connections() -> int:
    """Number of connections that leaves half of the process's file descriptors free."""
    return max(1, min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


class Protocol(H11Protocol):
    """HTTP protocol that closes idle connections, also those that keep sending a rejected body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close one of too many connections, and start the check for idle ones."""
        super().connection_made(transport)
        app: App = self.config.app  # type: ignore[assignment]
        app.open_connections[self] = None
        if len(app.open_connections) > app.limits.connections:
            # The one that has been idle longest, so that idle connections keep nobody out; or else the new one.
            surplus: Protocol = next(one for one in app.open_connections if one is self or one.is_idle())
            surplus.transport.abort()
            app.open_connections.pop(surplus)
            app.num_surplus += 1
            LOG.warning("more than %d connections: the one that was idle longest is closed", app.limits.connections)
        self.loop.call_later(GRACE_SECONDS if app.is_draining else IDLE_SECONDS, self._close_if_idle, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        app: App = self.config.app  # type: ignore[assignment]
        app.open_connections.pop(self, None)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End the connection after its request, which may be on its way: its client has seen the connection open."""
        if self.is_idle():
            self.loop.call_later(GRACE_SECONDS, self._close_if_idle, self.cycle)
        else:
            super().shutdown()

    def is_idle(self) -> bool:
        """True if no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def _close_if_idle(self, earlier_cycle: object) -> None:
        if self.transport.is_closing():
            return
        if self.is_idle() and self.cycle is earlier_cycle:  # no request has begun since the last check
            self.transport.close()
        else:
            self.loop.call_later(IDLE_SECONDS, self._close_if_idle, self.cycle)


class Server(uvicorn.Server):
    """A uvicorn server of an app, which also ends when the other end of a pipe is closed.

    Args:
        parent: file descriptor of the pipe: its end means that the process that started this one serves by another
            process, or is gone. The requests in progress are then answered, however long they take.
    """

    def __init__(self, app: App, parent: int | None = None) -> None:
        self.app, self._parent = app, parent
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            headers=[("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")],
            # asyncio accepts so many connections before it calls the first one's `connection_made`
            backlog=min(ACCEPTED_AT_ONCE, max(1, app.limits.connections // 4)),
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and watch the pipe."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED_CONNECTIONS)
        if self._parent is not None:
            asyncio.get_running_loop().add_reader(self._parent, self._drain, self._parent)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and wait for the responses in progress."""
        self.app.is_draining = True
        await super().shutdown(sockets)

    def _drain(self, parent: int) -> None:
        asyncio.get_running_loop().remove_reader(parent)
        self.config.timeout_graceful_shutdown = DRAIN_SECONDS
        self.should_exit = True
