"""The model card of a folder that is shared: README.md, as Hugging Face reads it.

It begins with fields in YAML, between two lines of three dashes (https://huggingface.co/docs/hub/model-cards). Names,
prompts and paths come from people and may hold any character: in the fields a YAML library quotes them, in the text
they are in code spans, and in headings, lists and tables they are escaped. Credentials of URLs are hidden everywhere.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitdance_scale.atomic_files import write_text
from bitdance_scale.credentials import hide_credentials
from bitdance_scale.sharing.licences import CARD_NAME, LICENCE_NAME, OTHER, Licence, licence_file

SAMPLES_NAME = "samples.png"
WARNING = (
    "> **This card is generated.** `bitdance` wrote it from the files of the run, and nobody has checked it yet. It "
    "says what was configured and counted, not whether that was right. Before you share the folder, read it, correct "
    "it, and remove these lines."
)
NOT_STATED_WARNING = (
    "**No licence is stated.** Nobody may use these weights before there is one. Say which with `bitdance export "
    "--license`, with respect to the model that they came from and to the data that they were trained on."
)
_BACKTICKS = re.compile(r"`+")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!&])")

Row = tuple[str, str]


@dataclass(frozen=True)
class Table:
    """A table of a card.

    Attributes:
        title: its heading.
        header: names of its columns.
        rows: its cells, which are taken as plain text.
        note: a paragraph below it, in Markdown.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class CardFacts:
    """All that a card says; every text is plain unless it says Markdown.

    Attributes:
        title: name of the model.
        summary: what it is, a paragraph in Markdown.
        library: what it is loaded with, by Hugging Face's name: bitdance_scale, diffusers or peft.
        pipeline_tag: Hugging Face's name of the task; empty: none fits.
        tags: further tags.
        licence: under which it is shared.
        authors: whoever made it; empty: not said.
        base_models: Hugging Face's ids of the models that it came from, as far as they are known.
        base_relation: what it is to them: finetune, adapter or merge; empty: not said.
        datasets: Hugging Face's ids of the data, as far as they are known.
        origin: what the training began from, oldest last.
        tables: data, settings, counts, scores.
        prompts: of the pictures in `samples`, row by row.
        samples: a file of pictures; None: there is none.
        usage: how it is used, in Markdown.
        limitations: what is to be known before it is used.
    """

    title: str
    summary: str
    library: str
    pipeline_tag: str
    tags: tuple[str, ...]
    licence: Licence
    usage: str
    authors: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    base_relation: str = ""
    datasets: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    prompts: tuple[str, ...] = ()
    samples: Path | None = None
    limitations: tuple[str, ...] = ()


def write_card(folder: Path, facts: CardFacts) -> None:
    """Writes README.md and LICENSE, and copies the pictures, into a folder that is being made."""
    write_text(folder / CARD_NAME, card_text(facts))
    write_text(folder / LICENCE_NAME, licence_file(facts.licence))
    if facts.samples is not None:
        shutil.copyfile(facts.samples, folder / SAMPLES_NAME)


def card_text(facts: CardFacts) -> str:
    """The content of README.md."""
    fields = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=10_000)
    parts = [f"# {plain(facts.title)}", WARNING, facts.summary]
    if facts.samples is not None:
        parts += [f"![Pictures that the run drew]({SAMPLES_NAME})"]
        if facts.prompts:
            parts += ["The prompts, row by row: " + ", ".join(code(prompt) for prompt in facts.prompts) + "."]
    parts += ["## Use", facts.usage]
    if facts.origin:
        parts += ["## Where it comes from", bullets([plain(line) for line in facts.origin])]
    for table in facts.tables:
        parts += [f"## {table.title}", table_text(table)] + ([table.note] if table.note else [])
    if facts.limitations:
        parts += ["## Limitations", bullets(facts.limitations)]
    parts += ["## Licence", _licence_text(facts.licence)]
    if facts.authors:
        parts += ["## Authors", bullets([plain(author) for author in facts.authors])]
    body = "\n\n".join(parts)
    return f"---\n{fields}---\n\n{body}\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The fields of the card; those that are not known are left out."""
    licence = facts.licence
    fields: dict[str, Any] = {"license": licence.id}
    if licence.id == OTHER:
        fields |= {"license_name": one_line(licence.name), "license_link": LICENCE_NAME}
    if facts.base_models:
        fields["base_model"] = list(facts.base_models) if len(facts.base_models) > 1 else facts.base_models[0]
        if facts.base_relation:
            fields["base_model_relation"] = facts.base_relation
    if facts.datasets:
        fields["datasets"] = list(facts.datasets)
    if facts.pipeline_tag:
        fields["pipeline_tag"] = facts.pipeline_tag
    fields |= {
        "library_name": facts.library,
        "tags": list(facts.tags),
        "model_name": one_line(facts.title),
    }
    return fields


def code(text: str) -> str:
    """A code span that shows a text in one line, whatever is in it."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in _BACKTICKS.findall(text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def plain(text: str) -> str:
    """A text in one line in which no character is markup."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def one_line(text: str) -> str:
    """A text with single blanks for all line ends and control characters, and without credentials of URLs."""
    return hide_credentials(" ".join("".join(c if c.isprintable() else " " for c in text).split()))


def bullets(lines: Sequence[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def table_text(table: Table) -> str:
    """A table in Markdown."""
    rows = [table.header, ("---",) * len(table.header), *([*map(plain, row)] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _licence_text(licence: Licence) -> str:
    if not licence.is_stated:
        return NOT_STATED_WARNING
    name = plain(licence.name) if licence.id == OTHER else code(licence.id)
    return f"{name}, as {plain(licence.origin)} says. The text is in [{LICENCE_NAME}]({LICENCE_NAME})."
