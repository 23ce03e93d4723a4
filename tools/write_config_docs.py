"""Writes docs/config.md and docs/rules.md from the schema and the rules.

python tools/write_config_docs.py            writes both
python tools/write_config_docs.py --check    fails if one is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.config.coerce import field_types
from bitdance_scale.config.describe import setting_docs
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.rules import rules_table
from bitdance_scale.config.schema import RunConfig

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "python tools/write_config_docs.py"


def config_page() -> str:
    """docs/config.md: how a configuration is written, every setting by section, and the presets."""
    lines = [
        "# Configuration",
        "",
        f"Generated from `bitdance_scale/config/schema.py` by `{COMMAND}`.",
        "",
        "A run is one TOML file and any number of overrides: `bitdance train CONFIG section.key=value ...`, each value",
        "written as in TOML (a bare word is a string). CONFIG may also be the name of a configuration that comes with",
        'the package (`bitdance config list`). With a top-level `extends = "other.toml"`, or `extends = "pt_14b"`, a',
        "file changes the settings of another, which may extend a third. Later layers win: defaults, `model.preset`,",
        "the extended files, the file, the overrides. `bitdance config print CONFIG` prints the resolved tree, which",
        "the run folder keeps as `config.toml`; `bitdance config explain KEY` says what this page says of one setting.",
        "",
    ]
    for section, schema in field_types(RunConfig).items():
        lines += [
            f"## [{section}]",
            "",
            schema.__doc__,
            "",
            "| Setting | Type | Default | Meaning |",
            "|---|---|---|---|",
        ]
        for setting in setting_docs(schema):
            default = "required" if setting.default is None else f"`{setting.default}`"
            doc = setting.doc.replace("|", "\\|")
            lines.append(f"| `{setting.path}` | {setting.type_name} | {default} | {doc} |")
        lines.append("")
    return "\n".join([*lines, *_preset_lines()])


def _preset_lines() -> list[str]:
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "tie_embeddings")
    lines = ["## Presets", "", f"| Preset | {' | '.join(names)} | [head] |", "|---" * (len(names) + 2) + "|"]
    for preset, sections in PRESETS.items():
        values = " | ".join(str(sections["model"][name]).lower() for name in names)
        head = ", ".join(f"{name} = {value}" for name, value in sections["head"].items())
        lines.append(f"| `{preset}` | {values} | {head} |")
    return [*lines, ""]


def rules_page() -> str:
    """docs/rules.md: what a configuration must keep, and why."""
    return (
        "\n".join(
            [
                "# Rules of a configuration",
                "",
                f"Generated from `bitdance_scale/config/` by `{COMMAND}`. All of them are checked before any process",
                "starts, those over the number of ranks where it is known: `bitdance check CONFIG --ranks 64`. A",
                "refusal lists every broken rule with the setting, its value and a fix.",
                "",
                rules_table(),
            ]
        ).rstrip("\n")
        + "\n"
    )


def pages() -> dict[Path, str]:
    """File -> content of everything that is generated."""
    return {DOCS / "config.md": config_page(), DOCS / "rules.md": rules_page()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes docs/config.md and docs/rules.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is out of date")
    options = parser.parse_args(arguments)
    outdated = [
        path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if options.check and outdated:
        print(f"out of date: {', '.join(path.name for path in outdated)}; run {COMMAND}", file=sys.stderr)
        return 1
    for path in outdated:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
