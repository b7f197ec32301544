"""Group normalization with the practical number of groups, for Detectron2.

Importing the package makes the norm type "PGN" and its relatives known to Detectron2's
``get_norm``, and changes nothing else. The trainer is ``gn_practical.training``.
"""

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gn_practical.inference import Predictor as Predictor

with warnings.catch_warnings():
    # What today's PyTorch says when it sees Detectron2.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)

    from gn_practical.config import add_pgn_config
    from gn_practical.layers import PracticalGroupNorm, WSConv2d, standardize_weight
    from gn_practical.modeling import (
        bind_group_norms,
        build_model,
        convert_to_ws,
        fuse_norms,
        register_norm,
        register_pgn,
    )
    from gn_practical.num_groups import (
        gradient_variance_ratio,
        ideal_num_groups,
        practical_num_groups,
    )

__version__ = "0.1.0"
__all__ = [
    "PracticalGroupNorm",
    "WSConv2d",
    "add_pgn_config",
    "bind_group_norms",
    "build_model",
    "convert_to_ws",
    "fuse_norms",
    "gradient_variance_ratio",
    "ideal_num_groups",
    "practical_num_groups",
    "register_norm",
    "register_pgn",
    "standardize_weight",
]

register_pgn()


def __getattr__(name: str) -> Any:
    """Load what only those who predict need: :class:`gn_practical.inference.Predictor`."""
    if name == "Predictor":
        from gn_practical.inference import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
