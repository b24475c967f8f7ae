"""Depth of JSON, without parsing it: parsers that recurse end the process on deep nesting."""

from __future__ import annotations

import re

from runtime.gateway.failures import GatewayError

__all__ = ["require_flat_json"]

_DEEPEST = 32
_MOST_BRACKETS = 1 << 18
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def require_flat_json(text: bytes) -> None:
    """Check that JSON is nested at most 32 deep; whether it is valid is for its parser to say.

    Raises:
        GatewayError: it is deeper, or has over 262,144 brackets.
    """
    brackets = _STRINGS.sub(b"", text).translate(None, _NO_BRACKETS)
    if len(brackets) > _MOST_BRACKETS:
        raise GatewayError(
            413, f"The JSON has {len(brackets)} brackets; the limit is {_MOST_BRACKETS}.", code="too_large"
        )
    depth = 0
    for bracket in brackets:
        depth += _STEP[bracket]
        if depth > _DEEPEST:
            raise GatewayError(400, f"The JSON is nested over {_DEEPEST} deep.", code="too_deep")
