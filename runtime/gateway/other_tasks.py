"""Tasks of immich that CLIP models do not answer, passed on to immich's own machine-learning service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from runtime.gateway.failures import GatewayError

__all__ = ["OtherTasks"]

_ANSWER_S = 300.0
_MOST_BYTES = 16 << 20
"""Bytes of an answer; a face is described in 10 kB."""

_LONGEST_DETAIL = 300


class OtherTasks:
    """Another service with immich's interface; open it on the event loop that serves."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/predict"
        self._http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_ANSWER_S), trust_env=False, auto_decompress=False
        )

    async def answered(
        self, entries: Mapping[str, Any], image: bytes | None, text: str | None
    ) -> dict[str, Any]:
        """Return the fields of the service's answer.

        Raises:
            GatewayError: it cannot be reached, refuses, or answers no JSON object; with its status.
        """
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("entries", json.dumps(entries, ensure_ascii=False))
        if image is not None:
            form.add_field("image", image, filename="blob", content_type="application/octet-stream")
        elif text is not None:
            form.add_field("text", text)
        try:
            async with self._http.post(self._url, data=form, allow_redirects=False) as answer:
                page = await _read(answer)
                status = answer.status
        except asyncio.TimeoutError:
            raise _failed(504, f"did not answer within {_ANSWER_S:.0f} s") from None
        except aiohttp.ClientError as error:
            raise _failed(502, f"cannot be reached: {error}") from None
        if status != 200:
            detail = page[:_LONGEST_DETAIL].decode("utf-8", "replace")
            raise _failed(status if status >= 400 else 502, f"answered {status}: {detail}")
        try:
            found = json.loads(page)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _failed(502, "answered no JSON object")
        return found

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    page = bytearray()
    async for part in answer.content.iter_any():
        page += part
        if len(page) > _MOST_BYTES:
            raise _failed(502, f"answered more than {_MOST_BYTES} bytes")
    return bytes(page)


def _failed(status: int, reason: str) -> GatewayError:
    return GatewayError(status, f"The service of the other tasks {reason}.", code="other_tasks_failed")
