"""BitDance's projector: from the bits of a vision token to the width of the language model.

Written for the diffusers library; licensed under Apache-2.0, as the project bitdance_scale that it comes from.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional


class BitDanceProjector(ModelMixin, ConfigMixin):
    """Linear, tanh-GELU, linear.

    Args:
        in_dim: bits of a vision token.
        out_dim: width of the language model.
        hidden_act: gelu_pytorch_tanh, the only one that there is.

    Raises:
        ValueError: another activation.
    """

    @register_to_config
    def __init__(self, in_dim: int, out_dim: int, hidden_act: str = "gelu_pytorch_tanh") -> None:
        super().__init__()
        if hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_act = {hidden_act!r}: BitDance's projector has gelu_pytorch_tanh")
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        """Bits [.., in_dim] of -1 and 1, any dtype -> [.., out_dim] in the dtype of the weights."""
        hidden = functional.gelu(self.fc1(bits.to(self.fc1.weight.dtype)), approximate="tanh")
        projected: torch.Tensor = self.fc2(hidden)
        return projected
