"""``GET /ping`` and ``POST /predict``, as immich's machine-learning service answers them.

Source:
    ``machine-learning`` and ``server`` of immich, release 3, read for the facts only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from runtime.errors import BabeltowerError, LanguageError
from runtime.gateway.embeddings import while_connected
from runtime.gateway.failures import GatewayError, error_of_failure
from runtime.gateway.forms import fields_of_form
from runtime.gateway.guard import body_of_request
from runtime.gateway.metrics import GatewayMetrics
from runtime.gateway.models import GatewayModel
from runtime.gateway.nesting import JsonStructure
from runtime.gateway.options import GatewayOptions
from runtime.gateway.other_tasks import OtherTasks
from runtime.logs import LOGGER
from runtime.manifest import Modality
from runtime.preprocessing.image import size_of_file
from runtime.preprocessing.languages import flores_from_code
from runtime.preprocessing.served_limits import SERVED_CHARACTERS

__all__ = ["ImmichRoutes"]

_CLIP = "clip"
_MODALITY_OF = {"textual": Modality.TEXT, "visual": Modality.IMAGE}
_OTHER_TASKS = ("facial-recognition", "ocr")
_LONGEST_ENTRIES, _MOST_VALUES = 1 << 16, 1 << 10
_LONGEST_LANGUAGE, _MOST_TOLD = 64, 256

_DEFAULT_LANGUAGE = "eng_Latn"
"""Language that immich's service takes for one that it does not know."""

_SPELLINGS = {"mfa": "zsm_Latn"}
"""Locales of immich's interface that are no language of FLORES-200, and the one that its service takes."""

_LANGUAGE_HEADER = "Babeltower-Language"


@dataclass(frozen=True, slots=True)
class _Query:
    """What is asked of a CLIP model."""

    model: str
    modality: Modality
    language: str | None


class ImmichRoutes:
    """Routes of immich's machine-learning service for the models behind the gateway.

    Args:
        models: Open models by name; filled when the application starts.
        others: Service that answers the other tasks; filled when the application starts, if there is one.
    """

    def __init__(
        self,
        models: Mapping[str, GatewayModel],
        options: GatewayOptions,
        metrics: GatewayMetrics,
        others: list[OtherTasks],
    ) -> None:
        self._models = models
        self._options = options
        self._metrics = metrics
        self._others = others
        self._told: set[tuple[str, str]] = set()

    async def root(self, _: Request) -> Response:
        """Answer ``GET /``."""
        return JSONResponse({"message": "babeltower"})

    async def ping(self, _: Request) -> Response:
        """Answer ``GET /ping``."""
        return PlainTextResponse("pong")

    async def predict(self, request: Request) -> Response:
        """Answer ``POST /predict``; the work ends when the sender leaves."""
        fields = fields_of_form(body_of_request(request), request.headers.get("content-type", ""))
        entries = _entries_of_field(fields.get("entries"))
        query = _query_of_entries(entries)
        rest = {task: types for task, types in entries.items() if task != _CLIP}
        self._require_others(rest)
        image, text = fields.get("image"), _text_of_field(fields.get("text"))
        if image is None and text is None:
            raise GatewayError(400, "Either image or text must be provided.", code="invalid_input")
        answer: dict[str, Any] = {}
        headers: dict[str, str] = {}
        if query is not None:
            answer, headers = await while_connected(request, self._answered(query, image, text))
        if rest:
            answer = {**await while_connected(request, self._others[0].answered(rest, image, text)), **answer}
        return JSONResponse(answer, headers=headers)

    def _require_others(self, rest: Mapping[str, Any]) -> None:
        """Check that tasks of other models are answered somewhere.

        Raises:
            GatewayError: they are not.
        """
        if not rest or self._others:
            return
        tasks = ", ".join(sorted(rest))
        if any(task not in _OTHER_TASKS for task in rest):
            raise _invalid(f"unknown task among {tasks}; expected {_CLIP}")
        raise GatewayError(
            501,
            f"{tasks}: this service has models of the task {_CLIP} only. Start it with --other-tasks-url and "
            "the address of immich's own machine-learning service.",
            code="task_not_served",
        )

    async def _answered(
        self, query: _Query, image: bytes | None, text: str | None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the answer's fields, and headers that say what was taken for something else."""
        model = self._model(query.model)
        headers: dict[str, str] = {}
        answer: dict[str, Any] = {}
        try:
            if query.modality is Modality.IMAGE:
                if image is None:
                    raise GatewayError(400, "A visual model needs an image.", code="invalid_input")
                size = asyncio.to_thread(size_of_file, image, name=f"of {len(image)} bytes")
                answer["imageWidth"], answer["imageHeight"] = await size
                vectors = await model.images([(0, image)], model.dims[-1])
            else:
                if text is None or image is not None:
                    raise GatewayError(
                        400, "A textual model needs a text, and no image.", code="invalid_input"
                    )
                vectors, language = await self._text_vectors(model, text, query.language)
                headers = {} if language is None else {_LANGUAGE_HEADER: language}
        except BabeltowerError as error:
            raise error_of_failure(error) from error
        n_texts = int(query.modality is Modality.TEXT)
        self._metrics.count_inputs(model.name, n_texts=n_texts, n_images=1 - n_texts)
        return {_CLIP: _serialised(vectors[0]), **answer}, headers

    async def _text_vectors(
        self, model: GatewayModel, text: str, language: str | None
    ) -> tuple[NDArray[np.float32], str | None]:
        """Embed a text: float32 (1, dim), and the language that was taken, if it is not the given one.

        A language that is missing, unknown or not the tower's is English, as in immich's service, or
        ``default_language``; a tower without language tokens needs none.

        Raises:
            LanguageError: the tower has neither.
        """
        given = None if language is None else _flores(language)
        failure: LanguageError | None = None
        candidates = [given] if given is not None else []
        for code in (*candidates, self._options.default_language or _DEFAULT_LANGUAGE, None):
            try:
                vectors = await model.texts([(0, text, code)], model.dims[-1])
            except LanguageError as error:
                failure = failure or error
                continue
            if code == given or code is None:
                return vectors, None
            if language is not None:
                self._tell(model.name, language, code)
            return vectors, code
        assert failure is not None
        raise failure

    def _tell(self, model: str, language: str, taken: str) -> None:
        """Log once that a language was taken for another one."""
        if (model, language) not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add((model, language))
            LOGGER.warning("%s has no language %r; its texts are taken for %s", model, language, taken)

    def _model(self, name: str) -> GatewayModel:
        found = self._options.immich_names.get(name, name)
        if found not in self._models:
            known = sorted({*self._models, *self._options.immich_names})
            raise GatewayError(
                404,
                f"There is no model {name!r}; expected one of {known}. To answer for it by another model, "
                f"start `babeltower serve` with --immich-name {name}=MODEL.",
                code="model_not_found",
            )
        return self._models[found]


def _entries_of_field(field: bytes | None) -> dict[str, dict[str, Any]]:
    """Return task → type → entry, each a dictionary.

    Raises:
        GatewayError: the field is missing, too long or no such JSON, or names no task.
    """
    if field is None:
        raise _invalid("the field entries is missing")
    if len(field) > _LONGEST_ENTRIES:
        raise GatewayError(413, f"The entries exceed {_LONGEST_ENTRIES} bytes.", code="too_large")
    JsonStructure(_MOST_VALUES).add(field)
    try:
        entries = from_json(field)
    except ValueError as error:
        raise _invalid(f"entries is no JSON: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(types, dict) for types in entries.values()):
        raise _invalid("entries is not {task: {type: {modelName, options}}}")
    if not any(entries.values()):
        raise GatewayError(422, "No model task requested.", code="invalid_request")
    return {task: types for task, types in entries.items() if types}


def _query_of_entries(entries: Mapping[str, Mapping[str, Any]]) -> _Query | None:
    """Return what is asked of a CLIP model, if anything.

    Raises:
        GatewayError: it is not valid, or of both kinds at once.
    """
    types = entries.get(_CLIP)
    if types is None:
        return None
    if len(types) > 1:
        raise _invalid(f"{_CLIP} has {sorted(types)}; expected textual or visual")
    ((kind, entry),) = types.items()
    if kind not in _MODALITY_OF:
        raise _invalid(f"{_CLIP} has the type {kind!r}; expected textual or visual")
    name = entry.get("modelName") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise _invalid(f"the entry of {_CLIP} {kind} has no modelName")
    options = entry.get("options")
    if options is not None and not isinstance(options, dict):
        raise _invalid("options is no object")
    language = (options or {}).get("language")
    if language is not None and (not isinstance(language, str) or len(language) > _LONGEST_LANGUAGE):
        raise _invalid("options.language is no language code")
    return _Query(name, _MODALITY_OF[kind], language or None)


def _flores(language: str) -> str | None:
    try:
        return flores_from_code(_SPELLINGS.get(language, language))
    except LanguageError:
        return None


def _text_of_field(field: bytes | None) -> str | None:
    if field is None:
        return None
    try:
        text = field.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"the text is not UTF-8 at byte {error.start}") from None
    if len(text) > SERVED_CHARACTERS:
        raise GatewayError(
            400,
            f"The text has {len(text)} characters; the limit is {SERVED_CHARACTERS}. Shorten it first.",
            code="invalid_input",
        )
    return text


def _serialised(vector: NDArray[np.float32]) -> str:
    """Write a vector as JSON, which immich hands to its database; the numbers read back equal."""
    return f"[{','.join(map(str, vector))}]"


def _invalid(reason: str) -> GatewayError:
    return GatewayError(422, f"Invalid request format: {reason}.", code="invalid_request")
