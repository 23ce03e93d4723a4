"""The benchmarks of image models: their texts or classes in, and folders of pictures as their own scorers read them.

catalogue.py     the benchmarks by name
benchmark.py     what every benchmark is: prompts, settings, layout; the seed of an image
prompt_files.py  published files of prompts as lines and rows
layout.py        which files show the images of a prompt
picture.py       one picture file: writing, checking, reading
array_file.py    the one array that images of classes become
image_folder.py  a folder of a drawing: what is done, what is missing, what does not belong there
solving.py       with which settings images are drawn: those asked for, the benchmark's, the model's
manifest.py      `drawing.json`, which says what a folder was drawn with
subset.py        a fixed part of the prompts
geneval.py, dpg.py, oneig.py, tiif.py, imagenet.py, demo_scenes.py, demo_classes.py  one benchmark each

Facts of a benchmark were checked against its published scripts; each file names them. docs/benchmarks_of_quality.md
has the table.
"""
