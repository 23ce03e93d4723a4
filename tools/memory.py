"""Says what a run needs in memory, rank by rank, before it is started: no GPU and no data are needed.

    python tools/memory.py CONFIG [section.key=value ...] --ranks N

One line per pipeline stage (its first rank; the ranks of a stage need the same but for padding). GiB at the fullest
moment of a step, for GPUs: docs/memory.md says what is counted. `--docs` regenerates the table there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import BitDanceError
from bitdance_scale.model.attention import uses_flex
from bitdance_scale.parallel.memory_estimate import Bytes, MemoryEstimate, estimate_memory
from bitdance_scale.sequence.tokens import load_text_tokenizer

GIB = 2**30
# Rows of Qwen3's table with this project's special tokens, by `vision.block_side`.
QWEN3_VOCAB = {4: 151940, 8: 151988}
DOCS_PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
DOCS_CONFIG = "pt_14b"
# Beyond the shipped settings of the PT stage (tensor 4 with sequence parallelism, selective recomputation, ZeRO-1).
DOCS_LAYOUTS = (
    (64, ()),
    (64, ("parallel.sequence_parallel=false", "parallel.recompute=none")),
    (64, ("parallel.recompute=full",)),
    (64, ("parallel.tensor=2", "parallel.pipeline=2")),
    (64, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.recompute=full")),
    (8, ("parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.zero_stage=3")),
    (8, ("parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.zero_stage=3", "parallel.recompute=full")),
)
BEGIN, END = "<!-- tools/memory.py --docs: begin -->", "<!-- tools/memory.py --docs: end -->"


@dataclass(frozen=True)
class StageLine:
    """The first rank of one pipeline stage."""

    rank: int
    estimate: MemoryEstimate


def stage_lines(config: RunConfig, vocab_size: int, world_size: int) -> list[StageLine]:
    """The memory of the first rank of every pipeline stage."""
    ranks_per_stage = world_size // config.parallel.pipeline
    ranks = [stage * ranks_per_stage for stage in range(config.parallel.pipeline)]
    return [StageLine(rank, estimate_memory(config, vocab_size, world_size, rank)) for rank in ranks]


def table(lines: Sequence[StageLine], device_gib: float, is_markdown: bool) -> str:
    """The lines as text in columns, or as a Markdown table."""
    header = [
        "stage",
        *(field.name for field in dataclasses.fields(Bytes)),
        "total",
        "most activations",
        "largest at the peak",
        f"fits {device_gib:g} GiB",
    ]
    rows = [header]
    for stage, line in enumerate(lines):
        peak, (name, size) = line.estimate.peak, line.estimate.largest
        needed = max(peak.total, line.estimate.building_peak)
        fits = "yes" if needed <= device_gib * GIB else f"no, {needed / GIB:.1f}"
        most = f"{line.estimate.most_activations / GIB:.2f}"
        rows.append([str(stage), *_gib(peak), most, f"{size / GIB:.2f} {name}", fits])
    if is_markdown:
        marked = [header, ["---"] * len(header), *rows[1:]]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in marked)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def docs_section(device_gib: float) -> str:
    """The generated part of docs/memory.md."""
    parts = []
    for world_size, layout in DOCS_LAYOUTS:
        overrides = list(layout)
        config = _on_gpu(load_config(DOCS_CONFIG, overrides))
        check(config, world_size)
        lines = stage_lines(config, QWEN3_VOCAB[config.vision.block_side], world_size)
        command = f"python tools/memory.py {' '.join([DOCS_CONFIG, *overrides])} --ranks {world_size} --markdown"
        parts += [f"`{command}`", "", table(lines, device_gib, is_markdown=True), "", _remark(lines), ""]
    return "\n".join(parts)


def _remark(lines: Sequence[StageLine]) -> str:
    building = ", ".join(f"{line.estimate.building_peak / GIB:.1f}" for line in lines)
    in_flight = ", ".join(str(line.estimate.num_in_flight) for line in lines)
    return (
        f"{lines[0].estimate.num_micro_batches} micro-batches per replica and step; activations of {in_flight} at once "
        f"(by stage); at most {building} GiB while the model is built."
    )


def _gib(peak: Bytes) -> list[str]:
    return [f"{size / GIB:.2f}" for size in (*dataclasses.astuple(peak), peak.total)]


def _on_gpu(config: RunConfig) -> RunConfig:
    """The run with the form of attention that it has on a GPU, whatever this machine has."""
    if not uses_flex(config.model, torch.device("cuda")):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="flex"))


def _vocab_size(config: RunConfig) -> int:
    if config.text.tokenizer_path.exists():
        return load_text_tokenizer(config.text, config.vision.block_tokens).vocab_size
    return QWEN3_VOCAB[config.vision.block_side]


def _write_docs(device_gib: float) -> None:
    section = docs_section(device_gib)
    # Read last: the page may be edited in the minutes that the numbers take.
    before, _, rest = DOCS_PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n\n{section}\n{END}{after}"
    DOCS_PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {DOCS_PAGE.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="TOML file with the run's settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--ranks", type=int, help="GPUs of the run")
    parser.add_argument("--vocab", type=int, help="entries of the tokenizer; default: of text.path, else Qwen3's")
    parser.add_argument("--device-gib", type=float, default=80.0, help="memory of a GPU (default 80)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--docs", action="store_true", help="regenerate the table in docs/memory.md instead")
    # Overrides may stand before and after the options.
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.docs:
            _write_docs(options.device_gib)
            return 0
        if options.config is None or options.ranks is None:
            parser.error("CONFIG and --ranks are needed")
        config = _on_gpu(load_config(options.config, options.overrides))
        check(config, options.ranks)
        lines = stage_lines(config, options.vocab or _vocab_size(config), options.ranks)
    except BitDanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(lines, options.device_gib, options.markdown))
    print(f"\n{_remark(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
