"""How images that are only context were laid in training: what an import reads of it, and what an export says."""

from __future__ import annotations

import shutil
from pathlib import Path

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.integrity import write_manifest
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from tests.released import as_a_run, edit_config, read_json


def exported(run: Path, out: Path) -> dict[str, object]:
    export_release(open_checkpoint(run), out)
    return {key: value for key, value in read_json(out / "config.json").items() if key == "bitdance_context"}


def test_the_release_does_not_say_it_and_means_plain(imported, tmp_path):
    assert open_checkpoint(imported).network.vision.context == "plain"
    assert exported(imported, tmp_path / "out") == {}


def test_queries_are_said_and_kept(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    edit_config(copy, bitdance_context="queries")
    import_release(open_source(copy, None), tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").network.vision.context == "queries"
    assert exported(tmp_path / "run", tmp_path / "out") == {"bitdance_context": "queries"}


def test_a_run_of_an_earlier_version_had_queries(imported, tmp_path):
    def without_context(run: Path) -> Path:
        config = find_checkpoint(run) / "config.toml"
        lines = config.read_text().splitlines(keepends=True)
        assert 'context = "plain"\n' in lines
        config.write_text("".join(line for line in lines if not line.startswith("context = ")))
        (config.parent / "manifest.json").unlink()
        write_manifest(config.parent)
        return run

    run = without_context(as_a_run(imported, tmp_path / "run", steps=0))
    assert exported(run, tmp_path / "of_run") == {"bitdance_context": "queries"}
    # An import has described nothing, and is of a release.
    earlier_import = without_context(shutil.copytree(imported, tmp_path / "earlier_import"))
    assert exported(earlier_import, tmp_path / "of_import") == {}
