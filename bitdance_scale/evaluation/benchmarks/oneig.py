"""OneIG-Bench (Chang et al., NeurIPS 2025, arXiv 2506.07977), English and Chinese.

Checked against OneIG-Bench/OneIG-Benchmark: README.md; scripts/utils/utils.py, which cuts a grid row by row and keeps
the pieces as JPEG; scripts/alignment/alignment_score.py, which looks for `{category}/{model}/{id}*` and passes over a
prompt with more than one match; and the generating script text2image.py, which saves WebP with Pillow's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark, Settings
from bitdance_scale.evaluation.benchmarks.layout import Layout, model_stranger
from bitdance_scale.evaluation.benchmarks.picture import Picture, grid_side
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, check_model_name, check_name, check_prompts
from bitdance_scale.evaluation.benchmarks.prompt_files import read_csv

FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
"""Folder of each category."""


class OneIGLayout(Layout):
    """`{folder of the category}/{model}/{id}.webp`, a grid.

    Args:
        name: of the benchmark.
        model: name of its folders.
    """

    def __init__(self, name: str, model: str) -> None:
        self._name, self._model = name, check_model_name(name, model)

    def pictures(self, prompt: Prompt) -> list[Picture]:
        """The grid."""
        folder, number = prompt.id.split("/")
        side = grid_side(self._name, prompt.num_images)
        return [Picture(PurePosixPath(folder, self._model, f"{number}.webp"), side)]

    def stranger(self, path: PurePosixPath) -> str:
        """What to call a picture that belongs to no prompt."""
        return model_stranger(path, rf"(?:{'|'.join(FOLDERS.values())})/([^/]+)/[^/]+", self._model)


@dataclass(frozen=True)
class OneIG(Benchmark):
    """OneIG-Bench in one language.

    Attributes:
        language: "en" or "zh".
    """

    num_images: int = 4
    language: str = "en"
    settings = Settings((1024, 1024), 50, 7.5, "assumed: the defaults of the release; the paper does not say")

    @property
    def name(self) -> str:
        """What it is called."""
        return f"oneig-{self.language}"

    @property
    def prompt_file(self) -> str:
        """Its published file."""
        return {"en": "OneIG-Bench.csv", "zh": "OneIG-Bench-ZH.csv"}[self.language]

    def layout(self, model: str) -> OneIGLayout:
        """The layout with the folders of a model."""
        grid_side(self.name, self.num_images)
        return OneIGLayout(self.name, model)

    def read(self, path: Path | None) -> list[Prompt]:
        """The prompts of the CSV file; a prompt's id is the folder of its category and its number, as "anime/000"."""
        columns, rows = read_csv(path, self.prompt_file)
        wanted = {"en": "prompt_en", "zh": "prompt_cn"}[self.language]
        lacking = [name for name in ("category", "id", wanted) if name not in columns]
        if lacking:
            raise ConfigError(
                f"{path}: has no column {lacking[0]!r}, but {', '.join(map(repr, columns[:8])) or 'nothing'}; name "
                f"{self.prompt_file}"
            )
        prompts = []
        for row in rows:
            where = f"{path}: id {row['id']!r} of {row['category']!r}"
            if row["category"] not in FOLDERS:
                raise ConfigError(f"{where}: expected a category of {', '.join(FOLDERS)}; name {self.prompt_file}")
            name = f"{FOLDERS[row['category']]}/{check_name(where, row['id'])}"
            prompts.append(Prompt(name, row[wanted], row["category"], self.num_images, row))
        assert path is not None
        _check_beginnings(path, prompts)
        return check_prompts(path, prompts)


def _check_beginnings(path: Path, prompts: list[Prompt]) -> None:
    """The scorer takes every file whose name begins with the id, and scores nothing where there are two."""
    ids = sorted(prompt.id for prompt in prompts)
    for first, second in pairwise(ids):
        if second != first and second.startswith(first):
            raise ConfigError(
                f"{path}: id {second!r} begins with the id {first!r}, and the benchmark's scorer would take the "
                "picture of one for the other's; number the prompts with as many digits as in the published file"
            )
