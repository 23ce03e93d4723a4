"""Runs, and the jobs that they do.

process.py        a process: requests to stop, exit codes, what a launcher is told
run.py            the skeleton of every training run: start, resume, loop, what is due when, stop, end
run_sinks.py      where a run writes what it records
shared_index.py   the index of a data set for all ranks

text_to_image.py  the text-to-image job, with start_checks.py, step_feed.py, progress.py, evaluation.py, sampling.py,
                  training_benchmark.py and run_observer.py
tokenizer.py      the tokenizer's job, with tokenizer_objective.py, tokenizer_evaluation.py and tokenizer_records.py
measure_tokenizer.py  a tokenizer measured on held-out images, with tokenizer_measurement.py and tokenizer_report.py
encode_bits.py    images into bit shards: no training, but it starts, stops and ends like it

All ranks call everything alike, so that no rank waits for another in a collective.
"""
