"""Adapters between this program and PEFT over transformers' Qwen3, each reading what the other wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.export_adapter import export_adapter
from bitdance_scale.checkpoint.export_merged import merge_folder
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.run_adapters import open_run_adapters
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.lora_schema import BACKBONE_TARGETS, LoraSection
from bitdance_scale.generate.published_model import load_published
from tests.adapted import adapted_config, write_adapted_run
from tests.distributed.spawn import run_ranks
from tests.released import write_published

PEFT = Path(sys.prefix) / "adapters"
IDS = [5, 17, 250, 3, 99, 42, 7, 8, 120, 260, 31, 2]
OURS = {
    # As a list of modules; of some layers; and module by module.
    "everywhere": LoraSection(rank=4, alpha=8.0, targets=("q_proj", "gate_proj", "down_proj", "head.*"), dropout=0.1),
    "layers": LoraSection(rank=2, alpha=5.5, targets=("layers.[13].*",), rank_stabilized=True, train_projector=True),
    "uneven": LoraSection(
        rank=3, alpha=3.0, targets=("layers.0.*.q_proj", "layers.2.mlp.*", "head.*.w1"), train_queries=True
    ),
}
THEIRS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": [*BACKBONE_TARGETS]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"up_proj": 3},
    },
}
# Over the folder in float32: what it computes with our adapters; adapters of its own, what it computes with them, and
# what it merges them into.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM
published, out, ours, theirs, ids = json.loads(sys.argv[1])
base = lambda: Qwen3ForCausalLM.from_pretrained(published, dtype=torch.float32)
def hidden(model):
    with torch.no_grad():
        return model.eval().get_base_model().model(torch.tensor([ids])).last_hidden_state[0].contiguous()
states = {}
for name, folder in ours.items():
    model = PeftModel.from_pretrained(base(), folder)
    states[name] = hidden(model)
for name, settings in theirs.items():
    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    model.save_pretrained(Path(out) / name)
    states[name] = hidden(model)
    weights = model.merge_and_unload().state_dict()
    save_file({key: value.clone() for key, value in weights.items()}, Path(out) / f"{name}_merged.safetensors")
save_file(states, Path(out) / "states.safetensors")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A published folder in float32, its import, runs with adapters beside it, and what they export."""
    root = tmp_path_factory.mktemp("peft")
    published = write_published(root / "published", backbone_dtype=torch.float32)
    import_release(open_source(published, None), root / "imported")
    for name, section in OURS.items():
        run = write_adapted_run(root / "imported", root / "runs" / name, section)
        export_adapter(open_run_adapters(run), root / name)
    return root


@pytest.fixture(scope="module")
def states(root) -> dict[str, torch.Tensor]:
    """Hidden states [S, D] that PEFT computes, by adapter; what it writes is in `theirs`."""
    assert PEFT.is_dir(), "peft is not installed beside the environment; run make setup"
    (root / "theirs").mkdir()
    folders = {name: str(root / name) for name in OURS}
    arguments = [str(root / "published"), str(root / "theirs"), folders, THEIRS, IDS]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(PEFT)),
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # It says so where a file lacks matrices of a target.
    assert "missing" not in done.stderr, done.stderr
    return load_file(root / "theirs" / "states.safetensors")


def _unmerged(rank: int, root: Path) -> dict[str, torch.Tensor]:
    """Hidden states of the training model, frozen weights and adapters apart, from the checkpoints of the runs."""
    from bitdance_scale.model.positions import rotary_frequencies, rotary_table
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.still_run import load_still_run

    start_process_group(timeout_s=120)
    found = {}
    topology = make_topology(adapted_config(root / "imported", LoraSection()).parallel)
    for name, section in OURS.items():
        config = adapted_config(root / "imported", section)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dtype="float32"))
        checkpoint = find_checkpoint(root / "runs" / name)
        stage = load_still_run(config, checkpoint, "trained", topology).model.stages[0]
        mask = torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril()[None, None]
        angles = rotary_frequencies(torch.arange(len(IDS)), config.model.head_dim, config.model.rope_base)
        with torch.no_grad():
            rows = stage.embed_tokens(torch.tensor([IDS]))
            rotary = rotary_table(angles, False, torch.float32)
            found[name] = stage.decoder(rows, attention_mask=mask, rotary_pos_emb=rotary)[:, 0].clone()
    return found


def test_peft_computes_what_the_training_model_does(root, states):
    found = run_ranks(1, _unmerged, root)[0]
    assert found.keys() == OURS.keys()
    for name, hidden in found.items():
        # float32 rounding of four layers whose outputs are of order 1.
        torch.testing.assert_close(states[name], hidden, rtol=1e-5, atol=1e-5)
    plain = load_published(root / "published", torch.float32, torch.device("cpu")).backbone
    without = plain(torch.tensor([IDS])).last_hidden_state[0]
    assert all(float((hidden - without).abs().max()) > 0.01 for hidden in found.values()), "adapters change nothing"


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_a_model_with_adapters_computes_what_peft_does(root, states, name):
    """Merged when it is loaded, of folders that either program wrote."""
    folder = root / name if name in OURS else root / "theirs" / name
    adapters = parse_adapters([str(folder)])
    model = load_published(root / "published", torch.float32, torch.device("cpu"), adapters)
    hidden = model.backbone(torch.tensor([IDS])).last_hidden_state[0]
    torch.testing.assert_close(hidden, states[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_merged_weights_have_pefts_bytes(root, states, name, tmp_path):
    """`merge_and_unload` adds the same product in the same order."""
    merge_folder(root / "published", parse_adapters([str(root / "theirs" / name)]), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(root / "theirs" / f"{name}_merged.safetensors")
    assert found.keys() == wanted.keys()
    assert [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)] == []


def test_the_configuration_has_the_keys_that_peft_writes(root, states):
    theirs = json.loads((root / "theirs" / "plain" / "adapter_config.json").read_text())
    ours = json.loads((root / "everywhere" / "adapter_config.json").read_text())
    assert ours.keys() <= theirs.keys()
    wanted = {"target_modules": ["down_proj", "gate_proj", "q_proj"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    wanted |= {"base_model_name_or_path": str(root / "published"), "layers_to_transform": None}
    assert ours.items() >= wanted.items()
    # PEFT leaves out what a key adds, and this program does not write, as these.
    rest = {key: theirs[key] for key in ours.keys() - wanted.keys()}
    assert {key: ours[key] for key in rest} == rest | {"init_lora_weights": True}
    layers = json.loads((root / "layers" / "adapter_config.json").read_text())
    assert layers["layers_to_transform"] == [1, 3]
    assert layers["lora_alpha"] == 5.5
    names = [*load_file(root / "theirs" / "plain" / "adapter_model.safetensors")]
    assert {*load_file(root / "everywhere" / "adapter_model.safetensors")} <= {*names}
