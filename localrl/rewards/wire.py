"""The bytes between a run and its reward workers: a length, then JSON. No pickle: what a worker says is data, never code."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

HEAD = 8
"""Bytes of the length in front of every message."""


def frame(message: Message) -> bytes:
    """One message as bytes. Raises TypeError where a value is not JSON.

    >>> frame({"call": 1})
    b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x0b{"call": 1}'
    """
    body = json.dumps(message).encode()
    return len(body).to_bytes(HEAD, "big") + body


def unframe(received: bytes | bytearray) -> Message | None:
    """The message that `received` holds; None while it is still incomplete.

    >>> unframe(frame({"call": 1})), unframe(frame({"call": 1})[:-1])
    ({'call': 1}, None)
    """
    if len(received) < HEAD:
        return None
    size = int.from_bytes(received[:HEAD], "big")
    if len(received) < HEAD + size:
        return None
    message: Message = json.loads(received[HEAD : HEAD + size])
    return message
