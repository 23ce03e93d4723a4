"""A tokenizer written as files of a published folder stays the same tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bitdance_scale.config.schema import TextSection
from bitdance_scale.config.shipped import ASSETS
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.tokenizer_files import write_tokenizer
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from tests.released import qwen_like, save_as_qwen3

DEMO_MODEL = ASSETS / "demo" / "tokenizer.model"


def section(path: Path, kind: str = "huggingface") -> TextSection:
    return TextSection(kind=kind, path=str(path), max_caption_tokens=64)


@pytest.fixture(scope="module", params=["huggingface", "qwen3", "sentencepiece"])
def pair(request, tmp_path_factory) -> tuple[TextTokenizer, TextTokenizer]:
    """(a run's tokenizer, the one loaded from the folder to which it was written)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = section(DEMO_MODEL, "sentencepiece")
    if request.param != "sentencepiece":
        save = save_as_qwen3 if request.param == "qwen3" else PreTrainedTokenizerFast.save_pretrained
        save(qwen_like(), folder / "source")
        source = section(folder / "source")
    tokenizer = load_text_tokenizer(source, 16)
    (folder / "out").mkdir()
    write_tokenizer(source, tokenizer, folder / "out")
    return tokenizer, load_text_tokenizer(section(folder / "out"), 16)


def test_entries_and_ids_are_the_same(pair):
    ours, written = pair
    assert (written.digest, written.vocab_size, written.image_tokens) == (
        ours.digest,
        ours.vocab_size,
        ours.image_tokens,
    )
    assert written.num_new_entries == 0 < ours.num_new_entries


TEXTS = st.text(st.sampled_from(list("a redcirlostu  \n\n▁日🎈é'\"<|>0123")), max_size=40) | st.text(max_size=20)


@given(text=TEXTS)
def test_texts_are_encoded_the_same(pair, text):
    ours, written = pair
    np.testing.assert_array_equal(written.prompt_ids(text), ours.prompt_ids(text))
    assert written.decode(written.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4.57 saves a class it knows")
def test_no_class_of_one_version_is_named(tmp_path):
    """Transformers 5 saves a class that 4.57 does not know."""
    qwen_like().save_pretrained(tmp_path / "source")
    saved = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"
    (tmp_path / "out").mkdir()
    source = section(tmp_path / "source")
    write_tokenizer(source, load_text_tokenizer(source, 4), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in written


def test_the_list_of_added_tokens_in_qwen3s_own_folder_is_extended(tmp_path):
    save_as_qwen3(qwen_like(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    source = section(tmp_path / "source")
    tokenizer = load_text_tokenizer(source, 4)
    write_tokenizer(source, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    listed = {entry["content"]: int(index) for index, entry in written.pop("added_tokens_decoder").items()}
    known = {entry["content"]: int(index) for index, entry in config.pop("added_tokens_decoder").items()}
    assert listed == known | tokenizer.added_entries and written == config
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_sentencepiece_model_that_changes_text_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "two blue squares"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    source = section(tmp_path / "tokenizer.model", "sentencepiece")
    with pytest.raises(ConfigError, match="normalization_rule_name='identity'"):
        write_tokenizer(source, load_text_tokenizer(source, 4), tmp_path)
