"""A missing tokenizer or autoencoder: what is said, and that no rank has started by then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bitdance_scale.cli import encode_shards, launch, stage, train
from bitdance_scale.config.load import load_config
from bitdance_scale.config.named_files import check_named_files, tokenizer_faults
from bitdance_scale.config.schema import TextSection
from bitdance_scale.demo.shards import write_shards
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.tokens import load_text_tokenizer


def make(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("huggingface", "absent", ["there is no such folder in ", "tokenizer.json", "hf download", "Nothing is downl"]),
        ("huggingface", "Qwen/Qwen3-14B", ["there is no such folder in ", "Nothing is downloaded"]),
        ("huggingface", "weights", ["the folder has no tokenizer.json", "vocab.json and merges.txt", "hf download"]),
        ("huggingface", "half", ["the folder has no tokenizer.json"]),
        ("huggingface", "whole/tokenizer.json", ["is a file; name the folder that holds it"]),
        ("sentencepiece", "absent.model", ["there is no such file in ", ".model file"]),
        ("sentencepiece", "whole", ["is a folder; set it to the .model file"]),
    ],
)
def test_what_is_said_of_a_tokenizer_that_is_not_there(tmp_path, monkeypatch, kind, path, expected):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "weights", "config.json", "model.safetensors")
    make(tmp_path / "half", "vocab.json")
    make(tmp_path / "whole", "tokenizer.json")
    section = TextSection(kind=kind, path=path)
    with pytest.raises(ConfigError) as caught:
        load_text_tokenizer(section, 16)
    assert str(caught.value).startswith(f"text.path = {path!r}: ")
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize("names", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_folders_that_hold_a_tokenizer(tmp_path, names):
    assert [*tokenizer_faults(TextSection(path=str(make(tmp_path / "folder", *names))))] == []


@pytest.mark.parametrize("content", [b"{}", b'{"version": ', b"\xff\xfe{\0", b'{"added_tokens": [], "model": {}}'])
def test_a_damaged_tokenizer_is_a_refusal(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match="holds no usable Hugging Face tokenizer .*; fetch its files again"):
        load_text_tokenizer(TextSection(path=str(tmp_path)), 16)


def test_all_that_is_missing_is_listed():
    config = load_config("demo")
    check_named_files(config)
    vision = dataclasses.replace(config.vision, weights="nowhere/ae.safetensors")
    with pytest.raises(ConfigError) as caught:
        check_named_files(dataclasses.replace(config, vision=vision, text=TextSection(path="nowhere")))
    tokenizer, autoencoder = str(caught.value).splitlines()
    assert tokenizer.startswith("text.path = 'nowhere': ")
    assert autoencoder.startswith(f"vision.weights = 'nowhere/ae.safetensors': no such file in {Path.cwd()}")


@pytest.mark.parametrize("num_ranks", [None, 1, 2])
def test_no_rank_starts_without_its_tokenizer(tmp_path, monkeypatch, capsys, num_ranks):
    def refuse(*_: object) -> int:
        raise AssertionError("a rank was started")

    for module, name in ((launch, "launch"), (train, "launch"), (stage, "run_stage")):
        monkeypatch.setattr(module, name, refuse)
    write_shards(tmp_path / "shards", num_images=2, per_shard=2, seed=0)
    shards = f'["{tmp_path / "shards"}"]'
    command = ["demo", f"data.shards={shards}", f"evaluate.shards={shards}", "text.kind=huggingface", "text.path=gone"]
    if num_ranks is None:
        # As torchrun or srun would start it.
        assert stage.main(None, command) == 2
    else:
        assert train.main([*command, "--nproc", str(num_ranks)]) == 2
    assert "text.path = 'gone': there is no such folder" in capsys.readouterr().err


def test_encoding_needs_the_autoencoder_alone(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> int:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(encode_shards, "launch", refuse)
    write_shards(tmp_path / "shards", num_images=2, per_shard=2, seed=0)
    command = ["demo", "--out", str(tmp_path / "bits"), "--nproc", "2", f'data.shards=["{tmp_path / "shards"}"]']
    with pytest.raises(AssertionError, match="a rank was started"):
        encode_shards.main([*command, "text.path=gone"])
    assert encode_shards.main([*command, "vision.weights=gone"]) == 2
    assert "vision.weights = 'gone': no such file in " in capsys.readouterr().err
