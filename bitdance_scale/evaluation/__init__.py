"""How alike images are, and sets of images, by the field's measures; and the page that shows it.

pixels.py     PSNR and SSIM of pairs of images
inception.py  the features that sets of images are compared by
frechet.py    the distance of two sets of features
clip.py       embeddings of images and texts
image_array.py  sets of images as one .npz
pretrained.py   networks of transformers, whole or not at all
page.py       tables and pictures in one HTML file
progress.py   how far a long work on images is, in the log
picture_scorers.py  scorers of single pictures by the names of their metrics
run_benchmarks.py   the benchmarks that a run draws and scores while it trains

benchmarks/     prompts of benchmarks, and folders of their pictures
metrics/        scores of drawings in one form, with intervals, in files, compared
scoring/        folders of drawings to such scores, a module per metric
report/         drawings compared by their scores, on one page
distributions/  scores of sets of generated images: FID, sFID, Inception Score, precision, recall, CLIP score
geneval/        GenEval's scorer
scenes/         the scorer of the demo's scenes and classes
questions/      benchmarks that are scored by asking a model about images

LPIPS is in `vision/perceptual.py`, because training uses it as well.
"""
