"""Structure of JSON while it arrives: parsers end on deep nesting, and many values fill memory."""

from __future__ import annotations

from runtime.gateway.failures import GatewayError

__all__ = ["JsonStructure"]

_DEEPEST = 32
_MOST_WIDE_BYTES = 8 << 20
_VALUE_BYTES = 128
_WIDTH = 4
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonStructure:
    """Structure of JSON of which parts have arrived; whether it is valid is for its parser to say.

    As far as a parser gets, values are counted right: commas and brackets of texts are none. No regular
    expression looks at the text, since those backtrack.

    Args:
        max_values: Maximum commas, colons and brackets outside of texts.
    """

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._n_values = self._n_quotes = 0
        self._depth = 0
        self._wide_bytes = 0
        self._is_in_string = False
        self._string_bytes = 0
        self._is_wide = False
        self._rest = b""

    @property
    def memory_bytes(self) -> int:
        """Memory that a parser takes for the values, and for texts that are not ASCII, beyond the body's."""
        return _VALUE_BYTES * self._n_values + _WIDTH * self._wide_bytes

    def add(self, part: bytes) -> None:
        """Count the next part.

        Raises:
            GatewayError: the JSON is nested over 32 deep, has too many values, or over 8 MiB of texts that
                are not ASCII: one such character makes a string of Python four times as large.
        """
        plain = self._without_escapes(part)
        pieces = plain.split(b'"')
        outside, inside = (1, 0) if self._is_in_string else (0, 1)
        self._n_quotes += len(pieces) - 1
        self._count_structure(b"".join(pieces[outside::2]))
        self._count_texts(pieces[inside::2], begins_inside=self._is_in_string)
        self._is_in_string = self._is_in_string == (len(pieces) % 2 == 1)
        if not self._is_in_string:
            self._string_bytes, self._is_wide = 0, False

    def _without_escapes(self, part: bytes) -> bytes:
        """Drop escaped backslashes and quotes: then, each quote begins or ends a text."""
        text = self._rest + part if self._rest else part
        self._rest = b""
        if b"\\" not in text:
            return text
        text = text.replace(b"\\\\", b"")
        if text.endswith(b"\\"):
            text, self._rest = text[:-1], b"\\"
        return text.replace(b'\\"', b"")

    def _count_structure(self, text: bytes) -> None:
        brackets = text.translate(None, _NO_BRACKETS)
        self._n_values += text.count(b",") + text.count(b":") + len(brackets)
        if self._n_values > self._max_values or self._n_quotes // 2 > self._max_values:
            raise GatewayError(
                413,
                f"The JSON has over {self._max_values} values, commas and brackets. Send fewer inputs in a "
                "request, or large tensors in KServe's binary format.",
                code="too_large",
            )
        for bracket in brackets:
            self._depth += _STEP[bracket]
            if self._depth > _DEEPEST:
                raise GatewayError(400, f"The JSON is nested over {_DEEPEST} deep.", code="too_deep")

    def _count_texts(self, pieces: list[bytes], *, begins_inside: bool) -> None:
        """Count bytes of texts that are not ASCII; the first and the last may be parts of longer ones."""
        for i, piece in enumerate(pieces):
            if i > 0 or not begins_inside:
                self._string_bytes, self._is_wide = 0, False
            if not self._is_wide and not _is_ascii(piece):
                self._is_wide = True
                self._wide_bytes += self._string_bytes
            self._string_bytes += len(piece)
            if self._is_wide:
                self._wide_bytes += len(piece)
        if self._wide_bytes > _MOST_WIDE_BYTES:
            raise GatewayError(
                413,
                f"The JSON has over {_MOST_WIDE_BYTES} bytes of texts that are not ASCII. Send fewer of them "
                "in a request.",
                code="too_large",
            )


def _is_ascii(text: bytes) -> bool:
    """Whether a text has ASCII only; a lone byte, which images lack, is found much faster than two."""
    return text.isascii() and (b"\\" not in text or b"\\u" not in text)
