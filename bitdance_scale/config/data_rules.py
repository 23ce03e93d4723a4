"""Rules between image sizes, the global batch and the packs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bitdance_scale.config.benchmark_rules import drawn_sizes
from bitdance_scale.config.rule import RuleSet, multiples_around, nearest_multiples
from bitdance_scale.config.schema import S3_SCHEME, RunConfig

MAX_MARKUP_TOKENS = 32
"""Text tokens around a caption (chat turns and their ends) that `data.max_pack_tokens` must leave room for."""

NUM_RESOLUTION_TOKENS = 256
"""`<|res_1|>` .. `<|res_256|>`: an image has at most this many latent cells along a side (published release)."""

MAX_SOURCE_SHARES = 10_000
"""Most that the shares of the sources, in lowest terms, may add up to: the mix is a table of so many rows."""

RULES = RuleSet()


@RULES.rule("data.shards", "data.sources")
def _data_is_named_once(config: RunConfig) -> Iterator[str]:
    """Either `data.shards` or `data.sources` names the data.

    `data.shards` is one source; beside others its share would be undefined.
    """
    data = config.data
    if data.shards and data.sources:
        names = ", ".join(source.name for source in data.sources)
        yield (
            f"data.shards = {list(data.shards)} and data.sources = {names}: only one of the two may name the data; "
            "set data.shards = [] (in the file that extends another, or on the command line) to train on the sources, "
            "or data.sources = [] to train on data.shards"
        )
    elif not data.shards and not data.sources:
        yield (
            "data.shards = [] and data.sources = []: there is no data; name tars in data.shards, or several sources in "
            "[[data.sources]]"
        )


@RULES.rule("data.sources")
def _sources_have_distinct_names(config: RunConfig) -> Iterator[str]:
    """Sources have different names.

    Their images are counted by name.
    """
    names = [source.name for source in config.data.sources]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield (
                f"data.sources[{index}].name = {name!r}: data.sources[{names.index(name)}] has this name; rename one, "
                "or make them one source with the shards of both"
            )


@RULES.rule("data.sources")
def _source_shares_can_be_kept(config: RunConfig) -> Iterator[str]:
    """Some source has a share, and the shares in lowest terms add up to at most 10,000.

    The mix of a resolution is exact after as many of its images as the shares in lowest terms add up to.
    """
    shares = [source.share for source in config.data.sources]
    if not shares:
        return
    if not any(shares):
        yield (
            f"data.sources[].share = {':'.join(map(str, shares))}: at least one must be greater than 0; give a share "
            "to every source that is to be trained on"
        )
    elif sum(shares) // math.gcd(*shares) > MAX_SOURCE_SHARES:
        yield (
            f"data.sources[].share = {':'.join(map(str, shares))}: the shares in lowest terms add up to "
            f"{sum(shares) // math.gcd(*shares)} and must add up to at most {MAX_SOURCE_SHARES}; round them, for "
            "instance to per cent or per mille"
        )


@RULES.rule("data.has_borders", "data.sources")
def _borders_are_said_once(config: RunConfig) -> Iterator[str]:
    """`data.has_borders` goes with `data.shards`; each of `data.sources` has its own.

    One source may have been padded to squares and another not.
    """
    if config.data.has_borders and config.data.sources:
        yield "data.has_borders = true beside data.sources: set has_borders in those of the sources that have borders"


@RULES.rule("data.mode", "data.bits_dir", "data.has_borders", "data.sources")
def _streams_have_no_index(config: RunConfig) -> Iterator[str]:
    """`data.mode = "stream"` goes without `data.bits_dir` and without borders.

    Bit shards are found by the place of a sample in the index, and a stream has none; borders are found by the index.
    """
    data = config.data
    if data.mode != "stream":
        return
    if data.bits_dir:
        yield (
            f"data.bits_dir = {data.bits_dir!r} with data.mode = 'stream': bit shards belong to an index; set "
            "data.mode = 'indexed', or data.bits_dir = ''"
        )
    if any(source.has_borders for source in data.active_sources):
        yield "has_borders = true with data.mode = 'stream': only an index crops borders; set data.mode = 'indexed'"


@RULES.rule("data.augment", "data.mode")
def _crops_end_in_epochs(config: RunConfig) -> Iterator[str]:
    """Crops that end need `data.augment.crop`, an end that is not before its beginning, and `data.mode = "indexed"`.

    Their probability falls from one epoch of a sample to another; a stream has no epochs.
    """
    augment = config.data.augment
    until, ends = augment.crop_until_epoch, augment.crop_ends_epoch
    where = f"data.augment.crop_until_epoch = {until:g} and crop_ends_epoch = {ends:g}"
    if not (until or ends):
        return
    if augment.crop == 0:
        yield f"{where} with data.augment.crop = 0: no crop can end; set data.augment.crop=1, or both epochs to 0"
    if until > ends:
        yield (
            f"{where}: crops must end no earlier than the epoch up to which they hold; set "
            f"data.augment.crop_ends_epoch={until:g} or more, or both to 0 for crops that do not end"
        )
    if config.data.mode == "stream":
        yield (
            f"{where} with data.mode = 'stream': a stream has no epochs; set data.mode = 'indexed', or both to 0 for "
            "crops that do not end"
        )


@RULES.rule("data.mode", "data.shards", "data.sources")
def _streams_are_read_as_streams(config: RunConfig) -> Iterator[str]:
    """Commands (`pipe:`) and http addresses need `data.mode = "stream"`, and S3 needs `data.mode = "indexed"`.

    An index needs tars that can be read at any place; objects on S3 can.
    """
    data = config.data
    for source in data.active_sources:
        for spec in source.shards:
            is_stream = spec.startswith(("pipe:", "http://", "https://"))
            if data.mode == "indexed" and is_stream:
                yield f"shards {spec!r}: cannot be indexed; set data.mode = 'stream', or copy the tars to a disk"
            if data.mode == "stream" and spec.startswith(S3_SCHEME):
                yield (
                    f"shards {spec!r} with data.mode = 'stream': set data.mode = 'indexed', which reads S3, or name a "
                    "command such as 'pipe:aws s3 cp PATH -'"
                )


@RULES.rule("data.captions")
def _captions_are_distinct(config: RunConfig) -> Iterator[str]:
    """`data.captions` names every caption once: as an extension, as EXTENSION:FIELD or as a part of the key.

    Its shares say how often it is drawn.
    """
    names = [choice.source for choice in config.data.captions]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"data.captions[{index}].source = {name!r}: is listed before; add up the shares and name it once"
        extension, separator, field = name.partition(":")
        if not extension or (separator and not field):
            yield (
                f"data.captions[{index}].source = {name!r}: must be caption, an extension, EXTENSION:FIELD, "
                "key_prefix or key_folder; write json:re_caption for the field re_caption of the .json"
            )


@RULES.rule("data.filters", "data.sources")
def _filters_keep_something(config: RunConfig) -> Iterator[str]:
    """A filter has a range that is not empty, and names a source that exists, if any.

    A filter without a range keeps everything; one with an empty range keeps nothing.
    """
    names = {source.name for source in config.data.sources}
    for index, rule in enumerate(config.data.filters):
        where = f"data.filters[{index}] ({rule.column})"
        if math.isnan(rule.min) or math.isnan(rule.max) or rule.min > rule.max:
            yield f"{where}: min = {rule.min:g} and max = {rule.max:g}: no value lies between them; set min <= max"
        elif math.isinf(rule.min) and math.isinf(rule.max) and rule.missing == "keep":
            yield f"{where}: keeps everything; set min, max or missing = 'drop'"
        if rule.source and rule.source not in names:
            yield (
                f"{where}: source = {rule.source!r}: no source in data.sources has this name; name one of "
                f"{', '.join(sorted(names)) or 'none'}, or leave it empty for all"
            )


@RULES.rule("data.resolutions", "vision.channel_mult", "vision.block_side")
def _blocks_tile_buckets(config: RunConfig) -> Iterator[str]:
    """Every bucket side is a multiple of the downsampling factor x `vision.block_side`.

    An image is cut into whole blocks of latent cells (arXiv 2602.14041 Sec. 3.3).
    """
    for where, size_px in _buckets(config):
        yield from _untiled(where, size_px, config)


@RULES.rule("sample.size_px", "evaluate.benchmarks", "vision.channel_mult", "vision.block_side")
def _blocks_tile_samples(config: RunConfig) -> Iterator[str]:
    """Both sides of drawn images are multiples of the downsampling factor x `vision.block_side`.

    They are cut into blocks as the trained ones are.
    """
    for where, size_px in drawn_sizes(config):
        yield from _untiled(where, size_px, config)


@RULES.rule("data.resolutions", "sample.size_px", "evaluate.benchmarks", "vision.channel_mult")
def _sides_have_resolution_tokens(config: RunConfig) -> Iterator[str]:
    """No image is longer than 256 latent cells along a side.

    The resolution tokens are `<|res_1|>` .. `<|res_256|>` (published release).
    """
    limit_px = NUM_RESOLUTION_TOKENS * config.vision.downsample
    for where, size_px in [*_buckets(config), *drawn_sizes(config)]:
        if max(size_px) > limit_px:
            yield (
                f"{where} = {list(size_px)}: a side must be at most {limit_px} px, {NUM_RESOLUTION_TOKENS} cells of "
                f"{config.vision.downsample} px, one resolution token each; use smaller images"
            )


@RULES.rule("data.resolutions")
def _resolutions_are_distinct(config: RunConfig) -> Iterator[str]:
    """Resolutions have different `side_px`, and each names a bucket once.

    Images are counted by the side of their resolution. A bucket named twice has no meaning.
    """
    sides = [resolution.side_px for resolution in config.data.resolutions]
    for index, resolution in enumerate(config.data.resolutions):
        if resolution.side_px in sides[:index]:
            yield (
                f"data.resolutions[{index}].side_px = {resolution.side_px}: another resolution has this side; merge "
                "the two and add up their shares"
            )
        for number, size_px in enumerate(resolution.buckets_px):
            if size_px in resolution.buckets_px[:number]:
                yield f"data.resolutions[{index}].buckets_px[{number}] = {list(size_px)}: is listed before; remove one"


@RULES.rule("data.resolutions")
def _buckets_match_their_resolution(config: RunConfig) -> Iterator[str]:
    """The area of a bucket is between half and twice that of its resolution's square.

    The shares fix how many tokens each resolution costs; a bucket of another size belongs to another resolution.
    """
    for index, resolution in enumerate(config.data.resolutions):
        square = resolution.side_px**2
        for number, (height, width) in enumerate(resolution.buckets_px):
            if not square <= 2 * height * width <= 4 * square:
                yield (
                    f"data.resolutions[{index}].buckets_px[{number}] = {[height, width]}: its area is "
                    f"{height * width / square:.2g} times that of side_px = {resolution.side_px} squared and must be "
                    "0.5 to 2 times; correct the bucket or move it to the resolution that it fits"
                )


@RULES.rule("data.global_batch", "data.resolutions")
def _shares_are_exact(config: RunConfig) -> Iterator[str]:
    """`data.global_batch` gives every resolution a whole number of images at its share.

    The resolutions are mixed exactly in every step (arXiv 2602.14041 Table 4), not on average.
    """
    shares = [resolution.share for resolution in config.data.resolutions]
    multiple = sum(shares) // math.gcd(*shares)
    if config.data.global_batch % multiple:
        yield (
            f"data.global_batch = {config.data.global_batch}: must be a multiple of {multiple} for shares "
            f"{':'.join(map(str, shares))}; use {nearest_multiples(config.data.global_batch, multiple)}"
        )


@RULES.rule("evaluate.images", "evaluate.shards", "data.resolutions")
def _evaluation_has_every_resolution(config: RunConfig) -> Iterator[str]:
    """`evaluate.images` gives every resolution a whole number of images at its share.

    The losses of two evaluations are compared, so both must have the same mix.
    """
    shares = [resolution.share for resolution in config.data.resolutions]
    multiple = sum(shares) // math.gcd(*shares)
    if config.evaluate.shards and config.evaluate.images % multiple:
        yield (
            f"evaluate.images = {config.evaluate.images}: must be a multiple of {multiple} for shares "
            f"{':'.join(map(str, shares))}; use {nearest_multiples(config.evaluate.images, multiple)}"
        )


@RULES.rule(
    "data.max_pack_tokens",
    "data.pack_multiple",
    "data.resolutions",
    "text.max_caption_tokens",
    "classes.num_tokens",
    "model.family",
    "vision",
)
def _largest_sample_fits_a_pack(config: RunConfig) -> Iterator[str]:
    """`data.max_pack_tokens` holds the largest bucket with its query tokens and the longest caption, or its class.

    A sample is never split between two packs.
    """
    vision = config.vision
    where, (height, width) = max(_buckets(config), key=lambda bucket: bucket[1][0] * bucket[1][1])
    num_cells = (height // vision.downsample) * (width // vision.downsample)
    if not config.model.parts.has_text:
        # P - 1 queries; the last block is left out.
        needed = num_cells - 1 + config.classes.num_tokens
        if config.data.max_pack_tokens < needed:
            yield (
                f"data.max_pack_tokens = {config.data.max_pack_tokens}: must be at least {needed} = {num_cells} cells "
                f"of {where} - 1 + classes.num_tokens = {config.classes.num_tokens}; use "
                f"{needed + -needed % config.data.pack_multiple} or more"
            )
        return
    # `<|vision_start|>`, two resolution tokens, P - 1 queries, `<|vision_end|>`.
    num_image_markup = 4 + vision.block_tokens - 1
    needed = num_cells + num_image_markup + config.text.max_caption_tokens + MAX_MARKUP_TOKENS
    if config.data.max_pack_tokens < needed:
        rounded = needed + -needed % config.data.pack_multiple
        yield (
            f"data.max_pack_tokens = {config.data.max_pack_tokens}: must be at least {needed} = {num_cells} cells of "
            f"{where} = {[height, width]} + {num_image_markup} around the image + text.max_caption_tokens = "
            f"{config.text.max_caption_tokens} + {MAX_MARKUP_TOKENS} of markup; use {rounded} or more"
        )


@RULES.rule("data.max_pack_tokens", "data.pack_multiple")
def _padding_stays_within_the_cap(config: RunConfig) -> Iterator[str]:
    """`data.pack_multiple` divides `data.max_pack_tokens`.

    A full pack, padded to the multiple, must not pass the cap.
    """
    data = config.data
    if data.max_pack_tokens % data.pack_multiple:
        yield (
            f"data.max_pack_tokens = {data.max_pack_tokens}: must be a multiple of data.pack_multiple = "
            f"{data.pack_multiple}; use {nearest_multiples(data.max_pack_tokens, data.pack_multiple)}"
        )


def _buckets(config: RunConfig) -> list[tuple[str, tuple[int, int]]]:
    """(name in messages, (height, width) in pixels) of every bucket of every resolution."""
    return [
        (f"data.resolutions[{index}].buckets_px[{number}]", size_px)
        for index, resolution in enumerate(config.data.resolutions)
        for number, size_px in enumerate(resolution.buckets_px)
    ]


def _untiled(where: str, size_px: tuple[int, int], config: RunConfig) -> Iterator[str]:
    vision = config.vision
    unit_px = vision.downsample * vision.block_side
    if any(side % unit_px for side in size_px):
        nearest = [min(multiples_around(side, unit_px), key=lambda legal: abs(legal - side)) for side in size_px]
        yield (
            f"{where} = {list(size_px)}: both sides must be multiples of {unit_px} px, downsampling "
            f"{vision.downsample} x vision.block_side = {vision.block_side}; the nearest legal size is {nearest}"
        )
