"""Structure of JSON, without parsing it: parsers end on deep nesting, and many values fill memory."""

from __future__ import annotations

import asyncio

from runtime.gateway.failures import GatewayError

__all__ = ["require_flat", "require_flat_json"]

_DEEPEST = 32
_MOST_BRACKETS = _MOST_STRINGS = 1 << 18
_MOST_VALUES = 1 << 20
_LONG = 1 << 16
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def require_flat(text: bytes) -> None:
    """Check JSON as ``require_flat_json`` does, a long one on a thread."""
    if len(text) < _LONG:
        require_flat_json(text)
    else:
        await asyncio.get_running_loop().run_in_executor(None, require_flat_json, text)


def require_flat_json(text: bytes) -> None:
    """Check that JSON is nested at most 32 deep and bounded; whether it is valid is for its parser to say.

    Raises:
        GatewayError: it is deeper, or has over 262,144 brackets or strings, or 1,048,576 values.
    """
    # Without escapes, each quote begins or ends a string. No regular expression: those backtrack.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text
    if plain.count(b'"') > 2 * _MOST_STRINGS:
        raise _too_many("strings", _MOST_STRINGS)
    outside = b"".join(plain.split(b'"')[::2])
    if outside.count(b",") > _MOST_VALUES:
        raise _too_many("values", _MOST_VALUES)
    brackets = outside.translate(None, _NO_BRACKETS)
    if len(brackets) > _MOST_BRACKETS:
        raise _too_many("brackets", _MOST_BRACKETS)
    depth = 0
    for bracket in brackets:
        depth += _STEP[bracket]
        if depth > _DEEPEST:
            raise GatewayError(400, f"The JSON is nested over {_DEEPEST} deep.", code="too_deep")


def _too_many(what: str, most: int) -> GatewayError:
    return GatewayError(
        413,
        f"The JSON has over {most} {what}. Send fewer inputs in a request, or large tensors in binary.",
        code="too_large",
    )
