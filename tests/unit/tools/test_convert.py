"""The conversion tools as a user runs them: what transformers 4.57 and 5 load, and how much memory is used."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.published_files import TensorFileWriter
from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.published_backbone import read_model
from bitdance_scale.config.schema import HeadSection, NetworkConfig, TextSection, VisionSection
from bitdance_scale.model.published_names import Part, published_tensors
from bitdance_scale.weight_files import TensorSpec
from tests.adapted import write_adapted_run
from tests.released import AUTOENCODER, edit_config, read_json, write_autoencoder, write_plain_qwen3, write_published

ROOT = Path(__file__).parents[3]
RELEASE_TRANSFORMERS = Path(sys.prefix) / "transformers-4.57"
GIB = 2**30

# Loads a folder as the published pipeline does and prints what it found.
LOAD = """
import json, sys, torch, transformers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
folder, prompt = sys.argv[1:]
config = Qwen3Config.from_pretrained(folder)
model = Qwen3ForCausalLM.from_pretrained(folder, config=config).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.encode(prompt)
with torch.no_grad():
    hidden = model.float().model(torch.tensor([ids])).last_hidden_state[0]
print(json.dumps({
    "version": transformers.__version__, "dtype": str(config.dtype), "num_entries": len(tokenizer),
    "ids": ids, "query": tokenizer.convert_tokens_to_ids("<|query_15|>"), "hidden": hidden.tolist(),
}))
"""
PROMPT = "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n<|vision_start|><|res_4|><|query_1|>"


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@functools.cache
def load_with(version: str, folder: Path) -> dict[str, object]:
    """What a version of transformers finds in a folder, in a process of its own."""
    environment = dict(os.environ)
    if version == "4.57":
        assert RELEASE_TRANSFORMERS.is_dir(), "transformers 4.57 is not installed beside this one; run make setup"
        environment["PYTHONPATH"] = str(RELEASE_TRANSFORMERS)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), PROMPT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith(version)
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen3, imported and exported by the tools."""
    folder = tmp_path_factory.mktemp("tools")
    qwen3, autoencoder = write_plain_qwen3(folder / "qwen3"), write_autoencoder(folder / "autoencoder")
    done = run_tool(
        "convert_from_hf.py", qwen3, folder / "run", "--autoencoder", autoencoder, "--head-width", 128, "--seed", 3
    )
    assert done.returncode == 0 and "run.start_from=" in done.stdout, done.stderr
    done = run_tool("convert_to_hf.py", folder / "run", folder / "out")
    assert done.returncode == 0 and "step 0 of" in done.stdout and "100%" in done.stderr, done.stderr
    return folder / "out"


def test_both_versions_of_transformers_load_the_same(exported: Path) -> None:
    old, new = load_with("4.57", exported), load_with("5.", exported)
    for key in ("dtype", "num_entries", "ids", "query"):
        assert old[key] == new[key], key
    assert old["dtype"] == "torch.bfloat16" and len(old["ids"]) < len(PROMPT)
    # float32 on the same weights; the versions order their operations differently.
    torch.testing.assert_close(torch.tensor(old["hidden"]), torch.tensor(new["hidden"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("version", "key"), [("4.57", "rope_theta"), ("5.", "rope_parameters")])
def test_each_version_needs_its_own_name_of_the_rotary_base(exported: Path, tmp_path: Path, version, key) -> None:
    """Why both are written: without its own, a version computes something else, and says nothing."""
    copy = shutil.copytree(exported, tmp_path / "copy")
    assert read_json(copy / "config.json")["rope_theta"] == 1e6
    edit_config(copy, **{key: 123.0 if key == "rope_theta" else {"rope_type": "default", "rope_theta": 123.0}})
    wanted = torch.tensor(load_with(version, exported)["hidden"])
    assert not torch.allclose(torch.tensor(load_with(version, copy)["hidden"]), wanted, atol=1e-2)


def test_refusals_are_one_line(tmp_path: Path) -> None:
    for name in ("convert_from_hf.py", "convert_to_hf.py"):
        done = run_tool(name, tmp_path / "nothing", tmp_path / "out")
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 2 and line.startswith("CheckpointError: ")


class Layers:
    """A published folder of 2.1 B parameters: six layers of the 14B's shape, a small vocabulary and head."""

    network = NetworkConfig(
        model=read_model(
            {
                "architectures": ["Qwen3ForCausalLM"],
                "model_type": "qwen3",
                "num_hidden_layers": 6,
                "hidden_size": 5120,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 17408,
                "vocab_size": 1,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                "rope_theta": 1e6,
            },
            "here",
        ),
        head=HeadSection(width=128, num_blocks=2, num_adaln=1),
        vision=VisionSection(weights="", **AUTOENCODER),
        text=TextSection(path=""),
    )

    @classmethod
    def write(cls, folder: Path) -> int:
        """Writes the folder; returns the bytes of the largest tensor."""
        write_published(folder, head=cls.network.head)
        vocab_size = read_json(folder / "config.json")["vocab_size"]
        model = cls.network.model
        edit_config(
            folder,
            num_hidden_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.ffn_size,
            layer_types=["full_attention"] * model.num_layers,
        )
        edit_config(folder, "vision_head_config.json", ch_cond=model.hidden_size)
        files = {Part.BACKBONE: "model", Part.HEAD: "vision_head", Part.PROJECTOR: "projector"}
        tensors = published_tensors(cls.network, vocab_size)
        assert sum(torch.Size(tensor.shape).numel() for tensor in tensors) > 2e9
        largest = 0
        for part, name in files.items():
            (folder / f"{name}.safetensors").unlink()
            specs = {t.name: TensorSpec(t.shape, torch.bfloat16) for t in tensors if t.part is part}
            with TensorFileWriter(folder / f"{name}.safetensors", specs) as writer:
                for number, (key, spec) in enumerate(specs.items()):
                    largest = max(largest, spec.num_bytes)
                    for values in cls._values(number, spec):
                        writer.write(key, values)
        return largest

    @staticmethod
    def _values(number: int, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """Values that differ from tensor to tensor and along a tensor, made quickly."""
        num_elements = torch.Size(spec.shape).numel()
        part = torch.randn(min(num_elements, 2**24), generator=torch.Generator().manual_seed(number)).bfloat16()
        for start in range(0, num_elements, len(part)):
            yield part[: num_elements - start]


def peak_bytes(name: str, *arguments: object) -> int:
    """Runs a tool and returns the most resident memory that it had, mapped files included."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(a folder that holds `published`, of 2.1 B parameters; bytes of memory that a conversion may take)."""
    folder = tmp_path_factory.mktemp("layers")
    largest = Layers.write(folder / "published")
    bound = 1.5 * largest + GIB
    total = sum(path.stat().st_size for path in (folder / "published").glob("*.safetensors"))
    assert total > 3 * bound, "a conversion that holds the model would pass"
    return folder, bound


@pytest.mark.large
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_model(layers: tuple[Path, float]) -> None:
    folder, bound = layers
    assert peak_bytes("convert_from_hf.py", folder / "published", folder / "run") < bound
    assert peak_bytes("convert_to_hf.py", folder / "run", folder / "out") < bound
    # The report's digests are of what was read back; of a few tensors they are compared with the source itself.
    digests = [read_json(folder / name / "conversion_report.json")["tensor_sha256"] for name in ("run", "out")]
    assert digests[0] == {key: value for part in digests[1].values() for key, value in part.items()}
    wanted, found = (load_file(folder / name / "projector.safetensors") for name in ("published", "out"))
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.large
@pytest.mark.timeout(900)
def test_nor_in_the_layout_of_diffusers(layers: tuple[Path, float]) -> None:
    folder, bound = layers
    if not (folder / "run").is_dir():
        peak_bytes("convert_from_hf.py", folder / "published", folder / "run")
    assert peak_bytes("convert_to_hf.py", folder / "run", folder / "diffusers", "--layout", "diffusers") < bound
    assert peak_bytes("convert_from_hf.py", folder / "diffusers", folder / "again") < bound
    digests = [read_json(folder / name / "conversion_report.json")["tensor_sha256"] for name in ("run", "again")]
    assert digests[0] == digests[1]


@pytest.mark.large
@pytest.mark.timeout(900)
def test_nor_where_adapters_are_merged(layers: tuple[Path, float]) -> None:
    """Whole linears would be three copies in float32."""
    folder, bound = layers
    if not (folder / "run").is_dir():
        peak_bytes("convert_from_hf.py", folder / "published", folder / "run")
    write_adapted_run(folder / "run", folder / "adapted", LoraSection(rank=16))
    peak = peak_bytes("convert_to_hf.py", folder / "adapted", folder / "merged", "--merge")
    assert peak < bound, f"{peak / 1e6:.0f} MB"
    names = [f"model.layers.5.mlp.{name}.weight" for name in ("gate_proj", "down_proj")]
    digests = [read_json(folder / name / "conversion_report.json")["tensor_sha256"] for name in ("run", "merged")]
    assert all(digests[0][name] != digests[1]["backbone"][name] for name in names)
    kept = "model.layers.5.input_layernorm.weight"
    assert digests[0][kept] == digests[1]["backbone"][kept]
