"""All scores of samples against a reference, as ADM's evaluation suite reports them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.distributions.features import ImageFeatures
from bitdance_scale.evaluation.distributions.manifold import NUM_NEIGHBOURS, precision_recall
from bitdance_scale.evaluation.distributions.reference import Reference, check_network
from bitdance_scale.evaluation.frechet import USUAL_IMAGES, frechet_distance

# Above it the parts of the Inception Score are of different contents, as in a set that is sorted by class.
_MAX_PART_RATIO = 1.05


@dataclass(frozen=True)
class DistributionScores:
    """Scores of a set of samples.

    Attributes:
        num_images: samples.
        fid: Frechet distance of pool features; lower is better.
        sfid: that of spatial features; None: the reference has none.
        inception_score: higher is better; from 1 to 1,008.
        inception_score_whole: that of all images as one part.
        precision: share of samples near the reference, in [0, 1]; None: the reference or the samples have no features.
        recall: share of the reference near samples, in [0, 1]; None as precision.
        reference_images: number of images of the reference's statistics; None: not known.
        reference_rows: number of images of the reference for precision and recall.
        notes: what is to be known when the scores are compared with others.
    """

    num_images: int
    fid: float
    sfid: float | None
    inception_score: float
    inception_score_whole: float
    precision: float | None
    recall: float | None
    reference_images: int | None
    reference_rows: int
    notes: tuple[str, ...]


def compare(samples: ImageFeatures, reference: Reference, device: torch.device) -> DistributionScores:
    """Scores of samples.

    Args:
        samples: of all ranks, joined.
        reference: what they are compared with.
        device: where distances between features are computed.

    Raises:
        DataError: samples and reference are of different sizes, or there are too few.
        CheckpointError: they are of different networks.
    """
    number = len(samples)
    if number < 2:
        raise DataError(f"{number} samples have no distribution; there must be at least 2")
    check_network(reference.source, reference.network, samples.network)
    if reference.size_px is not None and reference.size_px != samples.size_px:
        ours, theirs = (f"{width} x {height} px" for height, width in (samples.size_px, reference.size_px))
        raise DataError(
            f"{reference.source}: its images are of {theirs} and the samples of {ours}; name the reference of the "
            "samples' size, as every size has scores of its own"
        )
    samples.check_positions()
    rows = samples.rows()
    too_few = min(number, 0 if reference.rows is None else len(reference.rows)) <= NUM_NEIGHBOURS
    near = None
    if rows is not None and reference.rows is not None and not too_few:
        near = precision_recall(reference.rows, rows, device)
    scores = DistributionScores(
        num_images=number,
        fid=frechet_distance(samples.pool.moments(), reference.pool),
        sfid=None if reference.spatial is None else frechet_distance(samples.spatial.moments(), reference.spatial),
        inception_score=samples.score.score(),
        inception_score_whole=samples.score.whole_score(),
        precision=None if near is None else near.precision,
        recall=None if near is None else near.recall,
        reference_images=reference.num_images,
        reference_rows=0 if reference.rows is None else len(reference.rows),
        notes=(),
    )
    return dataclasses.replace(scores, notes=tuple(_notes(scores)))


def _notes(scores: DistributionScores) -> list[str]:
    notes = []
    if scores.num_images != USUAL_IMAGES:
        notes.append(
            f"of {scores.num_images} samples; these scores are reported of {USUAL_IMAGES}, and of fewer FID and sFID "
            "are higher"
        )
    if scores.reference_images not in (None, USUAL_IMAGES):
        notes.append(f"the reference is of {scores.reference_images} images")
    if scores.sfid is None:
        notes.append("no sFID: the reference has no statistics of spatial features (mu_s, sigma_s)")
    if scores.precision is None:
        notes.append(
            "no precision and recall: they need features, or images, of the reference and of the samples, of more than "
            f"{NUM_NEIGHBOURS} images each"
        )
    if scores.inception_score_whole > _MAX_PART_RATIO * scores.inception_score:
        notes.append(
            f"the Inception Score of all samples together is {scores.inception_score_whole:.2f}: parts of 5,000 in the "
            "order of the samples differ, as when they are sorted by class; mix the order, as published sets are"
        )
    return notes
