"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name, and each
rank keeps its slice. A model started under any layout is therefore the same model.
"""

from __future__ import annotations

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.initial import draw_initial
from bitdance_scale.parallel.parameter_names import Parameters


def initialise(parameters: Parameters, config: RunConfig, device: torch.device) -> None:
    """Fills every parameter of a stage in place; padded vocabulary rows become zero."""
    seed, init_std = config.run.seed, config.model.init_std
    with torch.no_grad():
        for name, (parameter, placement) in parameters.items():
            whole = draw_initial(name, placement.global_shape, seed, init_std, device)
            parameter.copy_(placement.local_part(whole))
