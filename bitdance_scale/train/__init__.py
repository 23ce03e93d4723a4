"""Training: what runs above the parallel engines."""
