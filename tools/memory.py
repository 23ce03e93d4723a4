"""The command `bitdance memory` as a script; with `--docs` it writes the tables of docs/memory.md again."""

from __future__ import annotations

import sys
from pathlib import Path

from bitdance_scale.cli.memory import main
from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check

DEVICE_GIB = 80.0
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


def docs_section() -> str:
    """The generated part of docs/memory.md."""
    from bitdance_scale.parallel.memory_table import QWEN3_VOCAB, on_gpu, remark, stage_lines, table

    parts = []
    for world_size, layout in DOCS_LAYOUTS:
        config = on_gpu(load_config(DOCS_CONFIG, layout))
        check(config, world_size)
        lines = stage_lines(config, QWEN3_VOCAB[config.vision.block_side], world_size)
        command = f"bitdance memory {' '.join([DOCS_CONFIG, *layout])} --ranks {world_size} --markdown"
        parts += [f"`{command}`", "", table(lines, DEVICE_GIB, is_markdown=True), "", remark(lines), ""]
    return "\n".join(parts)


def write_docs() -> None:
    """Replaces the generated part of docs/memory.md."""
    section = docs_section()
    # Read last: the page may be edited in the minutes that the numbers take.
    before, _, rest = DOCS_PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS_PAGE.write_text(f"{before}{BEGIN}\n\n{section}\n{END}{after}", encoding="utf-8")
    print(f"wrote {DOCS_PAGE.name}")


if __name__ == "__main__":
    sys.exit(write_docs() if sys.argv[1:] == ["--docs"] else main())
