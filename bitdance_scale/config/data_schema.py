"""The sections of a configuration that say what is trained on: sources, captions, filters, resolutions, S3."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bitdance_scale.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """One resolution of the mix, with the image sizes (buckets) it is trained at."""

    side_px: int = setting(doc="Side of its square bucket in pixels, which is also its name in metrics.")
    share: int = setting(doc="Its part of each global batch, relative to the other resolutions.")
    buckets_px: tuple[tuple[int, int], ...] = setting(
        doc="(height, width) of each bucket in pixels; transposes are added."
    )


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """One of several captions of a sample, of which one is drawn each time."""

    source: str = setting(
        doc="caption (the .txt, or `caption` of the .json where there is no .txt), another text member by its "
        "extension (alt.txt), a field of a JSON member (json:re_caption), or a part of the key: key_prefix (the file "
        "name up to its first underscore) or key_folder (its folder)."
    )
    share: int = setting(1, doc="How often it is drawn, relative to the others that the sample has.")


@dataclass(frozen=True, kw_only=True)
class DataFilter:
    """A range that a value of a sample must lie in."""

    column: str = setting(
        doc="height_px, width_px, short_side_px, long_side_px, pixels, aspect (long over short side), or a numeric "
        "field of the records, such as punsafe."
    )
    min: float = setting(float("-inf"), doc="Least value kept.")
    max: float = setting(float("inf"), doc="Greatest value kept.")
    missing: str = setting("drop", doc="What happens to samples without a value: drop or keep.")
    source: str = setting("", doc="The source (`data.sources[].name`) that it is for; empty: all.")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several sources that are mixed by share."""

    name: str = setting(doc="Its name in metrics and messages.")
    shards: tuple[str, ...] = setting(doc="Its WebDataset tars, as `data.shards`; no tar may be in two sources.")
    share: int = setting(doc="Its part of every resolution, relative to the other sources; 0 leaves it out.")
    has_borders: bool = setting(
        False,
        doc="Whether img2dataset padded its images to squares (resize_mode=border); the borders are cropped away.",
    )


@dataclass(frozen=True, kw_only=True)
class S3Section:
    """How shards on S3 (`s3://BUCKET/KEY`) are reached; credentials come through boto3's own chain."""

    endpoint_url: str = setting("", doc="Endpoint of an S3-compatible store; empty: as boto3 finds it, or Amazon's.")
    profile: str = setting("", doc="Profile of boto3's credentials; empty: the default one.")
    anonymous: bool = setting(False, doc="Whether requests go unsigned, to public buckets.")
    read_timeout_s: float = setting(30.0, doc="Seconds without a byte after which a request is made again.")
    deadline_s: float = setting(
        300.0, doc="Seconds without progress, over all repetitions, after which a range counts as unreadable."
    )
    cache_dir: str = setting(
        "", doc="Folder on a disk of the node, for its processes together, that keeps what is read; empty: none."
    )
    cache_gb: float = setting(500.0, doc="How much that folder may hold, in 10^9 bytes; all shards must fit.")
    cache_block_mb: int = setting(8, doc="How much is fetched for it at once, in 2^20 bytes.")


@dataclass(frozen=True, kw_only=True)
class AugmentSection:
    """What is varied in the images each time (the class-conditional release); drawn by (seed, epoch, sample)."""

    flip: float = setting(0.0, doc="Probability that an image is mirrored; captions may say left and right.")
    crop: float = setting(
        0.0, doc="Probability that an image is a crop at a random place of the picture; else it is its centre."
    )
    crop_zoom: float = setting(
        1.25, doc="A crop is out of the picture scaled to cover 1 to this many times the short side of its bucket."
    )
    crop_until_epoch: float = setting(
        0.0, doc="Epoch of a sample up to which `crop` holds; from there it falls linearly to 0 at `crop_ends_epoch`."
    )
    crop_ends_epoch: float = setting(0.0, doc="Epoch of a sample from which there is no crop; 0: `crop` always holds.")
    bits_crops: int = setting(
        10, doc="Crops of each image that `bitdance encode` stores, of which a run with `data.bits_dir` draws one."
    )

    @property
    def is_active(self) -> bool:
        """Whether anything is varied."""
        return self.flip > 0 or self.crop > 0


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The image-text data and how it is batched."""

    shards: tuple[str, ...] = setting(
        (),
        doc="WebDataset tars of the only source: files, folders, globs or brace lists. Several: `data.sources`.",
        example='["data/demo"]',
    )
    sources: tuple[DataSource, ...] = setting(
        (),
        doc="Sources mixed by exact share, instead of `data.shards`; `data.shards = []` clears an inherited one.",
        example='[{name="web", share=3, shards=["data/web"]}, {name="own", share=1, shards=["data/own"]}]',
    )
    has_borders: bool = setting(False, doc="`data.sources[].has_borders` of `data.shards`.")
    captions: tuple[CaptionChoice, ...] = setting(
        (CaptionChoice(source="caption"),), doc="Captions of a sample; one of those that it has is drawn, by share."
    )
    filters: tuple[DataFilter, ...] = setting(
        (), doc="Samples outside any of these ranges are left out.", example='[{column="aspect", max=2.0}]'
    )
    bits_dir: str = setting(
        "", doc="Folder of bit shards that `bitdance encode` made of this data; the images are not read then."
    )
    mode: str = setting("indexed", doc="indexed, or stream: tars that can only be read from front to back (data.md).")
    stream_resampled: bool = setting(False, doc="Streams: whether replicas draw them at random, with replacement.")
    stream_buffer: int = setting(500, doc="Streams: samples that a replica holds, of which the next is drawn.")
    stream_resume: str = setting("restart", doc="Streams: restart in another order, or skip by reading all again.")
    index_dir: str = setting("", doc="Folder of the index; empty: `.bitdance_index` beside the first shard.")
    global_batch: int = setting(doc="Images per optimiser step.")
    resolutions: tuple[Resolution, ...] = setting(
        doc="Resolutions, mixed exactly in every global batch.",
        example="[{side_px=256, share=1, buckets_px=[[256, 256]]}]",
    )
    max_upscale: float = setting(1.0, doc="An image enters a bucket only if it need not be enlarged more than this.")
    resize: str = setting(
        "sharp",
        doc="Images are resized from: sharp, all pixels, with Lanczos; fast, large JPEGs at half size; adm, all "
        "pixels, halved with a box filter and then bicubic, as for published scores on ImageNet.",
    )
    augment: AugmentSection = dataclasses.field(default_factory=AugmentSection)
    max_pack_tokens: int = setting(doc="Token cap of a pack, one micro-batch of one replica.")
    pack_multiple: int = setting(128, doc="Packs are padded to a multiple of this many tokens.")
    text_drop: float = setting(0.1, doc="Probability that a sample is trained without its caption (guidance).")
    image_to_text_share: float = setting(0.0, doc="Share of samples trained as image-to-text.")
    max_skipped_share: float = setting(
        0.001, doc="Training stops when unreadable samples exceed this share (after 1000 samples)."
    )
    read_threads: int = setting(2, doc="Threads that read and decode.")
    prefetch_steps: int = setting(2, doc="Global batches read ahead.")
    s3: S3Section = dataclasses.field(default_factory=S3Section)

    @property
    def active_sources(self) -> tuple[DataSource, ...]:
        """The sources that are trained on; `data.shards` is one without a name."""
        if not self.sources:
            return (DataSource(name="", shards=self.shards, share=1, has_borders=self.has_borders),)
        return tuple(source for source in self.sources if source.share > 0)
