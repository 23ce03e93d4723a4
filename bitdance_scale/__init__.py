"""Train BitDance, the autoregressive text-to-image model with binary visual tokens (arXiv 2602.14041)."""

__version__ = "0.2.0"
