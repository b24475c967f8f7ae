"""Convert a library's tokenizer to the runtime's form: one JSON file and the special token ids."""

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
    """Return True if the folder holds a supported tokenizer file."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


@contextmanager
def complete_tokenizer(source: str, kind: str) -> Iterator[str]:
    """Yield a tokenizer folder whose ``tokenizer_config.json`` names a class, as transformers requires.

    If the class is missing, a copy is made with ``kind``, the family's class; otherwise transformers would
    take a class from ``config.json``, which may need other files. Hub names are yielded unchanged.
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
    """Convert any exception of transformers and tokenizers to ``CheckpointError``."""
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
    """Return ``tokenizer.json`` as text, without truncation, padding and special tokens.

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
    # The manifest lists the special tokens, since the first one depends on each text's language.
    data["post_processor"] = None
    return json.dumps(data, ensure_ascii=False)


def preprocessing_from_tokenizer(
    tokenizer: Any,
    *,
    n_tokens: int,
    pad_id: int | None,
    context_length: int,
    clean: str,
    padding: str = "masked",
) -> TextPreprocessing:
    """Read text preprocessing settings from a tokenizer, with the special ids before and after a text.

    Args:
        n_tokens: Rows of the embedding table.
        pad_id: Padding token that the text model masks; not compared if it masks none.
        padding: See ``TextPreprocessing``.

    Raises:
        CheckpointError: the tokenizer puts its language token last (``legacy_behaviour``), has no padding
            token or another than the model's, or has ids beyond the embedding table.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= n_tokens:
        raise CheckpointError(
            f"The tokenizer has ids up to {largest}, but the embedding table has {n_tokens} rows. "
            "The tokenizer files belong to another checkpoint."
        )
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"{type(tokenizer).__name__} has no padding token. Set pad_token in tokenizer_config.json."
        )
    if padding == "masked" and tokenizer.pad_token_id != pad_id:
        raise CheckpointError(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, but the text model masks id {pad_id} "
            "(pad_token_id). The tokenizer files or the config.json belong to another checkpoint."
        )
    language_ids = _language_ids(tokenizer)
    empty = list(tokenizer("")["input_ids"])
    if language_ids:
        if not empty or empty[0] not in language_ids.values():
            raise CheckpointError(
                f"The tokenizer encodes an empty text as {empty}: its language token does not come first. "
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
        padding=padding,
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
        f"Cannot identify the tokenizer's special tokens: '' is encoded as {empty}, '1' as {whole}, and '1' "
        f"without special tokens as {inner}. Check the post-processor in the tokenizer's files."
    )
