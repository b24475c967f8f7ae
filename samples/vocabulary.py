"""Train the two tokenizers in the families' own formats: NLLB (BPE, language tokens) and XLM-R (unigram)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from transformers import NllbTokenizer, PreTrainedTokenizerBase, XLMRobertaTokenizer
from transformers.tokenization_utils_base import generate_merges

from samples.build import LANGUAGES
from samples.dataset import Caption

N_PIECES = 28000
SENTENCEPIECE = (
    "sentencepiece.bpe.model"  # both families publish under this name, though XLM-R's is a unigram model
)
N_POSITIONS = 512


def write_nllb_tokenizer(captions: Iterable[Caption], folder: Path) -> None:
    """Write a folder that ``NllbTokenizer`` loads, with a language token per row of the language table."""
    model = write_sentencepiece(captions, folder, model_type="bpe")
    with LANGUAGES.open(encoding="utf-8", newline="") as table:
        codes = [row["flores"] for row in csv.DictReader(table)]
    vocabulary = {piece: index for index, (piece, _) in enumerate(fairseq_pieces(model))}
    tokenizer = NllbTokenizer(
        vocabulary,
        generate_merges(vocabulary),
        _spm_precompiled_charsmap=precompiled_charsmap(model),
        extra_special_tokens=codes,
        src_lang="eng_Latn",
        legacy_behaviour=False,
        model_max_length=N_POSITIONS,
    )
    save_tokenizer(tokenizer, folder)


def write_xlmr_tokenizer(captions: Iterable[Caption], folder: Path) -> None:
    """Write a folder that ``XLMRobertaTokenizer`` loads."""
    model = write_sentencepiece(captions, folder, model_type="unigram")
    pieces = [*fairseq_pieces(model), ("<mask>", 0.0)]
    charsmap = precompiled_charsmap(model)
    save_tokenizer(
        XLMRobertaTokenizer(pieces, _spm_precompiled_charsmap=charsmap, model_max_length=N_POSITIONS), folder
    )


def write_sentencepiece(captions: Iterable[Caption], folder: Path, *, model_type: str) -> bytes:
    """Train SentencePiece with the families' special ids and normalisation; write and return the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted({caption.text for caption in captions})),
        model_writer=model,
        vocab_size=N_PIECES,
        model_type=model_type,
        character_coverage=0.9999,
        normalization_rule_name="nmt_nfkc",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # with more, ties would depend on timing
        minloglevel=2,
    )
    (folder / SENTENCEPIECE).write_bytes(model.getvalue())
    return model.getvalue()


def fairseq_pieces(model: bytes) -> list[tuple[str, float]]:
    """Return pieces and scores in fairseq's order, with special tokens first, as in both families."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [
        (processor.id_to_piece(index), processor.get_score(index)) for index in range(3, len(processor))
    ]
    return [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]


def precompiled_charsmap(model: bytes) -> bytes:
    """Extract the compiled normalisation rules of a SentencePiece model.

    The protobuf wire format is parsed here, since transformers' generated module rejects older protobuf
    runtimes.
    """
    normalizer_spec = dict(_messages(model))[3]
    return dict(_messages(normalizer_spec))[2]


def _messages(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (field number, content) of the length-delimited fields of a protobuf message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _, position = _varint(message, position)
        elif wire_type == 2:
            length, position = _varint(message, position)
            yield field, message[position : position + length]
            position += length
        else:
            position += {1: 8, 5: 4}[wire_type]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Read a varint; return (value, position after it)."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, without the tokenizer's original path."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("name_or_path", "vocab_file", "tokenizer_file", "is_local"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def ids_from_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Iterable[Caption], *, max_length: int
) -> NDArray[np.int64]:
    """Tokenize captions to int64 (captions, max_length), right-padded; NLLB adds each caption's language."""
    rows = list(captions)
    ids = np.full((len(rows), max_length), tokenizer.pad_token_id, np.int64)
    by_language: dict[str, list[int]] = {}
    for position, caption in enumerate(rows):
        by_language.setdefault(caption.flores, []).append(position)
    for flores, positions in by_language.items():
        if isinstance(tokenizer, NllbTokenizer):
            # transformers 5 resets set_src_lang_special_tokens in the call below
            tokenizer.src_lang = flores
        texts = [rows[position].text for position in positions]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        for position, row in zip(positions, encoded, strict=True):
            ids[position, : len(row)] = row
    return ids
