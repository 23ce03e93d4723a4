"""A report that compares drawings by their scores: one page, the same as data, and tables for W&B.

scored_folder.py  a drawing with its scores, as a folder has them; what is refused
comparison.py     drawings of one benchmark by one metric: values, paired differences, worst prompts
settings.py       settings that drawings share, and those in which they differ
sweep.py          drawings of one model that differ in one number
thumbnails.py     pictures of a prompt, small and within a bound
figures.py        values with intervals as pictures
report_page.py    the page
record.py         the same as JSON values, and as rows of tables
"""
