"""Rules between the network family and what it is given: prompts or classes, sizes of images, kinds of samples."""

from __future__ import annotations

from collections.abc import Iterator

from bitdance_scale.config.benchmark_rules import drawn_sizes
from bitdance_scale.config.class_map import ClassLabels
from bitdance_scale.config.rule import RuleSet, nearest_multiples
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()


@RULES.rule("model.family", "text.path")
def _prompts_have_a_tokenizer(config: RunConfig) -> Iterator[str]:
    """A text-to-image network has a tokenizer, `text.path`.

    Prompts are tokenised with it, and its entries are the rows of the embedding.
    """
    if config.model.parts.has_text and not config.text.path.strip():
        yield f"text.path = {config.text.path!r}: must not be empty; set it to the folder or file of the tokenizer"


@RULES.rule("model.family", "classes.num_classes", "classes.map")
def _classes_are_for_their_family(config: RunConfig) -> Iterator[str]:
    """`classes.num_classes` is at least 1 in class-conditional networks; others have 0 and no `classes.map`.

    The embedding of a class-conditional network has rows for every class; no other network has classes.
    """
    num_classes = config.classes.num_classes
    if config.model.parts.has_text and num_classes:
        yield (
            f"classes.num_classes = {num_classes}: model.family = {config.model.family!r} has no classes; set "
            "model.family=class_conditional, or classes.num_classes=0"
        )
    if config.model.parts.has_text and config.classes.map:
        yield (
            f"classes.map = {config.classes.map!r}: model.family = {config.model.family!r} has no classes; set "
            "model.family=class_conditional, or classes.map=''"
        )
    if not config.model.parts.has_text and not num_classes:
        yield (
            "classes.num_classes = 0: model.family = 'class_conditional' draws from classes; set it to the number of "
            "classes of the data, such as 1000 for ImageNet"
        )


@RULES.rule(
    "model.family", "classes.grid", "data.resolutions", "sample.size_px", "evaluate.benchmarks", "vision.channel_mult"
)
def _images_fill_the_grid(config: RunConfig) -> Iterator[str]:
    """Every image of a class-conditional network has `classes.grid` latent cells.

    Its head has a learned position for each cell.
    """
    if config.model.parts.head_cells != "learned":
        return
    grid, downsample = config.classes.grid, config.vision.downsample
    wanted = (grid[0] * downsample, grid[1] * downsample)
    sizes = [
        (f"data.resolutions[{index}].buckets_px[{number}]", size_px)
        for index, resolution in enumerate(config.data.resolutions)
        for number, size_px in enumerate(resolution.buckets_px)
    ]
    for where, size_px in [*sizes, *drawn_sizes(config)]:
        if size_px != wanted:
            yield (
                f"{where} = {list(size_px)}: must be {list(wanted)}, classes.grid = {list(grid)} cells of {downsample} "
                f"px; set it to {list(wanted)}, or classes.grid to the cells of the images"
            )


@RULES.rule("model.family", "model.head_dim")
def _two_axes_share_the_channels(config: RunConfig) -> Iterator[str]:
    """`model.head_dim` is a multiple of 4 in class-conditional networks.

    Pairs of channels turn, half of them with the row and half with the column.
    """
    head_dim = config.model.head_dim
    if config.model.parts.rotary == "cells" and head_dim % 4:
        yield f"model.head_dim = {head_dim}: must be a multiple of 4; use {nearest_multiples(head_dim, 4)}"


@RULES.rule("model.family", "model.tie_embeddings", "data.image_to_text_share")
def _classes_have_no_words(config: RunConfig) -> Iterator[str]:
    """A class-conditional network predicts no text: `data.image_to_text_share` is 0 and embeddings are not tied.

    Its classes have no words, and it has no projection to a vocabulary.
    """
    if config.model.parts.has_text:
        return
    if config.data.image_to_text_share:
        yield f"data.image_to_text_share = {config.data.image_to_text_share}: classes have no words; set it to 0"
    if config.model.tie_embeddings:
        yield "model.tie_embeddings = true: there is no projection to tie the embedding to; set it to false"


@RULES.rule("model.family", "run.stage")
def _classes_have_one_stage(config: RunConfig) -> Iterator[str]:
    """A class-conditional run has `run.stage = "pt"`.

    The stages are those of text-to-image (Sec. 4.3). Class-conditional networks are trained in one go (Sec. 4.2); a run
    may start from the weights of another all the same.
    """
    if not config.model.parts.has_text and config.run.stage != "pt":
        yield f"run.stage = {config.run.stage!r}: a class-conditional network has one stage; set run.stage=pt"


@RULES.rule("model.family", "data.mode")
def _labels_are_read_before_training(config: RunConfig) -> Iterator[str]:
    """A class-conditional run has `data.mode = "indexed"`.

    Every label is checked before the first step, and a stream shows its labels only as it is trained on.
    """
    if not config.model.parts.has_text and config.data.mode != "indexed":
        yield f"data.mode = {config.data.mode!r}: labels are checked in an index; set data.mode = 'indexed'"


@RULES.rule("model.family", "sample.prompts", "classes.num_classes", "classes.map")
def _prompts_are_classes(config: RunConfig) -> Iterator[str]:
    """Every one of `sample.prompts` of a class-conditional run is the number of a class, or its name in `classes.map`.

    Classes are drawn by number. Names are looked up before the start, when the map is read.
    """
    if config.model.parts.has_text or config.classes.map:
        return
    yield from prompt_faults(config)


def prompt_faults(config: RunConfig) -> Iterator[str]:
    """One message per prompt that is no class.

    Raises:
        ConfigError: the class map cannot be read or used.
    """
    labels = ClassLabels(config.classes)
    for index, prompt in enumerate(config.sample.prompts):
        if labels.number(prompt) is None:
            yield f"sample.prompts[{index}] = {prompt!r}: must be {labels.rule}, as a string; correct it"
