"""The card of an export: what it takes from a run's files, from the folders before it, and from the user."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.export_adapter import export_adapter
from bitdance_scale.checkpoint.export_card import ShareOptions, export_facts
from bitdance_scale.checkpoint.export_merged import merge_folder, merged_release, merged_run
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.integrity import write_manifest
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import NewParts, open_source
from bitdance_scale.checkpoint.run_adapters import open_run_adapters
from bitdance_scale.checkpoint.shared_base import describe_base
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.cli.export_release import main
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.score_file import Scores, write_scores
from bitdance_scale.observe.benchmark_scores import BenchmarkScores
from bitdance_scale.observe.metrics import Evaluation, StepMetrics
from bitdance_scale.observe.sample_grids import samples_path
from bitdance_scale.sharing.card import card_text
from bitdance_scale.sharing.licences import licence_text
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REFUSED
from tests.adapted import LORA, write_adapted_run
from tests.released import HEAD, as_a_run, class_file_content, read_json, write_autoencoder, write_plain_qwen3

SETTINGS = """
[data]
global_batch = 8
text_drop = 0.1

[[data.sources]]
name = "web"
share = 3
shards = ["s3://bucket/web", "https://huggingface.co/datasets/someone/pictures/resolve/main/a.tar"]

[[data.sources]]
name = "own|`x`"
share = 1
shards = ["https://me:hunter2@host/own.tar"]

[[data.filters]]
column = "aspect"
max = 2.0

[[data.resolutions]]
side_px = 64
share = 1
buckets_px = [[64, 64], [64, 96]]

[optim]
lr = 1e-4

[sample]
prompts = ["a red circle", "a `blue` <square>"]
size_px = [64, 96]

[[evaluate.benchmarks]]
benchmark = "demo-scenes"
weights = "averaged"
"""


@pytest.fixture(scope="module")
def licensed(published, tmp_path_factory) -> Path:
    """An import of a published folder that states its licence, as Hugging Face's cache has it."""
    folder = tmp_path_factory.mktemp("hub")
    snapshot = shutil.copytree(published, folder / "models--someone--BitDance-S/snapshots/abc")
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# BitDance-S\n")
    import_release(open_source(snapshot, None), folder / "imported")
    shutil.rmtree(folder / "models--someone--BitDance-S")
    return folder / "imported"


@pytest.fixture
def run(licensed, tmp_path) -> Path:
    """The import as a run at step 0 of 10, with files that a run writes."""
    run = as_a_run(licensed, tmp_path / "sft_small", 10)
    change_file(run, lambda text: text + SETTINGS)
    metrics = dict.fromkeys((field.name for field in dataclasses.fields(StepMetrics)), 1.0)
    metrics |= {"step": 0, "images_by_resolution": {}, "sample_errors": {}, "images_by_source": {}, "loss_vision": 0.25}
    later = metrics | {"step": 5, "loss_vision": 0.125}
    write_lines(run / "metrics.jsonl", metrics, later)
    write_lines(run / "evaluation.jsonl", dataclasses.asdict(Evaluation(0, 0.5, {64: 0.5}, (0.5,), 0.75)))
    scores = BenchmarkScores(
        0, "demo-scenes", "scenes", {"overall": 0.5}, {"overall": 0.25}, {"overall": 0.75}, 24, 1.0
    )
    write_lines(run / "benchmarks.jsonl", dataclasses.asdict(scores), dataclasses.asdict(scores) | {"step": 3})
    samples_path(run, 0).parent.mkdir()
    samples_path(run, 0).write_bytes(b"a picture")
    return run


def change_file(run: Path, change: Callable[[str], str], file: str = "config.toml") -> None:
    """Changes a file of a run's checkpoint."""
    checkpoint = find_checkpoint(run)
    path = checkpoint / file
    path.write_text(change(path.read_text()))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def write_lines(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def card_of(where: Path, **options) -> tuple[dict, str]:
    """(fields, text) of the card of a checkpoint."""
    text = card_text(export_facts(open_checkpoint(where), ShareOptions(**options)))
    return yaml.safe_load(text.split("---\n")[1]), text


def score_file(folder: Path, metric: str = "geneval") -> Path:
    images = tuple(
        ImageScore(f"{i}", 0, "single_object", i % 2, {"single_object": (float(i % 2), 1.0)}) for i in range(8)
    )
    return write_scores(folder, Scores(metric, "geneval", "sft_small", {}, {}, {}, images))


class TestRun:
    def test_what_the_files_of_the_run_say(self, run):
        fields, text = card_of(run)
        assert fields["license"] == "apache-2.0"
        assert (fields["base_model"], fields["base_model_relation"]) == ("someone/BitDance-S", "finetune")
        assert fields["datasets"] == ["someone/pictures"]
        assert (fields["pipeline_tag"], fields["library_name"]) == ("text-to-image", "bitdance_scale")
        for words in (
            "run `sft_small` (supervised fine-tuning) after 0 of 10 steps",
            "| web, 3 of 4 parts | s3://bucket/web, https://huggingface.co/datasets/someone/pictures",
            "| own\\|\\`x\\`, 1 of 4 parts | https://\\*\\*\\*@host/own.tar |",
            "| filter | aspect: max 2 |",
            "| resolution 64 px | share 1; 64 x 64, 64 x 96 px (height x width) |",
            "| batch | 8 images |",
            "| learning rate | 0.0001 |",
            "| training, flow | 0.2500 | 0 |",
            "| held out, text (nats) | 0.7500 | 0 |",
            "| demo-scenes | scenes | 0.5000 | 0.2500 to 0.7500 | 24 | this run, step 0, averaged weights |",
            "The prompts, row by row: `a red circle`, ``a `blue` <square>``.",
            "--size 64x96",
            "- BitDance-S (someone/BitDance-S): BitDance",
            "The run had not finished",
            "This card is generated.",
        ):
            assert words in text
        # Of later steps than the checkpoint's.
        assert "0.1250" not in text and "step 3" not in text
        assert "hunter2" not in text

    def test_what_the_user_says(self, run, tmp_path):
        file = tmp_path / "terms.txt"
        file.write_text("Terms")
        fields, text = card_of(
            run,
            licence="other",
            licence_name="ours: 1",
            licence_file=file,
            model_name="Mine: <b>",
            base_model="x/y",
            authors=("A & B",),
            scores=(score_file(tmp_path),),
        )
        assert (fields["license"], fields["license_name"], fields["model_name"]) == ("other", "ours: 1", "Mine: <b>")
        assert fields["base_model"] == "x/y"
        assert "- A \\& B" in text and "# Mine: \\<b\\>" in text
        row = next(line for line in text.split("\n") if line.startswith("| geneval | geneval |"))
        assert row.split(" | ")[2] == "0.5000" and row.endswith("model sft\\_small (geneval.json) |")

    def test_a_run_without_files(self, run):
        for name in ("metrics.jsonl", "evaluation.jsonl", "benchmarks.jsonl"):
            (run / name).unlink()
        shutil.rmtree(run / "samples")
        _, text = card_of(run)
        assert "## Losses" not in text and "## Scores" not in text and "samples.png" not in text
        assert "No score of a benchmark was with the run" in text

    def test_the_runs_before_it(self, run, tmp_path):
        later = shutil.copytree(run, tmp_path / "later")
        change_file(later, lambda text: text.replace('start_from = "', 'start_from = "runs/sft_small" # "'))
        _, text = card_of(later)
        started = "- run sft\\_small, supervised fine-tuning, which is at step 0 of 10\n"
        assert f"{started}- BitDance-S (someone/BitDance-S): BitDance\n" in text
        shutil.rmtree(run)
        for start in ("runs/sft_small", "s3://bucket/runs/sft_small/checkpoints/step_00000005"):
            change_file(later, functools.partial(re.sub, 'start_from = "[^"]*"', f'start_from = "{start}"'))
            _, text = card_of(later)
            assert (
                "- sft\\_small: the run or import of this name, which is not at hand any more\n- BitDance-S "
            ) in text
            assert "random initial weights" not in text

    def test_weights_that_began_at_random(self, run):
        change_file(run, lambda text: json.dumps(json.loads(text) | {"release": {}}), "train_state.json")
        change_file(run, lambda text: re.sub('start_from = "[^"]*"', 'start_from = ""', text))
        fields, text = card_of(run)
        assert "## Where it comes from\n\n- random initial weights\n" in text
        assert fields["license_name"] == "not-stated" and "base_model" not in fields


class TestImport:
    def test_it_was_not_trained(self, licensed):
        fields, text = card_of(licensed)
        assert "base_model_relation" not in fields and fields["base_model"] == "someone/BitDance-S"
        assert "converted and not trained any further" in text and "## Training" not in text

    def test_a_folder_that_says_nothing(self, imported):
        fields, text = card_of(imported)
        assert (fields["license"], fields["license_name"]) == ("other", "not-stated")
        assert "base_model" not in fields and "**No licence is stated.**" in text

    def test_an_export_without_a_licence_stays_without_one(self, imported, tmp_path):
        export_release(open_checkpoint(imported), tmp_path / "export")
        import_release(open_source(tmp_path / "export", None), tmp_path / "again")
        fields, text = card_of(tmp_path / "again")
        assert fields["license_name"] == "not-stated" and "**No licence is stated.**" in text

    def test_a_class_conditional_network(self, tmp_path):
        # A file says nothing of its licence: what lies beside it may be of something else.
        (tmp_path / "LICENSE").write_text(licence_text("apache-2.0"))
        torch.save({"model": class_file_content()}, tmp_path / "file.pt")
        import_release(open_class_source(PickledFile(tmp_path / "file.pt")), tmp_path / "imported")
        fields, text = card_of(tmp_path / "imported")
        assert "pipeline_tag" not in fields and "class-conditional" in fields["tags"]
        assert fields["license_name"] == "not-stated" and "bitdance import model.pt imported" in text
        export_release(open_checkpoint(tmp_path / "imported"), tmp_path / "out")
        assert {"README.md", "LICENSE", "model.safetensors"} < {path.name for path in (tmp_path / "out").iterdir()}

    @pytest.mark.parametrize(("beside", "expected"), [("", "other"), ("apache-2.0", "apache-2.0"), ("mit", "other")])
    def test_a_qwen3_needs_the_licence_of_the_autoencoder_too(self, tmp_path, beside, expected):
        qwen3, autoencoder = write_plain_qwen3(tmp_path / "qwen3"), write_autoencoder(tmp_path / "ae")
        (qwen3 / "LICENSE").write_text(licence_text("apache-2.0"))
        if beside:
            (tmp_path / "ae/README.md").write_text(f"---\nlicense: {beside}\n---\n")
        parts = NewParts(autoencoder=autoencoder, head_width=HEAD.width, head_blocks=2, head_adaln=1)
        import_release(open_source(qwen3, parts), tmp_path / "imported")
        fields, text = card_of(tmp_path / "imported")
        assert fields["license"] == expected
        assert "- qwen3: a plain language model, to which head and projector were added" in text

    @pytest.mark.parametrize(("beside", "is_kept"), [("Terms", True), ("Other terms", False)])
    def test_licences_without_an_id_are_compared_by_their_text(self, tmp_path, beside, is_kept):
        for name, text in (("qwen3", "Terms"), ("ae", beside)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "LICENSE").write_text(text)
        kept = describe_base(tmp_path / "qwen3", tmp_path / "ae")["licence"]
        assert (kept is not None) == is_kept


@pytest.fixture(scope="module")
def style(imported, tmp_path_factory) -> Path:
    """A run with adapters beside the import."""
    section = dataclasses.replace(LORA, train_projector=True, train_queries=True)
    return write_adapted_run(imported, tmp_path_factory.mktemp("runs") / "style", section)


@pytest.fixture(scope="module")
def other(imported, tmp_path_factory) -> Path:
    section = dataclasses.replace(LORA, targets=("q_proj",), rank=2, alpha=2.0)
    return write_adapted_run(imported, tmp_path_factory.mktemp("runs") / "other", section, seed=1)


def num_linears(run: Path) -> int:
    return len(open_run_adapters(run).source.matrices)


def adapters_of(run: Path, out: Path, **options) -> Path:
    export_adapter(open_run_adapters(run), out, options=ShareOptions(**options))
    return out


def merged_card(published: Path, adapters: list[str], out: Path, **options) -> tuple[dict, str]:
    merge_folder(published, parse_adapters(adapters), out, options=ShareOptions(**options))
    text = (out / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1]), text


class TestAdapters:
    """Which base the card and PEFT's configuration name."""

    def bases(self, start: Path, tmp_path: Path, **options) -> tuple[str, str | None]:
        """(PEFT's base, the card's) of adapters that were trained beside `start`."""
        run = write_adapted_run(start, tmp_path / "adapted", dataclasses.replace(LORA, targets=("q_proj",)))
        folder = adapters_of(run, tmp_path / "out", **options)
        fields = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
        return read_json(folder / "adapter_config.json")["base_model_name_or_path"], fields.get("base_model")

    def test_of_an_import_it_is_the_folder_in_the_cache(self, licensed, tmp_path):
        assert self.bases(licensed, tmp_path) == ("someone/BitDance-S", "someone/BitDance-S")

    @pytest.mark.parametrize("said", ["", "me/trained"])
    def test_of_weights_that_a_run_has_trained_it_is_that_run(self, licensed, tmp_path, said):
        trained = as_a_run(licensed, tmp_path / "trained", 10)
        (trained / "conversion_report.json").unlink()
        assert self.bases(trained, tmp_path, base_model=said) == (said or str(trained), said or None)


class TestMerged:
    def test_a_folder_with_adapters_in_its_weights(self, published, style, other, tmp_path):
        folder = adapters_of(style, tmp_path / "my_style")
        scores = score_file(tmp_path)
        fields, text = merged_card(
            published,
            [f"{folder}=0.5", f"{other}=-2"],
            tmp_path / "out",
            base_model="someone/BitDance-S",
            authors=("A",),
            scores=(scores,),
        )
        assert (fields["base_model"], fields["base_model_relation"]) == ("someone/BitDance-S", "merge")
        assert (fields["license"], fields["license_name"]) == ("other", "not-stated")
        assert (fields["pipeline_tag"], fields["library_name"]) == ("text-to-image", "bitdance_scale")
        assert fields["model_name"] == f"{published.name} with my_style and other"
        for words in (
            "This card is generated.",
            f"These are the weights of `{published.name}`, into which adapters were merged: `my_style` times 0.5,",
            "`other` times -2; nothing was trained after that.",
            "| adapter | weight | linears | rank | scale | with them |",
            f"| my\\_style | 0.5 | {num_linears(style)} | 3 | 3.4641 | the projector of the bits and 15 query tokens |",
            "| other | -2 | 4 | 2 | 1.41421 |  |",
            "- adapters my\\_style, with weight 0.5, merged into the weights\n- adapters other, with weight -2, merged",
            "no training has seen this mixture",
            "| geneval | geneval | 0.5000",
            "bitdance sample FOLDER",
            "**No licence is stated.**",
            "- A",
        ):
            assert words in text, words
        assert "No licence has been stated" in (tmp_path / "out" / "LICENSE").read_text()
        # It is a folder as any other, with a licence of its own.
        import_release(open_source(tmp_path / "out", None), tmp_path / "again")
        assert card_of(tmp_path / "again")[0]["license_name"] == "not-stated"

    def test_one_adapter_as_it_was_trained(self, published, style, tmp_path):
        _, text = merged_card(published, [str(style)], tmp_path / "out", model_name="Mine")
        assert "# Mine\n" in text and "an adapter was merged: `style` times 1; nothing was trained" in text
        assert "no training has seen" not in text and "only sizes were compared" not in text

    @pytest.mark.parametrize(
        ("of_adapters", "said", "expected"),
        [("apache-2.0", "", "apache-2.0"), ("", "", "other"), ("", "apache-2.0", "apache-2.0")],
    )
    def test_a_licence_needs_that_of_all_parts(self, published, style, tmp_path, of_adapters, said, expected):
        base = shutil.copytree(published, tmp_path / "base")
        (base / "LICENSE.txt").write_text(licence_text("apache-2.0"))
        folder = adapters_of(style, tmp_path / "style", licence=of_adapters)
        fields, _ = merged_card(base, [str(folder)], tmp_path / "out", licence=said)
        assert fields["license"] == expected
        licence = (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8")
        assert (licence == licence_text("apache-2.0")) == (expected == "apache-2.0")
        assert not (tmp_path / "out" / "LICENSE.txt").exists()

    def test_what_does_not_say_its_base(self, published, style, tmp_path):
        folder = adapters_of(style, tmp_path / "style")
        (folder / "bitdance_adapter.json").unlink()
        for name in ("head_adapter", "projector", "query_tokens"):
            (folder / f"{name}.safetensors").unlink()
        _, text = merged_card(published, [str(folder)], tmp_path / "out")
        assert "`style` does not say beside which weights it was trained: only sizes were compared." in text

    def test_a_run_with_adapters_of_others_beside_its_own(self, style, other):
        export = merged_run(open_run_adapters(style), parse_adapters([f"{other}=2"]))
        text = card_text(export_facts(export, ShareOptions()))
        assert "of run `toy` " in text
        assert "Beside those of the run, an adapter was merged: `other` times 2; nothing was trained" in text
        row = f"| style | 1 | {num_linears(style)} | 3 |"
        assert row in text and "| other | 2 | 4 | 2 |" in text
        own = card_text(export_facts(merged_run(open_run_adapters(style)), ShareOptions()))
        assert "Beside those" not in own and row in own and "only sizes" not in own

    def test_an_import_with_adapters(self, imported, other):
        export = merged_release(open_checkpoint(imported), parse_adapters([str(other)]))
        text = card_text(export_facts(export, ShareOptions(base_model="x/y")))
        assert "not trained any further" not in text and "an adapter was merged: `other` times 1" in text
        assert "base_model_relation: merge" in text


class TestRefusals:
    def test_before_anything_is_written(self, run, tmp_path, capsys):
        assert main([str(run), str(tmp_path / "out"), "--license", "mit"]) == EXIT_REFUSED
        assert "--license-file" in capsys.readouterr().err
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

    def test_an_id_that_is_none(self, imported):
        with pytest.raises(ConfigError, match="--base-model 'Qwen3': must be an id of Hugging Face's"):
            card_of(imported, base_model="Qwen3")

    def test_files_of_scores(self, imported, tmp_path):
        with pytest.raises(DataError, match="missing.json: cannot be read"):
            card_of(imported, scores=(tmp_path / "missing.json",))
        with pytest.raises(ConfigError, match="--scores .*metric = 'unknown': must be one of"):
            card_of(imported, scores=(score_file(tmp_path, "unknown"),))

    def test_a_damaged_file_of_the_run(self, run):
        (run / "benchmarks.jsonl").write_text("{}\n{}\n")
        with pytest.raises(DataError, match="benchmarks.jsonl, line 1"):
            card_of(run)


def test_the_command_writes_card_and_licence(run, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "out"), "--layout", "diffusers", "--authors", "A", "B"]) == EXIT_COMPLETE
    out = tmp_path / "out"
    assert (out / "samples.png").read_bytes() == b"a picture"
    assert (out / "LICENSE").read_text(encoding="utf-8") == licence_text("apache-2.0")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "DiffusionPipeline.from_pretrained" in text and "- A\n- B\n" in text
    assert "README.md: a generated card, licence apache-2.0" in capsys.readouterr().out
