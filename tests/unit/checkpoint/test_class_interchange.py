"""Published class-conditional files: imported, exported again byte by byte, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.autoencoder_source import import_autoencoder, open_autoencoder
from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.cli.import_release import main
from bitdance_scale.config.load import load_network
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.published_class import deduced_network, described
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.published_names import our_tensors, published_tensors
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.tokenizer import VisionTokenizer
from tests.released import CLASS_AUTOENCODER, class_file_content, read_json, write_autoencoder

Content = dict[str, dict[str, torch.Tensor]]
INT8 = torch.int8
UNREAD = {
    "steps": 7,
    "rng": {"torch": torch.zeros(8, dtype=torch.uint8)},
    "optimizer": {"exp_avg.x": torch.zeros(2), "step": 5},
}
"""What a training script saves beside weights."""


@pytest.fixture(scope="module")
def content() -> dict[str, torch.Tensor]:
    return class_file_content()


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def converted(path: Path, folder: Path, **options: object) -> tuple[Path, Path]:
    """(import, export of it)."""
    import_release(open_class_source(PickledFile(path), **options), folder / "run")
    export_release(open_checkpoint(folder / "run"), folder / "out")
    return folder / "run", folder / "out"


def assert_same(found: Content, wanted: Content) -> None:
    assert {entry: {*tensors} for entry, tensors in found.items()} == {e: {*tensors} for e, tensors in wanted.items()}
    for entry, tensors in wanted.items():
        for name, tensor in tensors.items():
            other = found[entry][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(other.contiguous().view(-1).view(INT8), tensor.contiguous().view(-1).view(INT8)), name


def averages_of(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights with the same autoencoder."""
    return {name: tensor if name.startswith("vae.") else tensor * 0.75 for name, tensor in content.items()}


class TestRoundTrip:
    @pytest.mark.parametrize("block_side", [1, 2])
    def test_every_tensor_comes_back(self, tmp_path, block_side):
        trained = class_file_content(block_side=block_side)
        wanted = {"model": trained, "ema": averages_of(trained)}
        run, out = converted(saved(tmp_path / "a.pt", wanted | UNREAD), tmp_path)
        assert read_json(run / "conversion_report.json")["notes"][0].endswith("a.pt: not read: steps; rng; optimizer")
        assert_same(torch.load(out / "model.pt", weights_only=True), wanted)
        # Of the two, the averages are what is drawn with.
        network = {
            name: tensor for name, tensor in wanted["ema"].items() if not name.startswith("vae.") and tensor.numel()
        }
        found = load_file(out / "model.safetensors")
        assert {*found} - {"query_token"} == {*network} - {"query_token"}
        assert all(torch.equal(found[name], tensor) for name, tensor in network.items())
        report = read_json(out / "conversion_report.json")
        assert {*report["tensor_sha256"]["ema"]} == {*trained}

    def test_a_file_of_averages_alone_stays_one(self, tmp_path):
        """With blocks of one token, and no tensor for the queries that it does not have."""
        content = class_file_content(block_side=1)
        del content["query_token"]
        run, out = converted(saved(tmp_path / "a.pt", {"ema": content}), tmp_path)
        assert_same(torch.load(out / "model.pt", weights_only=True), {"ema": content})
        stored = StoredTensors(find_checkpoint(run) / "tensors")
        assert not any(name.startswith("optimizer.") for name in stored.index.tensors)

    def test_dtypes_and_forms_are_kept(self, tmp_path, content):
        """bfloat16 with a float32 head; queries without a leading dimension; an autoencoder of its own."""
        content = {name: tensor for name, tensor in content.items() if not name.startswith("vae.")}
        content = {name: t if name.startswith("head.") else t.bfloat16() for name, t in content.items()}
        content["query_token"] = content["query_token"][0]
        state = Autoencoder(**CLASS_AUTOENCODER).state_dict()
        autoencoder = saved(tmp_path / "ae.pt", {"state_dict": state})
        path = saved(tmp_path / "a.pt", {"model": content})
        run, out = converted(path, tmp_path, autoencoder=autoencoder)
        assert_same(torch.load(out / "model.pt", weights_only=True), {"model": content})
        assert_same({"": load_file(run / "ae.safetensors")}, {"": state})

    def test_an_export_is_imported_with_the_sizes_beside_it(self, tmp_path):
        content = class_file_content(num_heads=4, head_head_dim=32)
        (tmp_path / "sizes.toml").write_text(sizes_toml(head_dim=32), encoding="utf-8")
        path = saved(tmp_path / "a.pt", {"model": content})
        run, out = converted(path, tmp_path, config=tmp_path / "sizes.toml")
        source = open_class_source(PickledFile(out / "model.pt"))
        assert source.network.model.num_heads == 4 and source.network.head.diff_batch_mul == 3
        assert dataclasses.replace(source.network, vision=None) == dataclasses.replace(
            load_network(run / "config.toml"), vision=None
        )


def sizes_toml(head_dim: int = 64, **changes: int) -> str:
    model = {"num_layers": 2, "hidden_size": 128, "ffn_size": 256, "head_dim": head_dim} | changes
    lines = [f"{name} = {value}" for name, value in model.items()]
    return "\n".join(
        [
            "[model]",
            'family = "class_conditional"',
            *lines,
            f"num_heads = {128 // head_dim}",
            f"num_kv_heads = {128 // head_dim}",
            "[head]",
            f"width = 64\nnum_blocks = 2\nnum_adaln = 1\ndiff_batch_mul = 3\nhead_dim = {head_dim}",
            "[classes]",
            "num_classes = 3\nnum_tokens = 4\ngrid = [4, 4]",
            "[vision]",
            'weights = "unused"\nnum_bits = 8\nblock_side = 2',
        ]
    )


class TestImport:
    def test_sizes_come_from_the_shapes(self, tmp_path, content):
        source = open_class_source(PickledFile(saved(tmp_path / "a.pt", {"model": content})))
        network = source.network
        assert (network.model.num_layers, network.model.hidden_size, network.model.num_heads) == (2, 128, 2)
        assert (network.head.width, network.head.num_blocks, network.head.num_adaln) == (64, 2, 1)
        assert network.head.diff_batch_mul == 4
        assert (network.classes.num_classes, network.classes.num_tokens, network.classes.grid) == (3, 4, (4, 4))
        assert (network.vision.block_side, network.vision.num_bits, network.vision.channel_mult) == (2, 8, (1, 1))

    @pytest.mark.parametrize("preset", ["bitdance-b", "bitdance-l", "bitdance-h"])
    @pytest.mark.parametrize("block_side", [1, 2, 4])
    def test_the_published_sizes_are_recognised(self, tmp_path, preset, block_side):
        """From the shapes of the nine published networks to their configurations."""
        path = tmp_path / "sizes.toml"
        text = f'[model]\npreset = "{preset}"\n[classes]\nnum_classes = 1000\n'
        path.write_text(text + f'[vision]\nweights = ""\nblock_side = {block_side}\n', encoding="utf-8")
        network = load_network(path)
        vocab_size = load_condition(network).vocab_size
        shapes = {tensor.name: tensor.shape for tensor in published_tensors(network, vocab_size)}
        found = deduced_network(shapes, "here")
        assert PRESETS[preset]["model"].items() <= vars(found.model).items()
        assert described(found).startswith(f"model.preset={preset} vision.block_side={block_side} ")
        shapes_of_ours = [
            {tensor.name: tensor.shape for tensor in our_tensors(n, vocab_size)} for n in (network, found)
        ]
        assert shapes_of_ours[0] == shapes_of_ours[1]

    def test_one_kind_of_weights_can_be_chosen(self, tmp_path, content):
        path = saved(tmp_path / "a.pt", {"model": content, "ema": averages_of(content)})
        assert main([str(path), str(tmp_path / "run"), "--weights", "averaged"]) == 0
        stored = StoredTensors(find_checkpoint(tmp_path / "run") / "tensors")
        wanted = averages_of(content)["norm.weight"]
        assert torch.equal(stored.read_rows("model.decoder.final_layernorm.weight", 0, 128), wanted)
        assert not any(name.startswith("optimizer.") for name in stored.index.tensors)

    def test_averages_of_a_run_can_be_published(self, tmp_path, content):
        path = saved(tmp_path / "a.pt", {"model": content, "ema": averages_of(content)})
        import_release(open_class_source(PickledFile(path)), tmp_path / "run")
        export_release(open_checkpoint(tmp_path / "run", weights="averaged"), tmp_path / "out")
        found = load_file(tmp_path / "out/model.safetensors")
        assert torch.equal(found["norm.weight"], averages_of(content)["norm.weight"])
        saved(tmp_path / "b.pt", {"model": content})
        import_release(open_class_source(PickledFile(tmp_path / "b.pt")), tmp_path / "plain")
        with pytest.raises(CheckpointError, match="has no averaged weights to export"):
            open_checkpoint(tmp_path / "plain", weights="averaged")

    def test_an_autoencoder_by_itself(self, tmp_path, capsys):
        state = Autoencoder(**CLASS_AUTOENCODER).state_dict()
        path = saved(tmp_path / "ae.pt", {"state_dict": state} | UNREAD)
        assert main([str(path), str(tmp_path / "ae")]) == 0
        assert f"note: {path}: not read: steps; rng; optimizer" in capsys.readouterr().err
        assert_same({"": load_file(tmp_path / "ae/ae.safetensors")}, {"": state})
        source = open_autoencoder(tmp_path / "ae/ae.safetensors")
        assert source.sizes == CLASS_AUTOENCODER | {"gan_decoder": False, "norm_groups": 32}
        # It loads, and draws.
        section = dataclasses.replace(load_network("demo").vision, weights=str(tmp_path / "ae/ae.safetensors"))
        section = dataclasses.replace(section, block_side=1, **source.sizes)
        assert VisionTokenizer(section, "cpu").encode([torch.zeros(8, 8, 3, dtype=torch.uint8)])[0].shape == (16, 1)

    def test_a_run_cannot_start_from_the_file_itself(self, tmp_path, content):
        path = saved(tmp_path / "a.pt", {"model": content})
        with pytest.raises(CheckpointError, match="a published file: import it first with `bitdance import"):
            find_checkpoint(path)


class Code:
    """What a pickle must not be allowed to name."""


def without(name: str):
    return lambda tensors: tensors.pop(name)


def replaced(name: str, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (without("norm.weight"), "norm.weight is missing, expected 1 dimension"),
            (without("emb_norm.weight"), r"`model`: emb_norm.weight is missing, expected \[128\]"),
            (
                without("layers.1.attention.wo.weight"),
                r"layers.1.attention.wo.weight is missing, expected \[128, 128\]",
            ),
            (lambda t: t.update(extra=torch.zeros(2)), "extra is no tensor of this network"),
            (lambda t: t.update({"head.net.extra": torch.zeros(2)}), "head.net.extra is no tensor of this network"),
            (
                replaced("query_token", lambda t: t[:, :2]),
                r"query_token has shape \[1, 2, 128\], expected .* a square P",
            ),
            (replaced("pos_for_diff.weight", lambda t: t[:15]), "pos_for_diff.weight has 15 rows, expected a square"),
            (replaced("layers.1.attention.wqkv.weight", lambda t: t[:256]), r"\[256, 128\], expected \[384, 128\]"),
            (replaced("head.net.cond_embed.bias", lambda t: t.half()), "is float16, expected float32 as the first"),
            (replaced("norm.weight", lambda t: t.double()), "norm.weight is float64; weights are float32, bfloat16"),
            (replaced("proj_in.w1.weight", lambda t: t[:, :7]), "reads 7 bits per token .* writes 8"),
            (without("vae.encoder.conv_in.weight"), "encoder.conv_in.weight missing or of another shape"),
            (without("vae.decoder.conv_out.bias"), r"decoder.conv_out.bias is missing, expected \[3\]"),
        ],
    )
    def test_tensors_that_do_not_fit(self, tmp_path, content, change, message):
        tensors = dict(content)
        change(tensors)
        path = saved(tmp_path / "a.pt", {"model": tensors})
        with pytest.raises(CheckpointError, match=message) as caught:
            open_class_source(PickledFile(path))
        assert str(path) in str(caught.value)

    def test_a_file_of_another_size_than_the_configuration(self, tmp_path, content):
        (tmp_path / "sizes.toml").write_text(sizes_toml(hidden_size=256, ffn_size=512), encoding="utf-8")
        path = saved(tmp_path / "a.pt", {"model": content})
        with pytest.raises(CheckpointError) as caught:
            open_class_source(PickledFile(path), config=tmp_path / "sizes.toml")
        message = str(caught.value)
        assert "cls_embedding.weight has shape [4, 512], expected [4, 1024]" in message
        assert "model.num_layers=2 model.hidden_size=128" in message and "vision.block_side=2" in message

    @pytest.mark.parametrize("name", ["layers.0.feed_forward.w1.weight", "vae.encoder.conv_in.weight"])
    def test_values_that_are_no_numbers(self, tmp_path, content, name):
        path = saved(tmp_path / "a.pt", {"model": content | {name: with_nan(content[name])}})
        source = open_class_source(PickledFile(path))
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            import_release(source, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_two_autoencoders(self, tmp_path, content):
        other = content | {"vae.encoder.conv_in.weight": content["vae.encoder.conv_in.weight"] + 1}
        file = PickledFile(saved(tmp_path / "a.pt", {"model": content, "ema": other}))
        with pytest.raises(CheckpointError, match="hold different autoencoders .* choose one with --weights trained"):
            open_class_source(file)
        assert open_class_source(file, weights="averaged").parts

    def test_autoencoder_named_twice_or_never(self, tmp_path, content):
        path = saved(tmp_path / "a.pt", {"model": content})
        with pytest.raises(CheckpointError, match="has its autoencoder .* leave --autoencoder out"):
            open_class_source(PickledFile(path), autoencoder=path)
        path = saved(tmp_path / "a.pt", {"model": {n: t for n, t in content.items() if not n.startswith("vae.")}})
        with pytest.raises(CheckpointError, match="has no autoencoder .* --autoencoder"):
            open_class_source(PickledFile(path))
        with pytest.raises(CheckpointError, match="holds model, expected `state_dict`"):
            open_class_source(PickledFile(path), autoencoder=path)

    def test_code_is_not_run(self, tmp_path, content):
        path = saved(tmp_path / "a.pt", {"model": content, "args": Code()})
        with pytest.raises(CheckpointError, match=r"a.pt: needs \S*Code to be unpickled.*save only its tensors"):
            PickledFile(path)

    def test_files_that_are_not_whole(self, tmp_path):
        whole = {"model": {"a": torch.randn(100, 4)}}
        path = saved(tmp_path / "a.pt", whole)
        bytes_ = path.read_bytes()
        path.write_bytes(bytes_[:-100])
        with pytest.raises(CheckpointError, match="no whole file of torch.save"):
            PickledFile(path)
        middle = len(bytes_) // 2
        path.write_bytes(bytes_[:middle] + bytes([bytes_[middle] ^ 1]) + bytes_[middle + 1 :])
        with pytest.raises(CheckpointError, match="damaged: the checksum of a/data/0"):
            PickledFile(path)
        saved(path, whole, _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match="saved by torch before 1.6: load it there and save it again"):
            PickledFile(path)
        with pytest.raises(CheckpointError, match="nothing.pt is missing"):
            PickledFile(tmp_path / "nothing.pt")

    @pytest.mark.parametrize(
        ("whole", "message"),
        [
            ([torch.zeros(2)], "holds list, expected a dictionary"),
            ({"optimizer": {"a": torch.zeros(2)}}, "holds optimizer, expected `model` or `ema`"),
            ({"model": {"a": torch.zeros(2, dtype=torch.int64)}}, "a is int64; weights are"),
            ({"model": {"a": torch.zeros(2), "b": 3}}, "'b' is int, expected a tensor by name"),
            ({"model": {"a": torch.zeros(2).to_sparse()}}, "a is a tensor of another kind .torch.sparse_coo"),
        ],
    )
    def test_files_of_other_things(self, tmp_path, whole, message):
        with pytest.raises(CheckpointError, match=message):
            open_class_source(PickledFile(saved(tmp_path / "a.pt", whole)))

    def test_weights_that_are_not_there(self, tmp_path, content):
        file = PickledFile(saved(tmp_path / "a.pt", {"model": content}))
        with pytest.raises(CheckpointError, match="--weights averaged: has no `ema`, only model"):
            open_class_source(file, weights="averaged")

    def test_an_autoencoder_of_other_tensors(self, tmp_path):
        state = Autoencoder(**CLASS_AUTOENCODER).state_dict() | {"loss.weight": torch.zeros(2)}
        file = PickledFile(saved(tmp_path / "ae.pt", {"state_dict": state}))
        with pytest.raises(CheckpointError, match="`state_dict`: loss.weight is no tensor of this network"):
            import_autoencoder(file, tmp_path / "out")

    def test_options_of_other_sources(self, tmp_path, content, capsys):
        path = saved(tmp_path / "a.pt", {"model": content})
        assert main([str(path), str(tmp_path / "run"), "--seed", "3"]) == 2
        assert "--seed: " in capsys.readouterr().err

    def test_safetensors_by_themselves(self, tmp_path, capsys):
        path = write_autoencoder(tmp_path / "ae")
        assert main([str(path), str(tmp_path / "run")]) == 2
        printed = capsys.readouterr().err
        for words in ("ae.safetensors: safetensors are not", "vision.weights=FILE", "--autoencoder", "model.pt"):
            assert words in printed
        assert not (tmp_path / "run").exists()
