"""Where servers listen: this machine alone, unless told otherwise."""

from __future__ import annotations

import ipaddress
import socket

from localrl.settings import UserError


def is_here(host: str) -> bool:
    """This machine and no other, by its name or number.

    >>> is_here("localhost"), is_here("127.0.0.1"), is_here("::1"), is_here("0.0.0.0"), is_here("example.org")
    (True, True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A socket at which nobody but this machine knocks, unless there is a key. UserError otherwise, and if the port is taken."""
    if key is not None and not key.strip():
        raise UserError("--api-key is empty: give a secret, or leave it away on 127.0.0.1")
    if not is_here(host) and key is None:
        raise UserError(
            f"--host {host} would let everyone who reaches this machine ask the model, and read what it says: add --api-key KEY, or leave --host away"
        )
    return open_socket(host, port)


def open_socket(host: str, port: int) -> socket.socket:
    """One that listens; port 0: any that is free. UserError if there is no such address, or the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise UserError(f"--host {host} is no address of a machine: 127.0.0.1 for this one alone, 0.0.0.0 for all its networks") from None
    except PermissionError:
        raise UserError(f"port {port} is reserved for the system: choose one above 1023 with --port, or 0 for a free one") from None
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port} ({error.strerror}): choose another with --port, or 0 for a free one") from None
