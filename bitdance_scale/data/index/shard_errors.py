"""What a scan of a shard counts as wrong, and what to do about it."""

from __future__ import annotations

import enum


class ShardError(enum.StrEnum):
    """What a scan counts. Their values are in the tables of existing indexes."""

    DAMAGED_TAR = "damaged_tar"
    MISSING_IMAGE = "missing_image"
    UNREADABLE_SIZE = "unreadable_size"
    DUPLICATE_SAMPLE = "duplicate_sample"
    DOTTED_NAME = "dotted_name"
    SYMBOLIC_LINK = "symbolic_link"
    BROKEN_LINK = "broken_link"
    TOO_LARGE = "too_large"
    INVALID_JSON = "invalid_json"
    DUPLICATE_MEMBER = "duplicate_member"
    LOST_ROTATION = "lost_rotation"
    TWO_IMAGES = "two_images"


LOSSES = (
    ShardError.MISSING_IMAGE,
    ShardError.UNREADABLE_SIZE,
    ShardError.DUPLICATE_SAMPLE,
    ShardError.DOTTED_NAME,
    ShardError.SYMBOLIC_LINK,
    ShardError.BROKEN_LINK,
    ShardError.TOO_LARGE,
    ShardError.TWO_IMAGES,
)
"""Each of them keeps one sample out of the index."""
ADVICE = {
    ShardError.DUPLICATE_SAMPLE: "samples whose key came before in the tar, as in tars joined with `tar -A`; give "
    "every sample a key of its own, or leave the tars apart",
    ShardError.DOTTED_NAME: "images with a dot before the extension; a key ends at the first dot, so they all belong "
    "to one sample; replace the other dots",
    ShardError.SYMBOLIC_LINK: "symbolic links instead of images; write the tar with `tar -h`, which follows them",
    ShardError.BROKEN_LINK: "hard links to files that are not in the tar; write the tar again with those files",
    ShardError.TOO_LARGE: "image files of more bytes than are ever decoded",
    ShardError.TWO_IMAGES: "samples with a .jpg and a .jpeg, of which one would be trained under the caption or label "
    "of the other; give each a key of its own",
    ShardError.LOST_ROTATION: "images that were rotated by their EXIF, which re-encoding has removed, so they lie on "
    "their side; fetch them again without re-encoding",
}
"""What an error means where its name does not say it, and the way out."""


def advised(error: str) -> str:
    """The name of an error, with what it means and the way out."""
    advice = ADVICE.get(ShardError(error)) if error in set(ShardError) else None
    return f"{error} ({advice})" if advice else error
