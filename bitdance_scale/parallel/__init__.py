"""The model over many ranks: process groups, pipeline stages, one optimiser step, ZeRO."""
