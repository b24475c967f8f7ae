"""Description of a served model, and its check against the requested one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import EngineError, ServerError
from runtime.fingerprints import remark_on_vectors
from runtime.manifest import Engine, Modality, Precision, front_end_name
from runtime.remote.transport import ServedModelConfig, Transport

__all__ = ["FrontEndsDifferError", "ServedModel", "require_served_model", "served_model_from_transport"]


class FrontEndsDifferError(ServerError):
    """The front ends of a model are of different releases: a rollout switches them, or was killed there."""


@dataclass(frozen=True, slots=True)
class MostText:
    """Limits of texts that a server accepts; ``None`` where it does not say.

    Attributes:
        characters: Maximum characters of a text.
        n_bytes: Maximum UTF-8 bytes of a text.
        request_characters: Maximum characters of all texts of a request.
    """

    characters: int | None = None
    n_bytes: int | None = None
    request_characters: int | None = None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> MostText:
        """Read the limits of a front end's configuration."""
        names = ("max_characters", "max_bytes", "max_request_characters")
        found = [parameters.get(f"babeltower_{name}", "") for name in names]
        return cls(*(int(value) if value.isdecimal() else None for value in found))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model on a server, as described by both of its front ends.

    ``max_batch_sizes`` are maximum rows per request, ``most_text`` the limits of texts.
    """

    name: str
    fingerprint: str
    variant: str
    precision: str
    engine: str
    dims: tuple[int, ...]
    max_batch_sizes: Mapping[Modality, int]
    most_text: MostText = MostText()


async def served_model_from_transport(transport: Transport, name: str) -> ServedModel:
    """Read the configurations of both front ends.

    Raises:
        FailedRequestError: there is no answer, or no such model.
        FrontEndsDifferError: the front ends are from different releases.
        ServerError: they are not babeltower's.
    """
    text, image = await asyncio.gather(
        *(transport.config(front_end_name(name, modality)) for modality in Modality)
    )
    found = _served(name, text, Modality.TEXT), _served(name, image, Modality.IMAGE)
    if found[0] != found[1]:
        raise FrontEndsDifferError(
            f"The front ends of {name} disagree: texts are in {_description(found[0])}, images in "
            f"{_description(found[1])}. Their vectors are not comparable: finish or undo the rollout."
        )
    sizes = {Modality.TEXT: max(1, text.max_batch_size), Modality.IMAGE: max(1, image.max_batch_size)}
    most_text = MostText.from_parameters(text.parameters)
    return ServedModel(name, *found[0], max_batch_sizes=sizes, most_text=most_text)


_Facts = tuple[str, str, str, str, tuple[int, ...]]


def _served(name: str, config: ServedModelConfig, modality: Modality) -> _Facts:
    model = front_end_name(name, modality)
    facts = {}
    for fact in ("name", "fingerprint", "variant", "precision", "engine", "dim", "dims"):
        key = f"babeltower_{fact}"
        if key not in config.parameters:
            raise ServerError(
                f"{model} has no parameter {key}, so it is not a front end of this babeltower. Its "
                "repository was written by an older version, or by hand; export the checkpoint again."
            )
        facts[fact] = config.parameters[key]
    if config.outputs.get("vector") != "TYPE_FP32":
        raise ServerError(f"{model} has outputs {dict(config.outputs)}; expected 'vector' of TYPE_FP32.")
    if facts["name"] != name:
        raise ServerError(f"{model} belongs to {facts['name']!r}; expected {name!r}.")
    dims = _dims(facts["dims"], facts["dim"], model)
    return facts["fingerprint"], facts["variant"], facts["precision"], facts["engine"], dims


def _dims(text: str, dim: str, model: str) -> tuple[int, ...]:
    try:
        dims = {int(width) for width in text.split(",")} | {int(dim)}
    except ValueError:
        raise ServerError(f"{model} has widths {text!r} and {dim!r}; expected integers.") from None
    if max(dims) != int(dim) or min(dims) < 1:
        raise ServerError(f"{model} has full width {dim} among {sorted(dims)}; expected the largest.")
    return tuple(sorted(dims))


def require_served_model(
    served: ServedModel, *, engine: Engine | None, precision: Precision | None, fingerprint: str | None
) -> None:
    """Check that the served model is the requested one; arguments that are ``None`` are not checked.

    Raises:
        EngineError: the server runs another engine or precision.
        ServerError: the server serves another embedding space.
    """
    asked = {
        "engine": (engine and engine.value, served.engine),
        "precision": (precision and precision.value, served.precision),
    }
    for what, (wanted, found) in asked.items():
        if wanted is not None and wanted != found:
            raise EngineError(
                f"{what} {wanted!r} was requested; the server runs {served.name} in {served.precision} on "
                f"{served.engine}. Leave {what} out to use the served one, or serve another variant."
            )
    if fingerprint is not None and fingerprint != served.fingerprint:
        raise ServerError(
            f"The server's {served.name} embeds into space {served.fingerprint!r}; expected "
            f"{fingerprint!r}. Their vectors are not comparable: serve the other release, or embed "
            f"everything again.{remark_on_vectors(fingerprint, served.fingerprint)}"
        )


def _description(facts: _Facts) -> str:
    fingerprint, variant, _, engine, dims = facts
    return f"space {fingerprint!r} ({variant} on {engine}, widths {list(dims)})"
