"""The class-conditional network against the formulas written out: loss, gradient of every parameter, drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.start_weights import find_checkpoint, load_start_weights
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.generate.sampler import ImageNoise
from bitdance_scale.model.flow import draw_time
from bitdance_scale.model.inputs import make_inputs
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.train.start_checks import check_start
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.bits import unpack_bits
from bitdance_scale.vision.tokenizer import autoencoder_sizes
from tests.class_reference import ClassNetwork
from tests.distributed.class_toy import CLASSES, GRID, class_config, class_packs
from tests.distributed.layout_run import make_engine
from tests.distributed.spawn import run_ranks


def _reference(config: RunConfig) -> ClassNetwork:
    model, head = config.model, config.head
    return ClassNetwork(
        num_layers=model.num_layers,
        width=model.hidden_size,
        num_heads=model.num_heads,
        ffn=model.ffn_size,
        head_width=head.width,
        head_blocks=head.num_blocks,
        num_adaln=head.num_adaln,
        p=config.vision.block_side,
        head_head_dim=head.head_dim,
        num_classes=CLASSES.num_classes,
        num_class_tokens=CLASSES.num_tokens,
        bits=config.vision.num_bits,
        grid=GRID[0],
    )


def _to_published(ours: dict[str, torch.Tensor], config: RunConfig) -> dict[str, torch.Tensor]:
    """Our tensors under the published names; the rows of a query, a key and a value head alternate in Megatron's."""
    model, section = config.model, config.classes
    num_rows = (section.num_classes + 1) * section.num_tokens
    names = {
        "decoder.final_layernorm.weight": "norm.weight",
        "input_norm.weight": "emb_norm.weight",
        "head_positions.weight": "pos_for_diff.weight",
    }
    parts = {
        "self_attention.linear_proj": "attention.wo",
        "mlp.linear_fc1": "feed_forward.w1",
        "mlp.linear_fc2": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "pre_mlp_layernorm": "ffn_norm",
    }
    published = {}
    for name, tensor in ours.items():
        if name == "embedding.weight":
            published["cls_embedding.weight"] = tensor[:num_rows].view(section.num_classes + 1, -1)
            published["query_token"] = tensor[num_rows:]
        elif name.startswith("decoder.layers."):
            _, _, layer, part = name.split(".", 3)
            part, _, leaf = part.rpartition(".")
            if part == "self_attention.linear_qkv":
                heads = tensor.view(model.num_heads, 3, model.head_dim, -1).transpose(0, 1)
                published[f"layers.{layer}.attention.wqkv.weight"] = heads.reshape(tensor.shape)
            else:
                published[f"layers.{layer}.{parts[part]}.{leaf}"] = tensor
        else:
            published[names.get(name, name.replace("projector.", "proj_in."))] = tensor
    return published


def _start_from(folder: Path, engine: object, config: RunConfig) -> dict[str, torch.Tensor]:
    """Fills the engine from a published file of random weights, imported; returns what the file holds."""
    torch.manual_seed(1)
    network = _reference(config)
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    vae = Autoencoder(**autoencoder_sizes(config.vision)).state_dict()
    published = tensors | {"query_token": tensors["query_token"][None]}
    torch.save({"model": published | {f"vae.{name}": tensor for name, tensor in vae.items()}}, folder / "a.pt")
    (folder / "sizes.toml").write_text(dump_toml(config.network), encoding="utf-8")
    source = open_class_source(PickledFile(folder / "a.pt"), config=folder / "sizes.toml")
    import_release(source, folder / "run")
    start = check_start(find_checkpoint(folder / "run"), config)
    values, prefix = engine.optimizer_values(), "master."
    masters = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    load_start_weights(start.path, engine.model_values(), masters, tokenizer_digest=start.tokenizer_digest)
    return tensors


def _compare(rank: int, config: RunConfig, folder: Path | None = None) -> float:
    """The largest error of a gradient relative to its norm; the losses are compared here.

    With a folder the weights come from a published file that is written and imported there.
    """
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets

    pack = class_packs(0, 1, 1, config)[0]
    num_images, num_bits = len(pack.sample_keys), config.vision.num_bits
    num_draws = config.head.diff_batch_mul
    noise = pack_noise(pack, num_bits, 5, 0, num_draws=num_draws)
    network = _reference(config)
    if folder is None:
        weights = {name: located.parameter.detach().clone() for name, located in engine.parameters.items()}
        network.load_state_dict(_to_published(weights, config), strict=True)
    else:
        network.load_state_dict(_start_from(folder, engine, config), strict=True)
    inputs = make_inputs(pack, noise, config, topology.device)
    losses = accumulate_gradients(engine, [inputs], count_targets([inputs], topology), config.loss, topology)

    clean = unpack_bits(torch.from_numpy(pack.vision_bits)).float().view(num_images, -1, num_bits)
    flips = (noise.flip_draw < config.vision.flip_max * noise.flip_level).reshape(clean.shape)
    assert flips.any()
    read = torch.where(torch.from_numpy(flips), -clean, clean)
    labels = torch.tensor([index % 6 for index in range(num_images)])
    times = draw_time(torch.from_numpy(noise.time_normal), config.head).view(num_draws, num_images, -1)
    gaussian = torch.from_numpy(noise.noise).view(num_draws, *clean.shape)
    loss = sum(network.loss(labels, read, clean, gaussian[draw], times[draw]) for draw in range(num_draws)) / num_draws
    loss.backward()
    assert losses.vision == pytest.approx(loss.item(), rel=1e-6) and losses.text == 0
    ours = _to_published({name: engine.gradient(name) for name in engine.parameters}, config)
    theirs = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.numel()}
    assert {name for name, tensor in ours.items() if tensor.numel()} == theirs.keys()
    return max(float((ours[name] - grad).norm() / grad.norm()) for name, grad in theirs.items())


@pytest.mark.parametrize("block_side", [1, 2])
def test_loss_and_gradients_are_those_of_the_formulas(block_side):
    # float32 in another order of summation, over four layers.
    assert run_ranks(1, _compare, class_config(block_side))[0] < 1e-5


@pytest.mark.parametrize("block_side", [1, 2])
def test_an_imported_file_computes_what_the_formulas_compute(tmp_path, block_side):
    assert run_ranks(1, _compare, class_config(block_side), tmp_path)[0] < 1e-5


LABELS, STREAMS = (1, 4, 0), (7, 8, 9)


def _growing(config: RunConfig, use_cache: bool = True) -> RunConfig:
    section = dataclasses.replace(config.sample, guidance=9.0, guidance_growth="linear", use_cache=use_cache)
    return dataclasses.replace(config, sample=section)


def draw_as_released(
    network: ClassNetwork, noise: Callable[[], torch.Tensor], num_steps: int, guidance: float, shares_first: bool
) -> torch.Tensor:
    """The release's loop, its head at every step of every block and the network from the beginning for every block.

    A scale of 1, that of block 0, draws all rows for themselves, those without a class too.

    Args:
        network: the formulas.
        noise: [K, N, P, C] of the next draws.
        num_steps: stochastic steps.
        guidance: the scale that the blocks grow towards.
        shares_first: as the release does not: the rows without a class read the first block of those with one.

    Returns:
        [N, V, C].
    """
    num_images, size, num_vision = len(LABELS), network.p**2, network.grid**2
    rows = torch.tensor([*LABELS, *[CLASSES.num_classes] * num_images])
    drawn = torch.zeros(len(rows), num_vision, network.proj_in.w1.in_features)
    for start in range(0, num_vision, size):
        block = slice(start, start + size)
        z = network.conditions(rows, drawn)[:, block]
        scale = 1.0 + (guidance - 1.0) * start / num_vision
        copies = 2 if scale > 1.0 else 1
        draws = torch.cat([noise() for _ in range(3 - copies)], dim=1)
        x = draws[0]
        for step in range(num_steps + 1):
            t, dt = (step * 0.95 / num_steps, 0.95 / num_steps) if step < num_steps else (0.95, 0.05)
            both = torch.cat([x] * copies)
            v = (network.head.net(both, torch.full((len(both),), t), z) - both) / max(1 - t, 0.05)
            if copies == 2:
                with_class, without = v.chunk(2)
                v = without + scale * (with_class - without)
            if step < num_steps:
                score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
                x = x + (v + (1 - t) * score) * dt + math.sqrt(2 * (1 - t) * dt) * draws[step + 1]
            else:
                x = x + v * dt
        drawn[:, block] = torch.cat([x] * copies).sign()
        if shares_first:
            drawn[num_images:, block] = drawn[:num_images, block]
    return drawn[:num_images]


def _ours(engine: object, topology: object, config: RunConfig) -> torch.Tensor:
    from bitdance_scale.train.sampling import BatchDrawer

    condition = load_condition(config)
    prompts = [condition.prompt_ids(str(label)) for label in LABELS]
    return BatchDrawer(engine, config, condition, topology).draw(prompts, STREAMS)


def _draw(rank: int, config: RunConfig) -> torch.Tensor:
    return _ours(*make_engine(config), config)


@torch.no_grad()
def _draw_all_ways(rank: int, config: RunConfig) -> list[torch.Tensor]:
    """Ours with memory and without, the release's, and the same with a first block that both halves read."""
    engine, topology = make_engine(config)
    found = [_ours(engine, topology, _growing(config, use_cache)) for use_cache in (True, False)]
    network = _reference(config)
    weights = {name: located.parameter.detach().clone() for name, located in engine.parameters.items()}
    network.load_state_dict(_to_published(weights, config), strict=True)
    sample = config.sample
    for shares_first in (False, True):
        shape = (sample.num_steps + 1, config.vision.block_tokens, config.vision.num_bits)
        noise = ImageNoise(sample.seed, STREAMS, shape, topology.device)
        found.append(draw_as_released(network, noise, sample.num_steps, sample.guidance, shares_first))
    return found


@pytest.mark.parametrize("block_side", [1, 2])
def test_classes_are_drawn_as_the_release_draws_them(block_side):
    config = _growing(class_config(block_side))
    ours, without_memory, released, shared = run_ranks(1, _draw_all_ways, config)[0]
    assert torch.equal(ours, released) and torch.equal(without_memory, released)
    assert not torch.equal(shared, released), "the first block of the rows without a class must matter here"
    if block_side == 2:
        for drawn in run_ranks(2, _draw, _growing(class_config(block_side, pipeline=2))):
            assert torch.equal(drawn, released)
