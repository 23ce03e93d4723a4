"""The binary visual tokenizer: pixels to bits and back (arXiv 2602.14041 Sec. 3.1)."""
