"""FID, sFID, Inception Score, precision and recall of a folder, or of images of no benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.metrics.catalogue import DISTRIBUTION
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.scoring.scoring import MissingChoiceError, Scoring

if TYPE_CHECKING:
    import torch

    from bitdance_scale.evaluation.inception import Inception

_MIN_IMAGES = 2


class DistributionScoring(Scoring):
    """The images as a set against a reference."""

    usual_batch = 32
    metric = DISTRIBUTION
    default_of = ("imagenet",)
    inception: Inception
    device: torch.device

    def check(self) -> None:
        """Refuses missing weights, and references that are none or cannot be saved."""
        choices = self.choices
        if choices.inception is None:
            raise MissingChoiceError(
                "--inception: sets of images are compared by Inception; name torch_fidelity's weights, "
                "weights-inception-2015-12-05-6726825d.pth"
            )
        if choices.reference is None:
            raise MissingChoiceError(
                "--reference: names what the images are compared with: ADM's .npz, or a folder or .npz of real images"
            )
        if self.drawn.num_images < _MIN_IMAGES:
            raise ConfigError(f"{self.drawn.root}: holds {self.drawn.num_images} image, and a set has at least 2")
        # Late: they import torch.
        from bitdance_scale.evaluation.distributions.reference import check_reference, holds_statistics
        from bitdance_scale.evaluation.inception import check_inception_weights

        specs = check_reference(choices.reference)
        if choices.save_reference is not None:
            _check_saving(choices.save_reference)
            if holds_statistics(specs):
                raise ConfigError(
                    f"--save-reference {choices.save_reference}: {choices.reference} holds statistics already; leave "
                    "the option out"
                )
        check_inception_weights(choices.inception)

    def load(self, device: torch.device) -> None:
        """Loads Inception."""
        from bitdance_scale.evaluation.inception import load_inception

        assert self.choices.inception is not None
        self.inception, self.device = load_inception(self.choices.inception).to(device), device

    def score(self) -> Scores:
        """The scores as figures."""
        from bitdance_scale.evaluation.distributions.features import collect
        from bitdance_scale.evaluation.distributions.reference import read_reference, save_reference
        from bitdance_scale.evaluation.distributions.scores import compare

        choices = self.choices
        assert choices.reference is not None
        # First, as it is refused where it was made with other weights.
        reference = read_reference(
            choices.reference,
            self.inception,
            watch=lambda batches, total: self.drawn.watched(batches, total, "reference"),
        )
        if choices.save_reference is not None:
            save_reference(choices.save_reference, reference)
        samples = collect(self.drawn.batches(self.metric.title, self.batch_size), self.inception)
        found = compare(samples, reference, self.device)
        figures = {
            "FID": found.fid,
            "sFID": found.sfid,
            "Inception Score": found.inception_score,
            "precision": found.precision,
            "recall": found.recall,
        }
        scorer = {
            "inception": self.inception.digest,
            "reference": str(choices.reference),
            "reference_images": found.reference_images,
            "num_images": found.num_images,
        }
        notes = list(found.notes)
        if self.drawn.array is not None:
            notes.append("for the Inception Score images count in turns, the first of every class and then the second")
        return self.found(scorer, (), {name: value for name, value in figures.items() if value is not None}, notes)


def _check_saving(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"--save-reference {path}: exists; name a new file, or use it with --reference {path}")
    if not path.parent.is_dir():
        raise ConfigError(f"--save-reference {path}: there is no folder {path.parent}; make it first")
