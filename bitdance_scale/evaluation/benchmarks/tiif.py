"""TIIF-Bench (Wei et al., arXiv 2506.02161), its testmini part: a short and a long prompt of each line.

Checked against A113N-W3I/TIIF-Bench: README.md, "Generate Images & Directory Organization".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark, Settings
from bitdance_scale.evaluation.benchmarks.layout import SeparatePictures, model_stranger
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, check_model_name, check_name, check_prompts
from bitdance_scale.evaluation.benchmarks.prompt_files import read_json_lines, text_of

LENGTHS = ("short_description", "long_description")


class TiifLayout(SeparatePictures):
    """`{type}/{model}/{short_description or long_description}/{line, from 0}.png`.

    Args:
        model: name of its folders.
    """

    def __init__(self, model: str) -> None:
        self._model = check_model_name("tiif", model)

    def separate(self, prompt: Prompt, k: int) -> PurePosixPath:
        """The file of the one image."""
        kind, length, number = prompt.id.split("/")
        return PurePosixPath(kind, self._model, length, f"{number}.png")

    def stranger(self, path: PurePosixPath) -> str:
        """What to call a picture that belongs to no prompt."""
        return model_stranger(path, rf"[^/]+/([^/]+)/(?:{'|'.join(LENGTHS)})/[^/]+", self._model)


@dataclass(frozen=True)
class Tiif(Benchmark):
    """TIIF-Bench. Its scorer reads one image of each prompt."""

    num_images: int = 1
    name = "tiif"
    prompt_file = "the folder testmini_prompts of TIIF-Bench, or one of its files"
    settings = Settings((1024, 1024), 50, 7.5, "assumed: the defaults of the release; the paper does not say")

    def layout(self, model: str) -> TiifLayout:
        """The layout with the folders of a model."""
        if self.num_images != 1:
            raise ConfigError(f"images per prompt = {self.num_images}: tiif has room for one; set it to 1")
        return TiifLayout(model)

    def read(self, path: Path | None) -> list[Prompt]:
        """The prompts of a folder of `*.jsonl`, or of one such file.

        An id is the type, the length and the number of the line from 0, as "action+2d/short_description/0".
        """
        paths: Sequence[Path | None] = [path]
        if path is not None and path.is_dir():
            paths = sorted(found for found in path.iterdir() if found.suffix == ".jsonl")
            if not paths:
                raise ConfigError(f"{path}: holds no *.jsonl; name {self.prompt_file}")
        prompts = []
        for file in paths:
            for number, record in enumerate(read_json_lines(file, self.prompt_file)):
                where = f"{file}:{number + 1}"
                if "yn_question_list" in record:
                    raise ConfigError(f"{where}: holds questions about pictures, no prompts; name {self.prompt_file}")
                kind = check_name(f"{where}: type", text_of(where, record, "type", self.prompt_file))
                for length in LENGTHS:
                    text = text_of(where, record, length, self.prompt_file)
                    prompts.append(Prompt(f"{kind}/{length}/{number}", text, kind, self.num_images, record))
        assert path is not None
        return check_prompts(path, prompts)
