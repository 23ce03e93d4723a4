"""Measures a tokenizer on the ranks of a job and delivers the results (`bitdance tokenizer evaluate`)."""

from __future__ import annotations

import logging
import sys

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.parallel.agreement import all_ranks
from bitdance_scale.train.process import EXIT_COMPLETE, StopRequest
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.shared_index import image_index
from bitdance_scale.train.tokenizer_measurement import Measurer, Measuring
from bitdance_scale.train.tokenizer_report import Report

logger = logging.getLogger(__name__)

_WAIT_S = 14 * 24 * 3600.0


def run_measuring(measuring: Measuring) -> int:
    """Measures a tokenizer, prints a table of it and writes the results, on the ranks of this job.

    Args:
        measuring: what is measured; its files have been checked.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    # There is no run folder for a log file.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with joined_ranks(ParallelSection(), timeout_s=_WAIT_S) as topology, StopRequest() as stop:
        # Nothing is trained on these shards, so it does not matter which of their samples an index leaves out.
        index = image_index(measuring.shards, "", max_skipped_share=1.0)
        with all_ranks():
            measurer = Measurer(measuring, topology)
        results = []
        for size in measuring.sizes:
            result = measurer.measure(index, size, stop)
            if result is not None:
                results.append(result)
                logger.info("%s: %d images measured", size.name, len(result.samples))
        with all_ranks():
            if topology.rank == 0:
                report = Report(measuring, index, measurer.autoencoder, results, topology)
                print(report.text())
                report.write()
    return EXIT_COMPLETE
