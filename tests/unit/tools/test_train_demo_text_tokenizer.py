from __future__ import annotations

from pathlib import Path

import pytest
import train_demo_text_tokenizer
from sentencepiece import SentencePieceProcessor

from bitdance_scale.demo.scenes import make_scene


def test_equal_arguments_give_equal_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--captions", "2000", "--seed", "3"]
    for name in ("first.model", "second.model"):
        assert train_demo_text_tokenizer.main(["--out", str(tmp_path / name), *arguments]) == 0
    assert (tmp_path / "first.model").read_bytes() == (tmp_path / "second.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.model", "second.model"]


def test_committed_model_knows_the_captions_of_other_scenes() -> None:
    processor = SentencePieceProcessor(model_file=str(train_demo_text_tokenizer.DEFAULT_OUT))
    assert processor.vocab_size() == train_demo_text_tokenizer.VOCAB_SIZE
    num_words = num_pieces = 0
    for index in range(500):
        caption = make_scene(97, index).caption
        ids = processor.encode(caption)
        assert processor.decode(ids) == caption
        assert not any(processor.is_byte(piece) for piece in ids), caption
        num_words += len(caption.split())
        num_pieces += len(ids)
    # Frequent words are one piece; only plurals, quotation marks and the letters of rendered words cost more.
    assert num_pieces < 1.5 * num_words
