"""GenEval's scorer (Ghosh et al., NeurIPS 2023, arXiv 2310.11513) without mmdetection and open_clip.

classes.py        the classes, under the names that prompts use
rules.py          what must be found in an image, and where
summary.py        scores of images, further shares, and lines as the published scorer writes them
preprocessing.py  images as the detector wants them
mmdet_weights.py  the published scorer's weights of the detector, in transformers' names
detector.py       Mask2Former: objects of an image, with boxes and masks
colours.py        the colour of an object by CLIP
scorer.py         images and prompts in, verdicts out

The rules are those of the published scorer: djghosh13/geneval, evaluation/evaluate_images.py and summary_scores.py.
"""
