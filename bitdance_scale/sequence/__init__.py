"""Samples as sequences: text tokens, block raster order, layout of packs, noise."""
