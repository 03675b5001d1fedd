"""The process: its socket, its token, and an end in which nothing that was begun is lost."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from ..errors import UserError
from .guard import HEAD, App

TOKEN = "RELREID_TOKEN"
"""Environment variable of the token."""
_SHORTEST = 16  # characters of a token
_GRACE = 30  # seconds that requests in work get when the service is stopped
_AT_ONCE = 256  # connections; more are answered 503


def is_loopback(host: str) -> bool:
    """Whether a name or an address stands for this machine alone.

    Raises:
        UserError: Nothing has that name.
    """
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        raise UserError(f"command line: --host '{host}' is no address of this machine.") from None
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def find_token(host: str, file: str | None) -> tuple[str, bool]:
    """Return the token that writes need, and whether it was made up just now.

    Args:
        host: The address that is listened to.
        file: A file with the token; None: the environment's, or a new one.

    Raises:
        UserError: A short token, or none where others than this machine can ask.
    """
    if file:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"command line: --token-file '{file}' cannot be read ({error}).") from None
    else:
        token = os.environ.get(TOKEN, "").strip()
    if token and len(token) < _SHORTEST:
        raise UserError(f"the token has {len(token)} characters; give it {_SHORTEST} or more.")
    if not token and (file or not is_loopback(host)):
        where = f"'{file}' is empty" if file else f"--host {host} lets other machines ask"
        raise UserError(f"command line: {where}; give a token by {TOKEN} or --token-file.")
    return (token, False) if token else (secrets.token_urlsafe(24), True)


def allowed_hosts(host: str, more: list[str]) -> frozenset[str]:
    """Return the names by which the service may be asked for; none: any, where it listens to all addresses."""
    own = {"localhost", "127.0.0.1", "::1", host.lower(), *map(str.lower, more)}
    everywhere = host in ("0.0.0.0", "::", "")
    return frozenset() if everywhere and not more else frozenset(own)


class _Server(uvicorn.Server):
    """A server that says when it is ready, and for which SIGTERM and SIGINT are ordinary ends.

    Args:
        config: Of uvicorn.
        ready: Called when it listens.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In the block the signals end the server; none is raised anew behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound.

    Raises:
        UserError: The address is taken, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise UserError(f"command line: cannot listen to {host}:{port} ({error.strerror}); choose another --port.") from None
    return made


def make_server(app: App, ready: Callable[[], None]) -> uvicorn.Server:
    """Return a server; its ``run(sockets=[…])`` ends by SIGTERM or SIGINT, when requests in work are finished.

    Args:
        app: The application.
        ready: Called when requests are answered.
    """
    options: dict[str, Any] = {
        "access_log": False,
        "log_config": None,
        "proxy_headers": False,  # else a client could name itself as it likes
        "server_header": False,
        "h11_max_incomplete_event_size": HEAD,
        "limit_concurrency": _AT_ONCE,
        "timeout_graceful_shutdown": _GRACE,
        "ws": "none",
        "http": "h11",
        "lifespan": "on",
    }
    return _Server(uvicorn.Config(app, **options), ready)


__all__ = ["TOKEN", "allowed_hosts", "find_token", "is_loopback", "listen", "make_server"]
