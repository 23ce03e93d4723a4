"""Sets of generated images against sets of real ones, as ADM's evaluation suite compares them.

image_sets.py       images of a folder or of an .npz in batches
features.py         what is kept of images as they come, and how the parts of several ranks are joined
inception_score.py  the Inception Score from sums
manifold.py         precision and recall by nearest neighbours
reference.py        what samples are compared with: made, saved and read
scores.py           all scores of samples against a reference
clip_score.py       how well images fit their prompts

FID and sFID are `evaluation/frechet.py` of two layers of `evaluation/inception.py`. The suite is
openai/guided-diffusion, evaluations/evaluator.py.
"""
