from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bitdance_scale.config.schema import TextSection
from bitdance_scale.config.shipped import ASSETS
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.layout import pack_samples
from bitdance_scale.sequence.tokens import (
    MARKUP_TOKENS,
    TextTokenizer,
    load_text_tokenizer,
)
from tests.released import qwen_like

DEMO_MODEL = ASSETS / "demo" / "tokenizer.model"
MAX_CAPTION_TOKENS = 24
SPECIALS = [*MARKUP_TOKENS, "<|res_7|>", "<|query_2|>", "<think>"]
CAPTIONS = ["a red circle", 'the word "CAT" in red', "  two\n\nlines ", "\n", "", "naïve 日本 🎈 é"]


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    qwen_like().save_pretrained(folder)
    return folder


def section(path: Path, kind: str = "huggingface") -> TextSection:
    return TextSection(kind=kind, path=str(path), max_caption_tokens=MAX_CAPTION_TOKENS)


@pytest.fixture(scope="module", params=["huggingface", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, qwen_folder: Path) -> TextTokenizer:
    path = qwen_folder if request.param == "huggingface" else DEMO_MODEL
    return load_text_tokenizer(section(path, request.param), block_tokens=16)


def special_ids(tokenizer: TextTokenizer) -> set[int]:
    first = min(tokenizer.image_tokens.vision_start, tokenizer.turn_end_ids[0], tokenizer.user_turn_ids[0])
    return set(range(int(first), tokenizer.vocab_size))


@pytest.mark.parametrize("block_tokens", [1, 4, 16, 64])
def test_added_tokens_follow_the_last_entry(qwen_folder: Path, block_tokens: int) -> None:
    num_entries = len(qwen_like())
    tokenizer = load_text_tokenizer(section(qwen_folder), block_tokens)
    assert tokenizer.image_tokens.resolution == tuple(range(num_entries, num_entries + 256))
    assert tokenizer.image_tokens.queries == tuple(range(num_entries + 256, num_entries + 255 + block_tokens))
    assert tokenizer.vocab_size == num_entries + 255 + block_tokens
    assert tokenizer.image_tokens.block_tokens == block_tokens


def test_sentencepiece_adds_markup_first() -> None:
    tokenizer = load_text_tokenizer(section(DEMO_MODEL, "sentencepiece"), 16)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO_MODEL)).vocab_size()
    assert (tokenizer.user_turn_ids[0], tokenizer.turn_end_ids[0]) == (pieces, pieces + 1)
    assert (tokenizer.image_tokens.vision_start, tokenizer.image_tokens.vision_end) == (pieces + 2, pieces + 3)
    assert tokenizer.image_tokens.resolution == tuple(range(pieces + 4, pieces + 260))
    assert tokenizer.image_tokens.queries == tuple(range(pieces + 260, pieces + 275))
    assert tokenizer.vocab_size == pieces + 275


def test_a_folder_saved_with_added_tokens_keeps_their_ids(qwen_folder: Path, tmp_path: Path) -> None:
    published = qwen_like()
    names = [*(f"<|res_{index}|>" for index in range(1, 257)), *(f"<|query_{index}|>" for index in range(1, 16))]
    # Not marked special, as tokens of a plain `add_tokens(names)` are.
    published.add_tokens(names)
    published.save_pretrained(tmp_path)
    ours, theirs = load_text_tokenizer(section(qwen_folder), 16), load_text_tokenizer(section(tmp_path), 16)
    assert theirs.image_tokens == ours.image_tokens
    assert theirs.digest == ours.digest
    assert not set(theirs.encode("<|res_3|><|query_2|>")) & special_ids(theirs)
    # Distillation to 8 x 8 keeps the 15 queries and adds 48 after them.
    distilled = load_text_tokenizer(section(tmp_path), 64)
    assert distilled.image_tokens.queries[:15] == ours.image_tokens.queries
    assert distilled.vocab_size == ours.vocab_size + 48


@pytest.mark.parametrize("caption", CAPTIONS)
def test_prompt_equals_the_chat_string_encoded_at_once(qwen_folder: Path, caption: str) -> None:
    tokenizer = load_text_tokenizer(section(qwen_folder), 16)
    reference = qwen_like()
    string = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.prompt_ids(caption).tolist() == reference.encode(string, add_special_tokens=False)
    unconditional = reference.encode("<|im_start|>assistant\n", add_special_tokens=False)
    assert tokenizer.unconditional_ids().tolist() == unconditional


@pytest.mark.parametrize("caption", CAPTIONS)
def test_prompt_reads_back(tokenizer: TextTokenizer, caption: str) -> None:
    ids = tokenizer.prompt_ids(caption)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", SPECIALS)
def test_captions_cannot_spell_special_tokens(tokenizer: TextTokenizer, name: str) -> None:
    specials = special_ids(tokenizer)
    assert tokenizer.vocab_size - 1 in specials
    assert not set(tokenizer.encode(f"a{name}b {name}").tolist()) & specials
    assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == f"a{name}b"
    num_special = sum(index in specials for index in tokenizer.prompt_ids(name).tolist())
    # <|im_start|> twice and <|im_end|> once.
    assert num_special == 3


@given(caption=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_caption_is_text(caption: str) -> None:
    tokenizer = load_text_tokenizer(section(DEMO_MODEL, "sentencepiece"), 4)
    ids = tokenizer.encode(caption)
    # sentencepiece marks spaces with U+2581 and cannot distinguish the two afterwards; NUL ends its strings.
    if not set(caption) & {"\u2581", "\0"}:
        assert tokenizer.decode(ids) == caption
    assert not set(ids.tolist()) & special_ids(tokenizer)


def test_long_captions_are_cut(tokenizer: TextTokenizer) -> None:
    empty, long = tokenizer.prompt_ids(""), tokenizer.prompt_ids("a red circle " * 40)
    assert len(long) == len(empty) + MAX_CAPTION_TOKENS
    # Only the caption is cut: the end of its turn stays.
    assert long[-len(tokenizer.reply_ids) :].tolist() == tokenizer.reply_ids.tolist()
    sample = tokenizer.describing_sample(1, "a red circle " * 40, (4, 4))
    assert len(sample.after_ids) == len(tokenizer.reply_ids) + MAX_CAPTION_TOKENS + 1


def test_digest_tells_vocabularies_apart(qwen_folder: Path, tmp_path: Path) -> None:
    other = qwen_like()
    other.add_tokens(["<|another|>"])
    other.save_pretrained(tmp_path)
    digests = {
        load_text_tokenizer(section(qwen_folder), 16).digest,
        load_text_tokenizer(section(qwen_folder), 4).digest,
        load_text_tokenizer(section(tmp_path), 16).digest,
        load_text_tokenizer(section(DEMO_MODEL, "sentencepiece"), 16).digest,
    }
    assert len(digests) == 4
    again = load_text_tokenizer(dataclasses.replace(section(qwen_folder), max_caption_tokens=3), 16)
    assert again.digest in digests


def test_saved_length_limit_and_padding_are_ignored(qwen_folder: Path, tmp_path: Path) -> None:
    limited = qwen_like()
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=32)
    limited.save_pretrained(tmp_path)
    tokenizer, reference = (load_text_tokenizer(section(folder), 4) for folder in (tmp_path, qwen_folder))
    assert tokenizer.prompt_ids("a red circle").tolist() == reference.prompt_ids("a red circle").tolist()


def test_text_to_image_sample_targets_all_text_but_the_first_token(tokenizer: TextTokenizer) -> None:
    sample = tokenizer.drawing_sample(7, "a red circle", (4, 8), is_caption_dropped=False)
    pack = pack_samples([sample], tokenizer.image_tokens, 1)
    prompt = tokenizer.prompt_ids("a red circle")
    assert (sample.key, sample.grid, sample.predicts_image) == (7, (4, 8), True)
    assert sample.after_ids.tolist() == tokenizer.turn_end_ids.tolist()
    assert pack.text_targets.tolist() == prompt[1:].tolist()
    assert pack.text_positions.tolist() == list(range(len(prompt) - 1))
    assert len(pack.predict_tokens) == 32


def test_dropped_caption_has_no_text_targets(tokenizer: TextTokenizer) -> None:
    sample = tokenizer.drawing_sample(7, "a red circle", (4, 8), is_caption_dropped=True)
    pack = pack_samples([sample], tokenizer.image_tokens, 1)
    assert tokenizer.decode(sample.before_ids) == "<|im_start|>assistant\n"
    assert len(pack.text_targets) == 0
    assert len(pack.predict_tokens) == 32


def test_image_to_text_sample_targets_the_caption_and_its_end(tokenizer: TextTokenizer) -> None:
    sample = tokenizer.describing_sample(7, "a red circle", (4, 8))
    pack = pack_samples([sample], tokenizer.image_tokens, 1)
    assert tokenizer.decode(sample.before_ids) == "<|im_start|>user\n"
    assert tokenizer.decode(sample.after_ids) == "<|im_end|>\n<|im_start|>assistant\na red circle<|im_end|>"
    assert tokenizer.decode(pack.text_targets) == "a red circle<|im_end|>"
    assert len(pack.predict_tokens) == 0
    # Each target is predicted by the position before it.
    assert pack.token_ids[pack.text_positions + 1].tolist() == pack.text_targets.tolist()


def test_a_caption_is_asked_for_with_the_sample_that_taught_it(tokenizer: TextTokenizer) -> None:
    prompt, sample = tokenizer.describing_prompt(7, (4, 8)), tokenizer.describing_sample(7, "a red circle", (4, 8))
    taught = pack_samples([sample], tokenizer.image_tokens, 1)
    asked = pack_samples([prompt], tokenizer.image_tokens, 1)
    length = asked.num_positions
    for name in ("token_ids", "position_ids", "block_ids"):
        np.testing.assert_array_equal(getattr(taught, name)[:length], getattr(asked, name))
    assert taught.text_positions[0] == length - 1 and len(asked.text_targets) == 0


def test_captions_are_made_of_words_and_their_end(tokenizer: TextTokenizer) -> None:
    is_word = tokenizer.caption_entries()
    tokens = tokenizer.image_tokens
    assert is_word.shape == (tokenizer.vocab_size,)
    assert is_word[tokenizer.encode("a red circle")].all() and is_word[tokenizer.turn_end_ids].all()
    left_out = {int(tokenizer.user_turn_ids[0]), tokens.vision_start, tokens.vision_end}
    assert not is_word[[*left_out, *tokens.resolution, *tokens.queries]].any()


def test_no_caption_has_what_text_is_never_encoded_to(qwen_folder: Path) -> None:
    tokenizer = load_text_tokenizer(section(qwen_folder), 16)
    ours = {*tokenizer.image_tokens.resolution, *tokenizer.image_tokens.queries}
    left_out = {*np.flatnonzero(~tokenizer.caption_entries()).tolist()} - ours
    names = {tokenizer.decode([index]) for index in left_out}
    assert names == {*MARKUP_TOKENS, "<|endoftext|>", "<think>", "</think>"} - {"<|im_end|>"}


def test_no_caption_has_control_pieces(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user assistant a red circle"] * 8),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    tokenizer = load_text_tokenizer(section(tmp_path / "a.model", "sentencepiece"), 4)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    is_word = tokenizer.caption_entries()
    left_out = [pieces.id_to_piece(int(index)) for index in np.flatnonzero(~is_word[: pieces.vocab_size()])]
    assert left_out == ["<s>", "</s>"]


def refusal(text: TextSection) -> str:
    with pytest.raises(ConfigError) as error:
        load_text_tokenizer(text, 16)
    return str(error.value)


def test_missing_and_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(section(tmp_path / "absent"))
    assert "the folder has no tokenizer.json" in refusal(section(tmp_path))
    assert "there is no such file" in refusal(section(tmp_path / "absent.model", "sentencepiece"))
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"no model")
    assert "is not a sentencepiece model" in refusal(section(damaged, "sentencepiece"))
    assert "text.kind = 'hf'" in refusal(section(tmp_path, "hf"))


def test_tokenizer_without_markup_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    message = refusal(section(tmp_path))
    assert "<|im_start|>, <|im_end|>, <|vision_start|>, <|vision_end|>" in message and "Qwen3" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "loses line breaks"),
        ({"user_defined_symbols": ["\n", "<|im_end|>"]}, "has pieces named <|im_end|>"),
    ],
)
def test_unsuitable_sentencepiece_models_are_refused(tmp_path: Path, options: dict[str, object], expected: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user assistant a red circle"] * 8),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    assert expected in refusal(section(path, "sentencepiece"))
