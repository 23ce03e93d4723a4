"""The model over many ranks: process groups, pipeline stages, one optimiser step, optimiser engines."""

from bitdance_scale.parallel.engine_setup import prepare_engines

# Here, because it must come before any import of an engine, and only modules of this package import them.
prepare_engines()
