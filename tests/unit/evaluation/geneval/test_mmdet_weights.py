import numpy as np
import pytest
import torch

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.geneval.mmdet_weights import by_patch, mmdet_network
from tests.unit.evaluation.geneval.small_networks import NUM_QUERIES, mask2former_config

DEPTHS, HEADS, WINDOW, WIDTH, FEATURES = (1, 2, 1, 1), (1, 2, 2, 4), 4, 8, 32


def shapes(version: int) -> dict[str, tuple[int, ...]]:
    """Tensors of mmdetection's network with the sizes of the small one, as mmdetection names them."""
    made: dict[str, tuple[int, ...]] = {}

    def add(name, *weight, bias=True):
        made[f"{name}.weight"] = weight
        if bias:
            made[f"{name}.bias"] = weight[:1]

    add("backbone.patch_embed.projection", WIDTH, 3, 4, 4)
    add("backbone.patch_embed.norm", WIDTH)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = WIDTH * 2**stage
        for index in range(depth):
            block = f"backbone.stages.{stage}.blocks.{index}"
            add(f"{block}.norm1", width)
            add(f"{block}.norm2", width)
            add(f"{block}.attn.w_msa.qkv", 3 * width, width)
            add(f"{block}.attn.w_msa.proj", width, width)
            made[f"{block}.attn.w_msa.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, heads)
            add(f"{block}.ffn.layers.0.0", 4 * width, width)
            add(f"{block}.ffn.layers.1", width, 4 * width)
        if stage < 3:
            add(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            add(f"backbone.stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        add(f"backbone.norm{stage}", width)
    head, pixel = "panoptic_head", "panoptic_head.pixel_decoder"
    for index, width in enumerate((64, 32, 16)):
        add(f"{pixel}.input_convs.{index}.conv", FEATURES, width, 1, 1)
        add(f"{pixel}.input_convs.{index}.gn", FEATURES)
    for name, size in (("lateral_convs", (WIDTH, 1, 1)), ("output_convs", (FEATURES, 3, 3))):
        add(f"{pixel}.{name}.0.conv", FEATURES, *size, bias=False)
        add(f"{pixel}.{name}.0.gn", FEATURES)
    add(f"{pixel}.mask_feature", FEATURES, FEATURES, 1, 1)
    made[f"{pixel}.level_encoding.weight"] = made[f"{head}.level_embed.weight"] = (3, FEATURES)
    own, cross, ffn = ("attentions.1", "attentions.0", "ffns.0") if version == 2 else ("self_attn", "cross_attn", "ffn")
    for index in range(2):
        layer = f"{pixel}.encoder.layers.{index}"
        attention = f"{layer}.{'attentions.0' if version == 2 else 'self_attn'}"
        add(f"{attention}.sampling_offsets", 4 * 3 * 4 * 2, FEATURES)
        add(f"{attention}.attention_weights", 4 * 3 * 4, FEATURES)
        add(f"{attention}.value_proj", FEATURES, FEATURES)
        add(f"{attention}.output_proj", FEATURES, FEATURES)
        add(f"{layer}.{ffn}.layers.0.0", 16, FEATURES)
        add(f"{layer}.{ffn}.layers.1", FEATURES, 16)
        add(f"{layer}.norms.0", FEATURES)
        add(f"{layer}.norms.1", FEATURES)
        layer = f"{head}.transformer_decoder.layers.{index}"
        for attention in (own, cross):
            made[f"{layer}.{attention}.attn.in_proj_weight"] = (3 * FEATURES, FEATURES)
            made[f"{layer}.{attention}.attn.in_proj_bias"] = (3 * FEATURES,)
            add(f"{layer}.{attention}.attn.out_proj", FEATURES, FEATURES)
        add(f"{layer}.{ffn}.layers.0.0", 24, FEATURES)
        add(f"{layer}.{ffn}.layers.1", FEATURES, 24)
        for norm in range(3):
            add(f"{layer}.norms.{norm}", FEATURES)
    add(f"{head}.transformer_decoder.post_norm", FEATURES)
    made[f"{head}.query_embed.weight"] = made[f"{head}.query_feat.weight"] = (NUM_QUERIES, FEATURES)
    add(f"{head}.cls_embed", 81, FEATURES)
    for index in (0, 2, 4):
        add(f"{head}.mask_embed.{index}", FEATURES, FEATURES)
    return made


def state_dict(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes(version).items()}
    # Offsets of rows and columns between two places in a window, counted from the smallest.
    places = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
    offsets = places[:, None] - places[None] + WINDOW - 1
    for name in [name for name in state if name.endswith("bias_table")]:
        index = offsets[..., 0] * (2 * WINDOW - 1) + offsets[..., 1]
        state[name.replace("bias_table", "index")] = index
    return state


def save(path, state):
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 50}, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_every_tensor_has_its_place(tmp_path, version):
    state = state_dict(version)
    # Fails where transformers misses a tensor or has one of another shape.
    network = mmdet_network(save(tmp_path / "mask2former.pth", state), mask2former_config())
    ours = {name: value.numpy() for name, value in network.state_dict().items()}

    def only(*parts):
        (found,) = [value for name, value in ours.items() if all(part in name for part in parts)]
        return found

    own, cross = ("attentions.1", "attentions.0") if version == 2 else ("self_attn", "cross_attn")
    layer = "panoptic_head.transformer_decoder.layers.1."
    for index, part in enumerate("qkv"):
        rows = state[f"{layer}{own}.attn.in_proj_weight"][32 * index : 32 * (index + 1)].numpy()
        assert (only("transformer_module", f"layers.1.self_attn.{part}_proj.weight") == rows).all()
    assert (only("layers.1.cross_attn.in_proj_weight") == state[f"{layer}{cross}.attn.in_proj_weight"].numpy()).all()
    for index, norm in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
        theirs = state[f"{layer}norms.{index}.weight"].numpy()
        assert (only("transformer_module", f"layers.1.{norm}.weight") == theirs).all()
    assert (only("hidden_states_norms.stage2.weight") == state["backbone.norm1.weight"].numpy()).all()
    assert (
        only("pixel_level_module", "level_embed") == state["panoptic_head.pixel_decoder.level_encoding.weight"].numpy()
    ).all()
    assert (only("transformer_module.level_embed") == state["panoptic_head.level_embed.weight"].numpy()).all()
    # Nothing is used twice, and nothing is left: but for the two kinds of tensors that say nothing.
    known = np.sort(np.concatenate([value.numpy().ravel() for name, value in state.items() if "index" not in name]))
    used = [value.ravel() for name, value in ours.items() if "criterion" not in name and ".swin.layernorm." not in name]
    assert (np.sort(np.concatenate([values for values in used if values.dtype == np.float32])) == known).all()


def test_patches_are_merged_in_another_order():
    # mmdetection: torch.nn.Unfold. transformers, as Swin's authors: four strided views one after the other.
    x = torch.randn(2, 5, 6, 8)
    theirs = torch.nn.Unfold(kernel_size=2, stride=2)(x).transpose(1, 2)
    rows, columns = slice(0, None, 2), slice(1, None, 2)
    views = [x[:, :, a, b] for a, b in ((rows, rows), (columns, rows), (rows, columns), (columns, columns))]
    ours = torch.cat(views, dim=1).flatten(2).transpose(1, 2)
    weight = torch.randn(7, 20)
    assert torch.equal(by_patch(theirs), ours)
    assert torch.allclose(theirs @ weight.T, ours @ by_patch(weight).T, atol=1e-5)


def test_files_of_something_else(tmp_path):
    state = state_dict(2)
    config = mask2former_config()
    with pytest.raises(CheckpointError, match=r"panoptic_head.extra.weight is no tensor of Mask2Former with Swin"):
        mmdet_network(save(tmp_path / "a.pth", state | {"panoptic_head.extra.weight": torch.zeros(1)}), config)
    cut = {name: value for name, value in state.items() if name != "panoptic_head.cls_embed.bias"}
    with pytest.raises(CheckpointError, match=r"b.pth: class_predictor.bias is missing"):
        mmdet_network(save(tmp_path / "b.pth", cut), config)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"c.pth: holds no state_dict"):
        mmdet_network(tmp_path / "c.pth", config)
    torch.save({"state_dict": state, "meta": CheckpointError}, tmp_path / "d.pth")
    with pytest.raises(
        CheckpointError, match=r"d.pth: needs .*CheckpointError to be unpickled, which could run any code"
    ):
        mmdet_network(tmp_path / "d.pth", config)
