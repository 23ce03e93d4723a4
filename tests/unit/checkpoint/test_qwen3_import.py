"""Import of a Qwen3 without BitDance's parts: how the new rows, the head and the projector begin."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import NEW_ROW_SPREAD
from bitdance_scale.model.initial import draw_initial
from bitdance_scale.model.published_names import Part, our_tensors
from tests.released import SPARE_ROWS, qwen_like, write_autoencoder, write_plain_qwen3
from tests.unit.checkpoint.test_interchange import new_parts, whole

NUM_ENTRIES = len(qwen_like())


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.mark.parametrize("is_tied", [False, True])
def test_new_rows_lie_around_the_mean_of_the_old(tmp_path, autoencoder, is_tied):
    source = write_plain_qwen3(tmp_path / "qwen3", is_tied=is_tied, dtype=torch.float32)
    import_release(open_source(source, new_parts(autoencoder)), tmp_path / "run")
    theirs = load_file(source / "model.safetensors")
    names = {"embedding.weight": "model.embed_tokens.weight"} | ({} if is_tied else {"output.weight": "lm_head.weight"})
    for ours, published in names.items():
        found, old = whole(tmp_path / "run", ours), theirs[published][:NUM_ENTRIES]
        assert found.shape[0] == NUM_ENTRIES + 256 + 15 and len(theirs[published]) == NUM_ENTRIES + SPARE_ROWS
        assert torch.equal(found[:NUM_ENTRIES], old)
        offset = (found[NUM_ENTRIES:] - old.mean(dim=0)) / old.std(dim=0, correction=0)
        # 271 rows x 64 channels: the mean is off by 7e-4 and the spread by 5e-4, six times over.
        assert abs(float(offset.mean())) < 5e-3
        assert float(offset.std()) == pytest.approx(NEW_ROW_SPREAD, rel=0.04)
    assert torch.equal(whole(tmp_path / "run", "decoder.final_layernorm.weight"), theirs["model.norm.weight"])


def test_head_and_projector_start_as_in_a_run_of_the_seed(tmp_path, autoencoder):
    source = open_source(write_plain_qwen3(tmp_path / "qwen3"), new_parts(autoencoder, seed=7))
    import_release(source, tmp_path / "run")
    for tensor in our_tensors(source.network, source.condition.vocab_size):
        if tensor.part is not Part.BACKBONE:
            wanted = draw_initial(tensor.name, tensor.shape, 7, source.network.model.init_std, "cpu")
            assert torch.equal(whole(tmp_path / "run", tensor.name), wanted), tensor.name


def test_the_seed_decides(tmp_path, autoencoder):
    source = write_plain_qwen3(tmp_path / "qwen3")
    for number, seed in enumerate((1, 1, 2)):
        import_release(open_source(source, new_parts(autoencoder, seed=seed)), tmp_path / str(number))
    embeddings = [whole(tmp_path / str(number), "embedding.weight") for number in range(3)]
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])
    assert torch.equal(embeddings[0][:NUM_ENTRIES], embeddings[2][:NUM_ENTRIES])


def test_an_autoencoder_named_as_in_the_releases_collection(tmp_path, autoencoder):
    shutil.copyfile(autoencoder, tmp_path / "ae_d4c16.safetensors")
    shutil.copyfile(autoencoder.with_name("ae_config.json"), tmp_path / "ae_d4c16_config.json")
    source = open_source(write_plain_qwen3(tmp_path / "qwen3"), new_parts(tmp_path / "ae_d4c16.safetensors"))
    import_release(source, tmp_path / "run")
    assert (tmp_path / "run" / "ae.safetensors").read_bytes() == autoencoder.read_bytes()
    export_release(open_checkpoint(tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out" / "ae.safetensors").read_bytes() == autoencoder.read_bytes()
