"""What stands before the service: hosts, origins, sizes, slowness, rates, headers, the access log and the counters.

A request's body is read whole, within its limit and its time, before anything else sees it. What is refused is refused with
JSON, one sentence in ``detail``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import needed
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("relreid.serve")
_READS = 10  # requests that only read may come so many times as often
_DRAIN = 4  # a body that is refused is read up to so many times the limit, so that its sender hears why
_PATH = 200  # characters of a path in the log
HEAD = 16_384
"""Bytes of a request's line and headers."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Limits:
    """What a client may do.

    Attributes:
        body: Bytes of a request.
        seconds: For sending it.
        rate: Searches and writes of one client per minute; 0: any number. Ten times as many other requests.
    """

    body: int = 10_000_000
    seconds: float = 30.0
    rate: int = 600


class _Refused(Exception):
    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        self.status, self.sentence, self.headers = status, sentence, headers


class Guard:
    """An ASGI application before another one.

    Args:
        app: The other one.
        limits: What a client may do.
        metrics: Counts.
        hosts: Names by which the service may be asked for; none: any. A page of another site that has a name of its own
            point to this machine is refused by it.
    """

    def __init__(self, app: App, limits: Limits, metrics: Metrics, hosts: frozenset[str]) -> None:
        self._app, self._limits, self._metrics, self._hosts = app, limits, metrics, hosts
        self._rates: list[Any] = []
        if limits.rate:
            needed("limits", "the search service")
            from limits import RateLimitItemPerMinute
            from limits.storage import MemoryStorage
            from limits.strategies import SlidingWindowCounterRateLimiter

            self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
            self._rates = [RateLimitItemPerMinute(_READS * limits.rate), RateLimitItemPerMinute(limits.rate)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event; see the ASGI specification."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, sent = time.perf_counter(), {"status": 500, "bytes": 0}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                there = {name.lower() for name, _ in message.get("headers", [])}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in there]
                if b"cache-control" not in there:
                    more.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*message.get("headers", []), *more]}
            else:
                sent["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            try:
                headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
                self._check(scope, headers)
                body = await self._body(headers, receive)
            except _Refused as refusal:
                await _answer(counted, refusal)
                return
            await self._app(scope, _replayed(body, receive), counted)
        finally:
            self._note(scope, sent["status"], sent["bytes"], time.perf_counter() - started)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD:
            raise _Refused(431, f"the headers of a request may have {HEAD:,} bytes.")
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            raise _Refused(421, "this service does not go by that name; see --allow-host.")
        origin = headers.get("origin")
        if origin not in (None, "null") and urlsplit(origin).netloc != host or origin == "null":
            raise _Refused(403, "pages of other sites may not ask this service.")
        if self._rates:
            reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
            client = (scope.get("client") or ("",))[0]
            rate = self._rates[0 if reads else 1]
            if not self._limiter.hit(rate, client, str(reads)):
                wait = max(1, round(self._limiter.get_window_stats(rate, client, str(reads)).reset_time - time.time()))
                raise _Refused(429, f"too many requests; the limit is {rate.amount} a minute.", **{"retry-after": str(wait)})

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        size = headers.get("content-length", "0")
        named = int(size) if size.isascii() and size.isdigit() else 0
        too_large = _Refused(413, f"a request may have {self._limits.body:,} bytes.", connection="close")
        if named > _DRAIN * self._limits.body:
            raise too_large
        refused = named > self._limits.body
        parts: list[bytes] = []
        held, deadline = 0, time.monotonic() + self._limits.seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise _Refused(408, f"a request must arrive within {self._limits.seconds:g} seconds.") from None
            if message["type"] == "http.disconnect":
                raise _Refused(400, "the request ended early.")
            held += len(message.get("body", b""))
            if held > self._limits.body:
                refused, parts = True, []
            if refused and held > _DRAIN * self._limits.body:
                break
            if not refused:
                parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        if refused:
            raise too_large
        return b"".join(parts)

    def _note(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE") else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"").partition(b"?")[0].decode("latin-1")[:_PATH]
        path = "".join(sign if sign.isprintable() else "?" for sign in path)
        log.info('%s "%s %s" %d %d %.1fms', client, method, path, status, size, 1000 * seconds)


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    with contextlib.suppress(ValueError):
        return (urlsplit(f"//{host}").hostname or "").lower()
    return ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read, then what else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, refusal: _Refused) -> None:
    content = json.dumps({"detail": refusal.sentence}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    with contextlib.suppress(OSError):
        await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})


__all__ = ["HEAD", "HEADERS", "Guard", "Limits", "log"]
