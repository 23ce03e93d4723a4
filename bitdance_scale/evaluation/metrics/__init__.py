"""Scores of drawings in one form, whatever the metric: per image, summed up with intervals, kept in a file, compared.

image_score.py  the score of an image and what it adds to the parts of a metric
catalogue.py    the metrics by name
metric.py       what a metric is: how its values come from its parts
estimate.py     values with bootstrap intervals, and differences of two drawings of the same prompts
table.py        scores as a table of plain text
picture_scorer.py  what every scorer of single pictures is
score_file.py   `scores/{metric}.json` in the folder of a drawing
"""
