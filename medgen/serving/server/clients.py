"""Identify the clients, and limit how much each may send.

A client is the name of its token or, on a server without tokens, its address. A proxy on this machine names its
clients' addresses in X-Forwarded-For, which uvicorn reads from the loopback address only. The loopback address itself
is not limited: a proxy without that header has limits of its own.
"""

import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers

from .responses import RequestError

MAX_CLIENTS = 4096  # whose rates are remembered; those that have been silent longest are forgotten
IPV6_NETWORK = 64  # bits of an IPv6 address: one host has all addresses of its network


@dataclass
class _Usage:
    """Usage of a client: the requests that it may still send at once, as of `seen`, and those in progress."""

    allowed: float
    seen: float
    num_running: int = 0


class Clients:
    """Tokens, rates and concurrent requests of the clients.

    Args:
        digests: SHA-256 of each client's token in hexadecimal digits, by name; without any, every client is accepted.
        per_second: requests per second and client in the long run.
        burst: requests that a client may send at once.
        concurrent: requests of a client that wait or are processed.
    """

    def __init__(
        self,
        digests: Mapping[str, str],
        per_second: float,
        burst: int,
        concurrent: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests, self._clock = digests, clock
        self._per_second, self._burst, self._concurrent = per_second, burst, concurrent
        self._usage: dict[str, _Usage] = {}  # the client seen last is the last one

    def identify(self, headers: Headers, address: str) -> str:
        """The name of the token in the headers, or the address.

        Raises:
            RequestError: the server has tokens, and the request has none of them.
        """
        if not self._digests:
            return address
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = [name for name, known in self._digests.items() if hmac.compare_digest(digest, known)]
        if scheme.lower() == "bearer" and found:
            return found[0]
        self._count(address)  # slows down guessing
        message = "authorization: expected the header `Authorization: Bearer TOKEN` with a token of this server"
        raise RequestError(401, "UNAUTHENTICATED", message, WWW_Authenticate="Bearer")

    @contextmanager
    def limit(self, client: str) -> Iterator[None]:
        """Count a request of a client as long as the block runs.

        Raises:
            RequestError: the client sends more than it may.
        """
        usage = self._count(client)
        if usage is None:
            yield
            return
        if usage.num_running >= self._concurrent:
            raise _too_many(f"{usage.num_running} requests of this client are in progress", 1.0)
        usage.num_running += 1
        try:
            yield
        finally:
            usage.num_running -= 1

    def _count(self, client: str) -> _Usage | None:
        """The usage of a client after one more request; None if it is not limited."""
        key = client if client in self._digests else _network(client)
        if key is None:
            return None
        now = self._clock()
        usage = self._usage.pop(key, None) or _Usage(self._burst, now)
        self._usage[key] = usage
        usage.allowed = min(self._burst, usage.allowed + (now - usage.seen) * self._per_second)
        usage.seen = now
        if len(self._usage) > MAX_CLIENTS:
            idle = (name for name, other in self._usage.items() if not other.num_running)
            self._usage.pop(next(idle, key))
        if usage.allowed < 1.0:
            raise _too_many("too many requests of this client", (1.0 - usage.allowed) / self._per_second)
        usage.allowed -= 1.0
        return usage


def is_loopback(host: str) -> bool:
    """True for localhost and the addresses of this machine's loopback interface."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(header: str | None) -> None:
    """Refuse a Host that is no name of the loopback interface.

    A page of the web can make its own name resolve to 127.0.0.1, and a browser would then let it read the answers (DNS
    rebinding); the Host is still that name.
    """
    if header is None:  # no browser leaves it out
        return
    name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    if not is_loopback(name):
        message = "host: this server is bound to the loopback address and answers only localhost and 127.0.0.1"
        raise RequestError(421, "BAD_REQUEST", message, Connection="close")


def _network(address: str) -> str | None:
    """The address, or the network of an IPv6 address; None for this machine."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return None
    return str(ipaddress.ip_network((ip, IPV6_NETWORK), strict=False)) if ip.version == 6 else str(ip)


def _too_many(reason: str, seconds: float) -> RequestError:
    return RequestError(
        429, "REQUEST_LIMIT_EXCEEDED", f"{reason}; send fewer", Retry_After=str(max(1, math.ceil(seconds)))
    )
