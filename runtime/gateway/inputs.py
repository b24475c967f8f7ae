"""Body of ``POST /v1/embeddings``: OpenAI's fields, and the extensions for languages and images."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import from_json

from runtime.gateway.failures import GatewayError
from runtime.gateway.options import GatewayOptions
from runtime.preprocessing.served_limits import SERVED_CHARACTERS

__all__ = ["EmbeddingInputs", "EmbeddingRequest", "inputs_of_request", "request_from_body"]

_LONGEST_LANGUAGE = 256
_IMAGE_START = re.compile(r"data:\s*image/", re.IGNORECASE)
_DATA_URL = re.compile(
    r"data:(?P<type>[a-z][\w!#$&^.+-]*/[\w!#$&^.+-]+)?(?P<parameters>(?:;[^;,]*)*),", re.IGNORECASE
)
"""Start of a data URL, as RFC 2397 has it; ``Data: 3/4, a text`` is none."""

_OTHER_URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_BLANKS = "".join(map(chr, range(33))) + "\u00a0\u200b\ufeff"
"""What URLs may begin with, and what comes with copied ones."""

_LONGEST_URL_START = 1_024

_TEXT_OR_IMAGE = {
    "anyOf": [
        {"type": "string", "description": "A text; or an image as a data URL (data:image/png;base64,...)"},
        {
            "type": "object",
            "properties": {"text": {"type": "string"}, "language": {"type": ["string", "null"]}},
            "required": ["text"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"image": {"type": "string", "description": "A data URL, or bare base64"}},
            "required": ["image"],
            "additionalProperties": False,
        },
    ]
}
_INPUT_SCHEMA = {
    "anyOf": [*_TEXT_OR_IMAGE["anyOf"], {"type": "array", "items": _TEXT_OR_IMAGE, "minItems": 1}]
}
_LANGUAGE_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": ["string", "null"]}},
        {"type": "null"},
    ],
    "description": "Language of the texts, FLORES-200 or BCP-47: one for all, or one for each input",
}


class EmbeddingRequest(BaseModel):
    """Request for embeddings; ``language`` and ``modality`` are not OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    language: Annotated[Any, WithJsonSchema(_LANGUAGE_SCHEMA)] = None
    modality: Literal["text", "image"] | None = Field(
        default=None,
        description="text: take every string as a text; image: as a data URL or bare base64. By default, "
        "strings that start with data:image/ are images.",
    )


@dataclass(frozen=True, slots=True)
class EmbeddingInputs:
    """Texts and images of a request, each with its position in ``input``."""

    n_inputs: int
    texts: tuple[tuple[int, str, str | None], ...]
    images: tuple[tuple[int, bytes], ...]


def request_from_body(body: bytes) -> EmbeddingRequest:
    """Parse a request.

    Raises:
        GatewayError: the body is no JSON, or a field is missing, unknown or of a wrong type.
    """
    try:
        fields = from_json(body)  # validating JSON in one step would copy its texts once more
    except ValueError as error:
        raise GatewayError(400, f"Invalid JSON: {error}.", code="invalid_request") from None
    del body  # its texts and images are in memory a second time
    if not isinstance(fields, dict):
        raise GatewayError(400, "Invalid JSON: expected an object.", code="invalid_request")
    try:
        return EmbeddingRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        where = f"{param}: " if param else ""
        raise GatewayError(400, f"{where}{first['msg']}.", param=param, code="invalid_request") from None


def inputs_of_request(request: EmbeddingRequest, options: GatewayOptions) -> EmbeddingInputs:
    """Return the texts and images of a request.

    Raises:
        GatewayError: an input is of another kind, empty or too long, or languages do not fit the inputs.
    """
    given = request.input
    items: list[Any] = given if isinstance(given, list) else [given]
    if not items:
        raise _wrong("input is empty; expected a text, an image, or a list of them.")
    if len(items) > options.max_inputs:
        raise _wrong(f"input has {len(items)} inputs; the limit is {options.max_inputs}.")
    languages = _languages(request.language, len(items))
    texts: list[tuple[int, str, str | None]] = []
    images: list[tuple[int, bytes]] = []
    for i, item in enumerate(items):
        text, image, language = _parts(item, i, request.modality)
        if image is not None:
            images.append((i, _bytes_of_image(image, i, options.max_file_bytes)))
        else:
            language = language or languages[i] or options.default_language
            if language is not None and len(language) > _LONGEST_LANGUAGE:
                raise _wrong(f"The language of input {i} has {len(language)} characters.", "language")
            texts.append((i, _checked(text, i), language))
    if (n_characters := sum(len(text) for _, text, _ in texts)) > options.max_characters:
        raise _wrong(
            f"The {len(texts)} texts of the request have {n_characters} characters; the limit is "
            f"{options.max_characters}. Send fewer texts in a request."
        )
    return EmbeddingInputs(len(items), tuple(texts), tuple(images))


def _parts(item: Any, i: int, modality: str | None) -> tuple[str, str | None, str | None]:
    """Return an input's text, image and own language."""
    if isinstance(item, str):
        is_image = _is_image(item, i) if modality is None else modality == "image"
        return ("", item, None) if is_image else (item, None, None)
    if isinstance(item, dict):
        known = {"image"} if "image" in item else {"text", "language"}
        values = [value for key, value in item.items() if key != "language" or value is not None]
        if (
            item.keys() <= known
            and item.keys() & {"text", "image"}
            and all(isinstance(v, str) for v in values)
        ):
            return item.get("text", ""), item.get("image"), item.get("language")
        raise _wrong(
            f"input {i} is an object with {sorted(map(str, item))}; expected "
            '{"text": "...", "language": "..."} or {"image": "..."}.'
        )
    if isinstance(item, (int, list)) and not isinstance(item, bool):
        raise _wrong(
            f"input {i} is a list of token ids; expected a text. Switch off tokenizing in the client "
            "(LangChain: check_embedding_ctx_length=False)."
        )
    raise _wrong(f"input {i} is of type {type(item).__name__}; expected a text or an image.")


def _is_image(item: str, i: int) -> bool:
    """Whether a string is an image, by its start.

    Raises:
        GatewayError: it is a data URL of something else.
    """
    start = _start(item)
    if _IMAGE_START.match(start):
        return True
    if _DATA_URL.match(start):
        raise _wrong(
            f"input {i} is a data URL, but not of an image; expected data:image/...;base64,... To embed it "
            'as a text, pass "modality": "text".'
        )
    return False


def _start(text: str) -> str:
    return text[:_LONGEST_URL_START].lstrip(_BLANKS)


def _checked(text: str, i: int) -> str:
    if not text.strip():
        raise _wrong(f"input {i} is an empty text.")
    if len(text) > SERVED_CHARACTERS:
        raise _wrong(
            f"input {i} has {len(text)} characters; the limit is {SERVED_CHARACTERS}. Shorten it first."
        )
    return text


def _bytes_of_image(text: str, i: int, max_bytes: int) -> bytes:
    start = _start(text)
    url = _DATA_URL.match(start)
    if url is None and _OTHER_URL.match(start):
        if start[:5].lower() == "data:":
            raise _wrong(f"input {i} is no data URL of an image; expected data:image/...;base64,...")
        raise _wrong(
            f"input {i} is the URL of an image, which is not fetched. Send the image: data:image/..."
        )
    begins = text.index(start) if start else 0
    if url is not None:
        if not (url["type"] or "").lower().startswith("image/"):
            raise _wrong(f"input {i} is no data URL of an image; expected data:image/...;base64,...")
        if url["parameters"].rpartition(";")[2].strip().lower() != "base64":
            raise _wrong(f"input {i} is no data URL in base64; expected data:image/...;base64,...")
        begins += url.end()
    n_bytes = (len(text) - begins) // 4 * 3
    if n_bytes > max_bytes + 2:
        raise _wrong(f"input {i} is an image of {n_bytes} bytes; the limit is {max_bytes}. Shrink it first.")
    try:
        return base64.b64decode(text[begins:] if begins else text, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(f"input {i} is an image that is not valid base64.") from None


def _languages(given: Any, n_inputs: int) -> Sequence[str | None]:
    if given is None or isinstance(given, str):
        return [given] * n_inputs
    if not isinstance(given, list) or not all(code is None or isinstance(code, str) for code in given):
        raise _wrong("language is neither a code, such as por_Latn, nor a list of codes.", "language")
    if len(given) != n_inputs:
        raise _wrong(f"language has {len(given)} codes for {n_inputs} inputs; pass one for each.", "language")
    return given


def _wrong(message: str, param: str = "input") -> GatewayError:
    return GatewayError(400, message, param=param, code="invalid_input")
