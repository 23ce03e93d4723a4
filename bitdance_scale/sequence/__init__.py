"""Samples as sequences: text tokens, layout of packs, who sees whom, noise."""
