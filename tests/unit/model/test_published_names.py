"""The table of names: every row of ours is one published row, and the other way round.

That they are the right rows is shown by parity with transformers' Qwen3 (tests/distributed/test_qwen3_parity.py).
"""

from __future__ import annotations

import collections

import pytest
from safetensors import safe_open

from bitdance_scale.config.published_backbone import read_model
from bitdance_scale.config.schema import NetworkConfig, TextSection, VisionSection
from bitdance_scale.model.published_names import Part, our_tensors, published_tensors
from tests.released import AUTOENCODER, HEAD, read_json, write_published


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def released(request, tmp_path_factory):
    """(published folder, its network, rows of its embedding)."""
    folder = write_published(tmp_path_factory.mktemp("published"), is_tied=request.param)
    config = read_json(folder / "config.json")
    network = NetworkConfig(
        model=read_model(config, "config.json"),
        head=HEAD,
        vision=VisionSection(weights="", **AUTOENCODER),
        text=TextSection(path=""),
    )
    return folder, network, config["vocab_size"]


def test_published_tensors_are_those_of_the_libraries(released):
    folder, network, vocab_size = released
    found = {}
    for part, name in ((Part.BACKBONE, "model"), (Part.HEAD, "vision_head"), (Part.PROJECTOR, "projector")):
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            found |= {(part, key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert {(t.part, t.name): t.shape for t in published_tensors(network, vocab_size)} == found


def test_every_row_has_one_counterpart(released):
    _, network, vocab_size = released
    rows_of = collections.Counter()
    for tensor in our_tensors(network, vocab_size):
        end = 0
        for rows in tensor.rows:
            assert rows.start == end
            end += rows.num_rows
            rows_of.update((tensor.part, rows.published, rows.published_start + i) for i in range(rows.num_rows))
        assert end == tensor.shape[0]
    wanted = {(t.part, t.name, i): 1 for t in published_tensors(network, vocab_size) for i in range(t.shape[0])}
    assert rows_of == wanted


def test_published_rows_are_in_order(released):
    _, network, vocab_size = released
    for tensor in published_tensors(network, vocab_size):
        starts = [rows.published_start for _, rows in tensor.rows]
        assert starts == sorted(starts)


def test_counts_are_those_of_the_14b_model():
    from bitdance_scale.config.load import load_network

    network = load_network("pt_14b")
    sizes = collections.Counter()
    for tensor in our_tensors(network, 151940):
        sizes[tensor.part] += tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) == 2 else 1)
    # Published sizes: 14.77 B and 1.758 B parameters; the projector is 32 x 5120 + 5120 x 5120 and two biases.
    assert round(sizes[Part.BACKBONE] / 1e9, 2) == 14.77
    assert round(sizes[Part.HEAD] / 1e9, 3) == 1.758
    assert sizes[Part.PROJECTOR] == 32 * 5120 + 5120 * 5120 + 2 * 5120
