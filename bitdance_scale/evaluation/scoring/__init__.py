"""Scores a folder of a drawing: every metric checks all it needs, loads its networks, and gives `metrics.Scores`.

catalogue.py     the metrics that can be scored; the one that is a benchmark's own
drawn.py         a folder that is scored: whose it is, that it is complete, its images
scoring.py       what is chosen, and what every scoring is
asking.py        scorings that ask a judge: who it is, and how its answers are kept
own_scorers.py   the commands of the benchmarks' own scorers
geneval.py, dpg.py, tiif.py, text.py, clip_score.py, distribution.py  one metric each

Modules below, such as `questions`, know the rules; the modules here bring them and a folder together.
"""
