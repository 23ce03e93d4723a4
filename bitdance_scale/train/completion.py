"""What a run makes after its last checkpoint, where it was killed between the two."""

from __future__ import annotations

from bitdance_scale.observe.metrics import EVALUATION_FILE, append_evaluation, read_evaluations
from bitdance_scale.parallel.agreement import on_first_rank
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.run_observer import draw_overview, samples_path, show_result, write_samples
from bitdance_scale.train.trainer import Trainer


def complete(trainer: Trainer, topology: Topology) -> None:
    """Makes the losses on held-out images and the pictures of a run's last step, if they are not there; a collective."""
    lacks_evaluation, lacks_samples = on_first_rank(lambda: (_lacks_evaluation(trainer), _lacks_samples(trainer)))
    step, folder = trainer.progress.step, trainer.run_folder
    evaluation = trainer.evaluate() if lacks_evaluation else None
    pictures = trainer.draw_samples() if lacks_samples else []
    if topology.rank == 0 and (lacks_evaluation or lacks_samples):
        if evaluation is not None:
            append_evaluation(folder, evaluation)
        if lacks_samples:
            write_samples(folder, step, pictures, trainer.config.sample.prompts)
        draw_overview(folder)
        print("\n" + show_result(folder), flush=True)


def _lacks_evaluation(trainer: Trainer) -> bool:
    if not trainer.config.evaluate.shards:
        return False
    path = trainer.run_folder / EVALUATION_FILE
    evaluations = read_evaluations(path) if path.exists() else []
    return not evaluations or evaluations[-1].step < trainer.progress.step


def _lacks_samples(trainer: Trainer) -> bool:
    section = trainer.config.sample
    is_wanted = bool(section.prompts) and section.every_steps > 0
    return is_wanted and not samples_path(trainer.run_folder, trainer.progress.step).exists()
