"""The model over many ranks: process groups, pipeline stages, one optimiser step, ZeRO."""

from bitdance_scale.parallel.quiet import silence_engines

# Here, because the engines talk while they are imported, and only this package imports them.
silence_engines()
