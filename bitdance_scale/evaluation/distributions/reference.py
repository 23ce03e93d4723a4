"""What samples are compared with: statistics of a set of images, made, saved and read.

ADM's reference files (such as VIRTUAL_imagenet256_labeled.npz) hold `mu` and `sigma` of the pool features, `mu_s` and
`sigma_s` of the spatial ones over the whole data set, and in `arr_0` 10,000 of its images for precision and recall.
Files saved here have the same four arrays, and the features in place of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitdance_scale.atomic_files import replacing
from bitdance_scale.errors import CheckpointError, DataError
from bitdance_scale.evaluation.distributions.features import ImageFeatures, collect
from bitdance_scale.evaluation.distributions.image_sets import (
    IMAGES_KEY,
    ArraySpec,
    FolderImages,
    NpzImages,
    read_arrays,
    read_arrays_header,
)
from bitdance_scale.evaluation.inception import NUM_FEATURES, NUM_SPATIAL_FEATURES, Inception

Moments = tuple[np.ndarray, np.ndarray]
"""(mean [D], covariance [D, D]), float64."""

Watch = Callable[[Iterable[np.ndarray], int], Iterable[np.ndarray]]
"""Passes on batches of images, of which there are so many in all, and may say how far it is."""

_POOL, _SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
# Of files saved here: the features; (number of images, height, width); and the digest of the weights.
_ROWS, _ABOUT, _NETWORK = "rows", "about", "network"
_NUM_FEATURES: Mapping[tuple[str, str], int] = {_POOL: NUM_FEATURES, _SPATIAL: NUM_SPATIAL_FEATURES}
_ASYMMETRY = 1e-6


def _unwatched(batches: Iterable[np.ndarray], total: int) -> Iterable[np.ndarray]:
    return batches


@dataclass(frozen=True)
class Reference:
    """A set of images that samples are compared with.

    Attributes:
        source: where it is from, for people.
        pool: moments of the pool features, for FID.
        spatial: those of the spatial features, for sFID; None: the file has none.
        rows: float32 [M, 2048], pool features for precision and recall; None: there are none.
        num_images: of how many images the moments are; None: the file does not say.
        size_px: (height, width) of the images; None: not known.
        network: digest of the weights that computed it; None: not known, as in ADM's files, which are of the
            original network.
    """

    source: str
    pool: Moments
    spatial: Moments | None
    rows: np.ndarray | None
    num_images: int | None
    size_px: tuple[int, int] | None
    network: str | None


def make_reference(features: ImageFeatures, source: str) -> Reference:
    """A reference of images; those of several ranks are joined first.

    Args:
        features: of the images.
        source: where they are from.

    Raises:
        DataError: there are fewer than 2 images.
    """
    if len(features) < 2:
        raise DataError(f"{source}: {len(features)} images have no distribution; there must be at least 2")
    return Reference(
        source=source,
        pool=features.pool.moments(),
        spatial=features.spatial.moments(),
        rows=features.rows(),
        num_images=len(features),
        size_px=features.size_px,
        network=features.network,
    )


def save_reference(path: Path, reference: Reference) -> None:
    """Writes a reference that was made of images.

    Args:
        path: the .npz.
        reference: made by `make_reference`.

    Raises:
        DataError: it was read from a file that does not say what it was made of.
        OSError: of the file system.
    """
    if reference.spatial is None or reference.num_images is None or reference.network is None:
        raise DataError(f"{reference.source}: does not say of how many images it is and with which network; keep it")
    if reference.size_px is None:
        raise DataError(f"{reference.source}: does not say of which size its images are; keep it")
    arrays = dict(zip((*_POOL, *_SPATIAL), (*reference.pool, *reference.spatial), strict=True))
    if reference.rows is not None:
        arrays[_ROWS] = reference.rows
    arrays[_ABOUT] = np.array([reference.num_images, *reference.size_px], dtype=np.int64)
    arrays[_NETWORK] = np.array(reference.network)
    with replacing(path) as writing, writing.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def check_reference(path: Path) -> dict[str, ArraySpec]:
    """Checks a folder or file from names and headers alone, before anything is computed.

    Returns:
        The arrays of the file; empty for a folder.

    Raises:
        DataError: it is neither images nor statistics, or statistics of another network.
    """
    if path.is_dir():
        FolderImages(path)
        return {}
    if not path.is_file():
        raise DataError(f"{path}: there is no such folder or .npz of a reference")
    specs = read_arrays_header(path)
    if IMAGES_KEY in specs:
        NpzImages(path)
    elif not holds_statistics(specs):
        raise DataError(
            f"{path}: holds {', '.join(specs) or 'nothing'}, and neither images ({IMAGES_KEY}) nor statistics "
            f"({', '.join((*_POOL, *_SPATIAL))}); name ADM's reference, a folder of images, or a file saved here"
        )
    for names, number in _NUM_FEATURES.items():
        if not {*names} & specs.keys():
            continue
        for name, shape in zip(names, ((number,), (number, number)), strict=True):
            spec = specs.get(name)
            if spec is None or spec.shape != shape or spec.dtype.kind != "f":
                found = "is missing" if spec is None else f"is {spec.dtype} {list(spec.shape)}"
                raise DataError(
                    f"{path}: {name} {found}, expected floats {list(shape)}: statistics of another network, or of "
                    "another layer. Name ADM's reference, a folder of images, or a file saved here"
                )
    is_ours = _ABOUT in specs or _NETWORK in specs or _ROWS in specs
    if is_ours:
        _check_ours(path, specs)
    return specs


def holds_statistics(specs: Mapping[str, ArraySpec]) -> bool:
    """Whether a file with these arrays holds statistics, or images alone, of which they are yet to be made."""
    return _POOL[0] in specs


def _check_ours(path: Path, specs: Mapping[str, ArraySpec]) -> None:
    about, network, rows = (specs.get(name) for name in (_ABOUT, _NETWORK, _ROWS))
    good = about is not None and about.shape == (3,) and about.dtype == np.int64
    good = good and network is not None and network.shape == () and network.dtype.kind == "U"
    good = good and (rows is None or (len(rows.shape) == 2 and rows.shape[1] == NUM_FEATURES))
    good = good and (rows is None or rows.dtype == np.float32) and {*_POOL, *_SPATIAL} <= specs.keys()
    if not good:
        raise DataError(f"{path}: is not what was saved as a reference; make it again from its images")


def read_reference(path: Path, inception: Inception, keeps_rows: bool = True, watch: Watch = _unwatched) -> Reference:
    """A reference from a folder of images, ADM's .npz, statistics, or a file saved by `save_reference`.

    Where a file holds statistics and images, as ADM's do, FID and sFID are of the statistics, and the images are for
    precision and recall.

    Args:
        path: the folder or file.
        inception: computes features of images.
        keeps_rows: whether precision and recall are wanted; without them images beside statistics are not looked at.
        watch: passes on the batches of images, which may be many, and their number.

    Raises:
        DataError: as `check_reference`, or values are damaged, or an image is.
        CheckpointError: the file was saved with other weights of the network.
    """
    specs = check_reference(path)
    source = str(path)
    if not holds_statistics(specs):
        images = FolderImages(path) if path.is_dir() else NpzImages(path)
        return make_reference(collect(watch(images, images.file.number), inception, keeps_rows), source)
    if _NETWORK in specs:
        # Before the rest is read, which may be large.
        network = str(read_arrays(path, [_NETWORK])[_NETWORK])
        check_network(source, network, inception.digest)
    has_spatial = _SPATIAL[0] in specs
    values = read_arrays(path, [*_POOL, *(_SPATIAL if has_spatial else ())])
    pool = _moments(path, values, _POOL)
    spatial = _moments(path, values, _SPATIAL) if has_spatial else None
    if _ABOUT in specs:
        about = [int(value) for value in read_arrays(path, [_ABOUT])[_ABOUT]]
        rows = read_arrays(path, [_ROWS])[_ROWS] if keeps_rows and _ROWS in specs else None
        if about[0] < 2 or (rows is not None and len(rows) != about[0]):
            raise DataError(f"{path}: says it is of {about[0]} images, which is not so; make it again from its images")
        return Reference(source, pool, spatial, rows, about[0], (about[1], about[2]), inception.digest)
    size_px, rows = None, None
    if IMAGES_KEY in specs:
        images = NpzImages(path)
        size_px = images.file.size_px
        rows = collect(watch(images, images.file.number), inception).rows() if keeps_rows else None
    return Reference(source, pool, spatial, rows, None, size_px, None)


def check_network(source: str, network: str | None, wanted: str) -> None:
    """Refuses features of another network than `wanted`; one that is not known passes.

    Raises:
        CheckpointError: the digests of their weights differ.
    """
    if network is not None and network != wanted:
        raise CheckpointError(
            f"{source}: was made with other weights of Inception (SHA-256 {network[:12]}) than these ({wanted[:12]}); "
            "make it again with these, or name the others"
        )


def _moments(path: Path, values: Mapping[str, np.ndarray], names: tuple[str, str]) -> Moments:
    """Moments of a file as float64, if they can be moments."""
    mean, covariance = (values[name].astype(np.float64) for name in names)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: {' or '.join(names)} holds NaN or infinity; fetch or make it again")
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > _ASYMMETRY * scale or (np.diagonal(covariance) < 0).any():
        raise DataError(f"{path}: {names[1]} is no covariance, as it is not symmetric or has a negative variance")
    return mean, covariance
