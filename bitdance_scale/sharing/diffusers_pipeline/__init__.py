"""Code that an export in diffusers' layout carries: a pipeline and the networks that it draws with.

Every file stands alone, because diffusers fetches a component's one file and no other. They import torch, transformers,
diffusers, numpy and what these bring, and nothing of this package. They compute what `generate/` computes on one
device, bit for bit on a processor (`tests/parity/test_diffusers_pipeline.py`), without CUDA graphs. They read the
published names of tensors and the published keys of configurations.
"""
