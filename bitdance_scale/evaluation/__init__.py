"""How alike images are, and sets of images, by the field's measures; and the page that shows it.

pixels.py     PSNR and SSIM of pairs of images
inception.py  the features that sets of images are compared by
frechet.py    the distance of two sets of features
geneval/      GenEval's scorer of images from prompts
page.py       tables and pictures in one HTML file

LPIPS is in `vision/perceptual.py`, because training uses it as well.
"""
