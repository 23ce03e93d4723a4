"""The command `bitdance memory` as a script; with `--docs` it writes the tables of docs/memory.md again."""

from __future__ import annotations

import sys
from pathlib import Path

from bitdance_scale.cli.memory import main
from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.tokenizer_rules import check_tokenizer
from bitdance_scale.config.tokenizer_schema import TokenizerConfig

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
TOKENIZER_RUNS = (
    (32, "ae_d16c32", ()),
    (64, "ae_d16c32", ()),
    (64, "ae_d16c32", ("parallel.recompute=none",)),
    (32, "ae_d32c128", ()),
    (64, "ae_d32c128", ()),
    (32, "ae_d32c128_gan", ()),
    (32, "ae_d32c256", ()),
    (32, "ae_d32c256_gan", ()),
)
BEGIN, END = "<!-- tools/memory.py --docs: begin -->", "<!-- tools/memory.py --docs: end -->"
TOKENIZER_BEGIN = "<!-- tools/memory.py --docs: begin of the tokenizers -->"
TOKENIZER_END = "<!-- tools/memory.py --docs: end of the tokenizers -->"


def docs_section() -> str:
    """The tables of text-to-image runs in docs/memory.md."""
    from bitdance_scale.parallel.memory_table import on_gpu, remark, stage_lines, table
    from bitdance_scale.sequence.condition import QWEN3_VOCAB

    parts = []
    for world_size, layout in DOCS_LAYOUTS:
        config = on_gpu(load_config(DOCS_CONFIG, layout))
        check(config, world_size)
        lines = stage_lines(config, QWEN3_VOCAB[config.vision.block_side], world_size)
        command = f"bitdance memory {' '.join([DOCS_CONFIG, *layout])} --ranks {world_size} --markdown"
        parts += [f"`{command}`", "", table(lines, DEVICE_GIB, is_markdown=True), "", remark(lines), ""]
    return "\n".join(parts)


def tokenizer_section() -> str:
    """The tables of tokenizer runs in docs/memory.md."""
    from bitdance_scale.train.tokenizer_memory import estimate_tokenizer_memory, remark, table

    parts = []
    for world_size, name, settings in TOKENIZER_RUNS:
        config = load_config(name, settings, TokenizerConfig)
        check_tokenizer(config, world_size)
        memory = estimate_tokenizer_memory(config, world_size)
        command = f"bitdance memory {' '.join([name, *settings])} --ranks {world_size} --markdown"
        parts += [f"`{command}`", "", table([memory], DEVICE_GIB, is_markdown=True), "", remark(config, memory), ""]
    return "\n".join(parts)


def write_docs() -> None:
    """Replaces the generated parts of docs/memory.md."""
    sections = ((BEGIN, docs_section(), END), (TOKENIZER_BEGIN, tokenizer_section(), TOKENIZER_END))
    # Read last: the page may be edited in the minutes that the numbers take.
    page = DOCS_PAGE.read_text(encoding="utf-8")
    for begin, section, end in sections:
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n\n{section}\n{end}{after}"
    DOCS_PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {DOCS_PAGE.name}")


if __name__ == "__main__":
    sys.exit(write_docs() if sys.argv[1:] == ["--docs"] else main())
