"""Images, and captions of images, from a trained model."""

from bitdance_scale.torchvision_operators import declare_operators

# Before transformers is imported.
declare_operators()
