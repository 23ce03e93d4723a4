"""The class-conditional network against the formulas written out: the loss, and the gradient of every parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.start_weights import find_checkpoint, load_start_weights
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.flow import draw_time
from bitdance_scale.model.inputs import make_inputs
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
