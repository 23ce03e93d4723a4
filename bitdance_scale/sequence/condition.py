"""What images are drawn from: a prompt in words, or a class. One interface for both.

`load_condition` gives a run the one of its network family: a `TextTokenizer` (`tokens.py`) or a `ClassCondition`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Protocol

import numpy as np

from bitdance_scale.config.class_map import ClassLabels
from bitdance_scale.config.schema import ClassesSection, NetworkConfig, RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.layout import ClassTokens, SequenceTokens
from bitdance_scale.sequence.pack import Sample
from bitdance_scale.sequence.tokens import load_text_tokenizer

# Rows of Qwen3's table with this project's special tokens, by `vision.block_side`.
QWEN3_VOCAB = {4: 151940, 8: 151988}


class Condition(Protocol):
    """Makes the token ids that come before an image.

    Attributes:
        vocab_size: rows of the embedding table, before padding.
        digest: SHA-256 of what the rows mean; a checkpoint fits only conditions with its digest.
    """

    vocab_size: int
    digest: str

    @property
    def image_tokens(self) -> SequenceTokens:
        """The special tokens around an image."""
        ...

    def prompt_ids(self, caption: str) -> np.ndarray:
        """int64 [A], the ids for a prompt."""
        ...

    def unconditional_ids(self) -> np.ndarray:
        """int64 [A], the ids of the unconditional prompt, for guidance."""
        ...

    def drawing_sample(self, key: int, caption: str, grid: tuple[int, int], is_caption_dropped: bool) -> Sample:
        """The sample that teaches to draw an image from its caption."""
        ...

    def describing_sample(self, key: int, caption: str, grid: tuple[int, int]) -> Sample:
        """The sample that teaches to describe an image."""
        ...


class ClassCondition:
    """Classes; a caption is the number of a class in decimal digits, or its name in the class map.

    Args:
        section: number of classes and of the tokens of each; the class map, which is read when it is first needed.
        block_tokens: P, vision tokens per block.
        is_causal: whether positions of one block see only those before them.
        is_raster: whether vision tokens follow row by row.
    """

    def __init__(self, section: ClassesSection, block_tokens: int, is_causal: bool, is_raster: bool = False) -> None:
        self._section = section
        self.image_tokens = ClassTokens(section.num_classes, section.num_tokens, block_tokens, is_causal, is_raster)
        self.vocab_size = self.image_tokens.vocab_size
        rows = ["classes", section.num_classes, section.num_tokens, block_tokens]
        self.digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @functools.cached_property
    def _labels(self) -> ClassLabels:
        return ClassLabels(self._section)

    def prompt_ids(self, caption: str) -> np.ndarray:
        """int64 [T], the tokens of a class.

        Raises:
            ConfigError: the caption is no class, or the class map cannot be used.
        """
        number = self._labels.number(caption)
        if number is None:
            raise ConfigError(f"class {caption!r}: must be {self._labels.rule}")
        return self.image_tokens.class_ids(number)

    def unconditional_ids(self) -> np.ndarray:
        """int64 [T], the tokens of "no class"."""
        return self.image_tokens.class_ids(self._section.num_classes)

    def drawing_sample(self, key: int, caption: str, grid: tuple[int, int], is_caption_dropped: bool) -> Sample:
        """The sample that teaches an image from its class, or from none (arXiv 2602.14041 Sec. 4.2).

        It has no text target.
        """
        before = self.unconditional_ids() if is_caption_dropped else self.prompt_ids(caption)
        return Sample(
            key=key,
            grid=grid,
            before_ids=before,
            after_ids=np.zeros(0, dtype=np.int64),
            first_target_before=len(before),
            first_target_after=0,
        )

    def describing_sample(self, key: int, caption: str, grid: tuple[int, int]) -> Sample:
        """There is none: a class has no words."""
        raise AssertionError("`data.image_to_text_share` is 0 in class-conditional runs")


def load_condition(config: RunConfig | NetworkConfig, block_tokens: int | None = None) -> Condition:
    """The condition of a network.

    Args:
        config: its configuration.
        block_tokens: P, vision tokens per block; None: as configured.

    Raises:
        ConfigError: the text tokenizer cannot be loaded (`load_text_tokenizer`).
    """
    size = config.vision.block_tokens if block_tokens is None else block_tokens
    is_causal, is_raster = config.model.mask == "causal", config.vision.order == "raster"
    if config.model.parts.has_text:
        return load_text_tokenizer(config.text, size, is_causal, is_raster, config.vision.context == "queries")
    return ClassCondition(config.classes, size, is_causal, is_raster)


def vocab_size(config: RunConfig) -> int:
    """Rows of the embedding: classes, or entries of the text tokenizer; where it is not here, those of Qwen3's."""
    if not config.model.parts.has_text or config.text.tokenizer_path.exists():
        return load_condition(config).vocab_size
    return QWEN3_VOCAB[config.vision.block_side]
