"""Benchmarks that are scored by asking a vision-language model about images, and the reading of text in images.

judge.py         who is asked, what counts as yes and no, and the file that keeps every answer
endpoint.py      a judge behind an OpenAI-compatible endpoint
local_judge.py   a judge that transformers loads
dpg.py           DPG-Bench: propositions that depend on each other
tiif.py          TIIF-Bench: several questions in one request
words.py         how much of a text was drawn, given what was read
ocr.py           reading text in images
"""
