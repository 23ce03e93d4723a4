"""The published sizes, built as real stages on the meta device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.class_reference import ClassNetwork
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

# Qwen3's tokenizer with 256 resolution and 15 query tokens.
VOCAB_SIZE = 151940


def _count(rank: int, config) -> dict[str, int]:
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=60)
    topology = make_topology(config.parallel)
    from bitdance_scale.parallel.pipeline_stages import Stage

    with torch.device("meta"):
        stage = Stage(config, VOCAB_SIZE, topology, 0)
    counts: dict[str, int] = {}
    for name, parameter in stage.named_parameters():
        assert parameter.is_meta
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def test_parameters_of_the_14b_preset():
    from bitdance_scale.config.load import load_config

    demo = load_config("demo", ["model.preset=qwen3-14b"])
    # The demo file names the tokenizer's sizes; the published one has 32 bits.
    config = dataclasses.replace(toy_config(), model=demo.model, head=demo.head)
    vision = dataclasses.replace(config.vision, num_bits=32, block_side=4)
    counts = run_ranks(1, _count, dataclasses.replace(config, vision=vision))[0]
    backbone = counts["decoder"] + counts["embedding"] + counts["output"]
    # Three decimals of a billion, as published.
    assert backbone / 1e9 == pytest.approx(14.768, abs=5e-4)
    assert counts["head"] / 1e9 == pytest.approx(1.758, abs=5e-4)


# Without the autoencoder, p = 1, 2 and 4: 242 M and 260 M, 527 M and 1.0 B are published (Tables 2, 3).
CLASS_PARAMETERS = {
    "bitdance-b": (242_373_152, 260_102_432, 260_111_648),
    "bitdance-l": (527_271_968, 567_176_224, 567_188_512),
    "bitdance-h": (1_007_960_352, 1_101_456_672, 1_101_472_032),
}


def _class_config(preset: str, block_side: int):
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.schema import ClassesSection

    demo = load_config("demo", [f"model.preset={preset}", "parallel.zero_stage=1"])
    return dataclasses.replace(
        toy_config(),
        model=demo.model,
        head=demo.head,
        classes=ClassesSection(num_classes=1000),
        vision=dataclasses.replace(toy_config().vision, num_bits=32, block_side=block_side),
    )


def _count_classes(rank: int) -> dict[str, list[tuple[int, int]]]:
    """(parameters of the stage, those that `count_parameters` gives), by preset."""
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=60)
    topology = make_topology(toy_config().parallel)
    from bitdance_scale.observe.cost import count_parameters
    from bitdance_scale.parallel.pipeline_stages import Stage
    from bitdance_scale.sequence.condition import load_condition

    counts: dict[str, list[tuple[int, int]]] = {}
    for preset in CLASS_PARAMETERS:
        for block_side in (1, 2, 4):
            config = _class_config(preset, block_side)
            vocab_size = load_condition(config).vocab_size
            with torch.device("meta"):
                stage = Stage(config, vocab_size, topology, 0)
            built = sum(parameter.numel() for parameter in stage.parameters())
            counts.setdefault(preset, []).append((built, count_parameters(config, vocab_size)["total"]))
    return counts


def test_parameters_of_the_class_conditional_presets():
    found = run_ranks(1, _count_classes)[0]
    assert found == {preset: [(count, count) for count in counts] for preset, counts in CLASS_PARAMETERS.items()}


@pytest.mark.parametrize("preset", CLASS_PARAMETERS)
def test_parameters_of_the_formulas(preset):
    """The network written out has as many: no part of ours is missing or superfluous."""
    config = _class_config(preset, 2)
    with torch.device("meta"):
        network = ClassNetwork(
            num_layers=config.model.num_layers,
            width=config.model.hidden_size,
            num_heads=config.model.num_heads,
            ffn=config.model.ffn_size,
            head_width=config.head.width,
            head_blocks=config.head.num_blocks,
            num_adaln=config.head.num_adaln,
            p=2,
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == CLASS_PARAMETERS[preset][1]
