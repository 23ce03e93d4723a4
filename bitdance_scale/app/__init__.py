"""A page on which to draw with a model, and to watch a run; gradio's one home."""
