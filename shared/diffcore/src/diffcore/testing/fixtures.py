"""Fixtures for every test of the workspace: one thread, no network. A pytest plugin, light to import."""

import ipaddress
import socket
import sys
from typing import Any

import pytest


class NetworkRefusedError(RuntimeError):
    """A test tried to reach beyond this machine."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # Unix sockets have a path, netlink and friends never leave the machine
        return True
    host = address[0]
    if host in ("", "localhost", None, b"localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return host == socket.gethostname()  # gloo asks for the machine's own name


def _refuse(what: str, address: Any) -> None:
    if not _is_local(address):
        raise NetworkRefusedError(f"{what} {address!r}: tests stay on this machine")


@pytest.fixture(autouse=True, scope="session")
def no_network(request: pytest.FixtureRequest) -> None:
    """Restricts sockets to the loopback and Unix sockets; name look-ups of other hosts fail."""
    # No `yield` in fixtures of this package: the run-time type checks wrap every function, pytest then does not see
    # a generator and would never run its body.
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)  # noqa: PT021

    def guard(name: str) -> None:
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, *args: Any) -> Any:
            _refuse(name, args[-1])  # the address comes last, in sendto after data and flags
            return original(self, *args)

        patch.setattr(socket.socket, name, guarded)

    for name in ("connect", "connect_ex", "sendto"):
        guard(name)
    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **options: Any) -> Any:
        _refuse("getaddrinfo", (host,))
        return look_up(host, *args, **options)

    patch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keeps torch on one thread, once a test has imported it; never imports it itself."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
