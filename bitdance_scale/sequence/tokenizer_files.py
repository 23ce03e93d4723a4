"""Writes the text tokenizer of a run as the files of a published folder, which transformers 4.57 and 5 can read.

The JSON files are edited rather than saved by transformers, because one version may not load what another saved (5
names a tokenizer class that 4.57 does not know). A sentencepiece model is written as an equivalent `tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.schema import TextSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from bitdance_scale.text_files import read_utf8

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_ADDED_NAME = "added_tokens.json"
_COPIED_NAMES = ("special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")
# The class of a tokenizer that is only a `tokenizer.json`: as transformers 5 names it, and as both versions know it.
_CLASS_OF_5, _CLASS_OF_BOTH = "TokenizersBackend", "PreTrainedTokenizerFast"
_SPACE = "▁"


def write_tokenizer(section: TextSection, tokenizer: TextTokenizer, folder: Path) -> None:
    """Writes the tokenizer with its resolution and query tokens, and loads it again to check that it is the same.

    Args:
        section: where the tokenizer came from.
        tokenizer: what `load_text_tokenizer` made from that section.
        folder: where to write; it must exist.

    Raises:
        ConfigError: the tokenizer cannot be written in this form, or what is written differs from it.
    """
    if section.kind == "sentencepiece":
        _write_sentencepiece(section.tokenizer_path, tokenizer, folder)
    else:
        _write_extended(section.tokenizer_path, tokenizer, folder)
    written = TextSection(kind="huggingface", path=str(folder), max_caption_tokens=section.max_caption_tokens)
    if load_text_tokenizer(written, tokenizer.image_tokens.block_tokens).digest != tokenizer.digest:
        raise ConfigError(
            f"text.path = {section.path!r}: the tokenizer written to {folder} has other entries than this one, whose "
            "tokenizer.json does not describe it fully; save it again with transformers"
        )


def _write_extended(source: Path, tokenizer: TextTokenizer, folder: Path) -> None:
    """Copies a Hugging Face tokenizer and adds those of the added tokens that it lacks."""
    if not (source / TOKENIZER_NAME).is_file():
        raise ConfigError(f"text.path = {str(source)!r}: it has no {TOKENIZER_NAME}, which would be written; add it")
    document = _read(source / TOKENIZER_NAME)
    present = {entry["content"] for entry in document["added_tokens"]}
    missing = {name: index for name, index in tokenizer.added_entries.items() if name not in present}
    document["added_tokens"] += [{"id": index, **_added_entry(name)} for name, index in missing.items()]
    _write(folder / TOKENIZER_NAME, document)
    config = _read(source / TOKENIZER_CONFIG_NAME) if (source / TOKENIZER_CONFIG_NAME).is_file() else {}
    if config.get("tokenizer_class", _CLASS_OF_5) == _CLASS_OF_5:
        config["tokenizer_class"] = _CLASS_OF_BOTH
        config.pop("backend", None)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(index): _added_entry(name) for name, index in missing.items()}
    _write(folder / TOKENIZER_CONFIG_NAME, config)
    if (source / _ADDED_NAME).is_file():
        _write(folder / _ADDED_NAME, _read(source / _ADDED_NAME) | missing)
    for name in _COPIED_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_sentencepiece(path: Path, tokenizer: TextTokenizer, folder: Path) -> None:
    """Writes a sentencepiece model as a `tokenizer.json`: BPE with byte fallback that does not alter characters."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto()
    model.ParseFromString(path.read_bytes())
    trained, normal = model.trainer_spec, model.normalizer_spec
    is_supported = (
        trained.model_type == schema.TrainerSpec.BPE
        and trained.byte_fallback
        and normal.name == "identity"
        and not normal.add_dummy_prefix
        and not normal.remove_extra_whitespaces
    )
    if not is_supported:
        raise ConfigError(
            f"text.path = {str(path)!r}: only a sentencepiece BPE model with byte_fallback, normalization_rule_name="
            "'identity', add_dummy_prefix=False and remove_extra_whitespaces=False can be written as a Hugging Face "
            "tokenizer; train such a model, or use a Hugging Face tokenizer"
        )
    pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
    user_defined = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    added = [{"id": pieces[name], **_added_entry(name), "special": False} for name in user_defined]
    # The markup and the added tokens follow the last piece, in the order of `sequence/tokens.py`.
    special = range(len(pieces), tokenizer.vocab_size)
    added += [{"id": index, **_added_entry(tokenizer.decode([index]))} for index in special]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": pieces,
            "merges": _merges(pieces, scores),
        },
    }
    _write(folder / TOKENIZER_NAME, document)
    config = {"tokenizer_class": _CLASS_OF_BOTH, "unk_token": unknown, "clean_up_tokenization_spaces": False}
    _write(folder / TOKENIZER_CONFIG_NAME, config)


def _merges(pieces: Mapping[str, int], scores: Mapping[str, float]) -> list[list[str]]:
    """All pairs of pieces that spell a piece, in the order in which sentencepiece merges: by score, then by id.

    sentencepiece merges any pair that spells the piece with the best score, so the list of all such pairs is
    equivalent.
    """
    ordered = sorted(scores, key=lambda piece: (-scores[piece], pieces[piece]))
    return [
        [piece[:cut], piece[cut:]]
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _added_entry(name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": name, **flags}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_utf8(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {error}); fetch it again") from error
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
