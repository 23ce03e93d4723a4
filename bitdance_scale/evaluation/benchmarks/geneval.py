"""GenEval (Ghosh et al., NeurIPS 2023, arXiv 2310.11513): six kinds of short prompts about COCO's objects.

Checked against djghosh13/geneval: generation/diffusers_generate.py and evaluation/evaluate_images.py, which takes every
folder whose name is a number and every `samples/<number>.png` in it; and shallowdream204/BitDance: eval/eval_geneval.py
and scripts/eval/eval_bitdance_14b_16x.sh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark, Settings
from bitdance_scale.evaluation.benchmarks.layout import SeparatePictures
from bitdance_scale.evaluation.benchmarks.picture import Picture, grid_side
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, check_prompts
from bitdance_scale.evaluation.benchmarks.prompt_files import read_json_lines, text_of
from bitdance_scale.evaluation.geneval.rules import TAGS

_SHORT_BEGINNING = "a photo of "
"""Of every published short prompt (prompts/create_prompts.py); none of the long ones begins so."""


class GenEvalLayout(SeparatePictures):
    """`{line:05d}/samples/{k:04d}.png`, `{line:05d}/grid.png` and the prompt's line as `{line:05d}/metadata.jsonl`."""

    makes_files = True

    def separate(self, prompt: Prompt, k: int) -> PurePosixPath:
        """The file of image k."""
        return PurePosixPath(prompt.id, "samples", f"{k:04d}.png")

    def pictures(self, prompt: Prompt) -> list[Picture]:
        """The files of the images, then the grid."""
        grid = Picture(PurePosixPath(prompt.id, "grid.png"), grid_side("geneval", prompt.num_images))
        return [*super().pictures(prompt), grid]

    def records(self, prompt: Prompt) -> Mapping[PurePosixPath, Mapping[str, Any]]:
        """The prompt's line."""
        return {PurePosixPath(prompt.id, "metadata.jsonl"): prompt.record}


@dataclass(frozen=True)
class GenEval(Benchmark):
    """GenEval; the rewritten long prompts, which the published score is of, have the same keys and number of lines."""

    num_images: int = 4
    name = "geneval"
    prompt_file = "evaluation_metadata.jsonl of GenEval, or the long form of it"
    settings = Settings((1024, 1024), 50, 13.0, "published, for the long prompts: BitDance's scripts/eval")

    def doubt(self, prompts: Sequence[Prompt], guidance: float) -> str:
        """The guidance of the published score is for the long prompts."""
        num_short = sum(prompt.text.startswith(_SHORT_BEGINNING) for prompt in prompts)
        if guidance != self.settings.guidance or 2 * num_short <= len(prompts):
            return ""
        return (
            f"guidance = {guidance}: {num_short} of {len(prompts)} prompts have GenEval's short form "
            f"({prompts[0].text!r}), and this guidance is published for the long prompts; name the long form with "
            "--prompts, or another guidance with --guidance (the default of the release is 7.5)"
        )

    def layout(self, model: str) -> GenEvalLayout:
        """The layout, in which no model is named."""
        grid_side(self.name, self.num_images)
        return GenEvalLayout()

    def read(self, path: Path | None) -> list[Prompt]:
        """The prompts of `evaluation_metadata.jsonl`; a prompt's id is the number of its line, from "00000"."""
        prompts = []
        for number, record in enumerate(read_json_lines(path, self.prompt_file)):
            where = f"{path}:{number + 1}"
            text = text_of(where, record, "prompt", self.prompt_file)
            tag = text_of(where, record, "tag", self.prompt_file)
            if tag not in TAGS:
                raise ConfigError(f"{where}: tag = {tag!r}, expected one of {', '.join(TAGS)}; name {self.prompt_file}")
            if not isinstance(record.get("include"), list):
                raise ConfigError(f"{where}: has no list 'include' of objects; name {self.prompt_file}")
            prompts.append(Prompt(f"{number:05d}", text, tag, self.num_images, record))
        assert path is not None
        return check_prompts(path, prompts)
