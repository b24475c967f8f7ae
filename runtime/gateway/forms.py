"""Bodies of ``multipart/form-data`` (RFC 7578), whole in memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from runtime.gateway.failures import GatewayError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

__all__ = ["fields_of_form"]

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # every client could write its warnings

_MOST_FIELDS = 8
_LONGEST_BOUNDARY = 256
"""RFC 2046 allows 70 characters."""


def fields_of_form(body: bytes, content_type: str) -> dict[str, bytes]:
    """Return the content of each field by its name, files too.

    Raises:
        GatewayError: the body is no form, is cut, has too many fields or one twice.
    """
    kind, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= _LONGEST_BOUNDARY or not body:
        raise _invalid("the body is no multipart/form-data with a boundary")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks(), max_size=len(body))
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _invalid(f"the form cannot be read: {error}") from None
    if not reader.is_complete:
        raise _invalid("the form is cut: its last boundary is missing")
    return reader.fields


class _Reader:
    """Fields of a form, gathered from the parser's callbacks."""

    def __init__(self) -> None:
        self.fields: dict[str, bytes] = {}
        self.is_complete = False
        self._parts: list[bytes] = []
        self._header: list[bytes] = [b"", b""]
        self._disposition = b""

    def callbacks(self) -> MultipartCallbacks:
        """Return the callbacks by the parser's names for them."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self._parts.append(data[start:end]),
            "on_part_end": self._end,
            "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_end": self._complete,
        }

    def _begin(self) -> None:
        self._parts, self._disposition = [], b""

    def _add(self, which: int, text: bytes) -> None:
        self._header[which] += text

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [b"", b""]

    def _end(self) -> None:
        kind, parameters = parse_options_header(self._disposition)
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise _invalid("a part has no name: Content-Disposition: form-data; name=...")
        if name in self.fields:
            raise _invalid(f"the field {name!r} is there twice")
        if len(self.fields) == _MOST_FIELDS:
            raise _invalid(f"the form has more than {_MOST_FIELDS} fields")
        self.fields[name] = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def _complete(self) -> None:
        self.is_complete = True


def _invalid(reason: str) -> GatewayError:
    return GatewayError(422, f"Invalid request format: {reason}.", code="invalid_request")
