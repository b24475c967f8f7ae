"""From a library's tokenizer to what the runtime needs: one JSON file and a few ids."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.weights.tensors import config_from_file, in_one_line
from runtime.errors import BabeltowerError, CheckpointError
from runtime.manifest import TextPreprocessing

__all__ = [
    "TOKENIZER_FILES",
    "complete_tokenizer",
    "has_tokenizer",
    "preprocessing_from_tokenizer",
    "tokenizer_errors",
    "tokenizer_json",
]

TOKENIZER_FILES = ("tokenizer.json", "sentencepiece.bpe.model")
_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of the families."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


@contextmanager
def complete_tokenizer(source: str, kind: str) -> Iterator[str]:
    """A tokenizer folder as transformers reads it: ``tokenizer_config.json`` must name a class.

    A folder that holds ``tokenizer.json`` alone is read as ``kind``, its family's; without that transformers
    takes a class from ``config.json`` that may need other files. Hub names pass as they are.
    """
    folder = Path(source)
    own = folder / "tokenizer_config.json"
    config = config_from_file(own) if own.is_file() else {}
    if not folder.is_dir() or config.get("tokenizer_class"):
        yield source
        return
    with tempfile.TemporaryDirectory() as stage:
        for name in (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(stage) / name)
        stated = {key: value for key, value in config.items() if value is not None}
        (Path(stage) / own.name).write_text(json.dumps({**stated, "tokenizer_class": kind}), encoding="utf-8")
        yield stage


@contextmanager
def tokenizer_errors(source: str, folder: Path) -> Iterator[None]:
    """Turn what transformers and tokenizers raise into one error; their own kinds are many."""
    try:
        yield
    except (BabeltowerError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no usable tokenizer: {source!r} cannot be loaded ({type(error).__name__}: "
            f"{in_one_line(error)}). Put tokenizer.json or sentencepiece.bpe.model of the checkpoint "
            f"into {folder}."
        ) from error


def tokenizer_json(tokenizer: Any) -> str:
    """The text of a ``tokenizers`` file: no truncation, no padding, no language in it.

    Raises:
        CheckpointError: the tokenizer has no ``tokenizers`` backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{type(tokenizer).__name__} has no 'tokenizers' backend. "
            "Install sentencepiece and protobuf so that transformers can convert it."
        )
    data = json.loads(backend.to_str())
    data["truncation"] = data["padding"] = None
    # The special tokens are the manifest's: what stands first depends on each text's language.
    data["post_processor"] = None
    return json.dumps(data, ensure_ascii=False)


def preprocessing_from_tokenizer(
    tokenizer: Any, *, n_tokens: int, pad_id: int | None, context_length: int, clean: str
) -> TextPreprocessing:
    """Find which ids stand before and after a text's own.

    Args:
        n_tokens: Rows of the embedding table.
        pad_id: Token that the text model masks.

    Raises:
        CheckpointError: the tokenizer puts its language token last (``legacy_behaviour``), has no pad or
            another than the model's, or ids that the table has no rows for.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= n_tokens:
        raise CheckpointError(
            f"The tokenizer has ids up to {largest}, the embedding table {n_tokens} rows. "
            "The tokenizer files belong to another checkpoint."
        )
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"{type(tokenizer).__name__} has no padding token. Name it in tokenizer_config.json (pad_token)."
        )
    if tokenizer.pad_token_id != pad_id:
        raise CheckpointError(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, the text model masks id {pad_id} "
            "(pad_token_id). The tokenizer files or the config.json belong to another checkpoint."
        )
    language_ids = _language_ids(tokenizer)
    empty = list(tokenizer("")["input_ids"])
    if language_ids:
        if not empty or empty[0] not in language_ids.values():
            raise CheckpointError(
                f"The tokenizer encodes an empty text as {empty}: its language token does not stand first. "
                "NLLB-CLIP pools position 0; set legacy_behaviour to false in tokenizer_config.json."
            )
        affixes: tuple[tuple[int, ...], tuple[int, ...]] = (), tuple(empty[1:])
    else:
        affixes = _affixes(tokenizer, empty)
    return TextPreprocessing(
        context_length=context_length,
        pad_id=int(tokenizer.pad_token_id),
        prefix_ids=affixes[0],
        suffix_ids=affixes[1],
        clean=clean,
        language_ids=language_ids,
    )


def _language_ids(tokenizer: Any) -> Mapping[str, int]:
    added: Mapping[str, int] = tokenizer.get_added_vocab()
    return {token: added[token] for token in sorted(added) if _LANGUAGE.fullmatch(token)}


def _affixes(tokenizer: Any, empty: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inner = list(tokenizer("1", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("1")["input_ids"])
    for n_before in range(len(whole) - len(inner) + 1):
        if whole[n_before : n_before + len(inner)] == inner:
            prefix, suffix = whole[:n_before], whole[n_before + len(inner) :]
            if [*prefix, *suffix] == empty:
                return tuple(prefix), tuple(suffix)
    raise CheckpointError(
        f"The tokenizer's special tokens cannot be told: '' is {empty}, '1' is {whole}, without them {inner}."
    )
