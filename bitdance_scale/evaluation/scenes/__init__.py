"""Pictures of the demo's scenes judged by image analysis, without any network.

reading.py   which shapes of which colours are where in a picture
captions.py  what a caption asks for, and whether a picture shows it: GenEval's six categories
style.py     whether a picture is in the style that fine-tuning on the demo learns
scorer.py    the scores of pictures of `demo-scenes` and of `demo-classes`
"""
