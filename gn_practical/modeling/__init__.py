"""How the layers reach a model: registration, binding, weight standardization, building."""

from gn_practical.modeling.binding import GroupNormBinding, bind_group_norms
from gn_practical.modeling.build import bind_model, build_model
from gn_practical.modeling.conversion import convert_to_ws
from gn_practical.modeling.fusion import fuse_norms
from gn_practical.modeling.registration import register_norm, register_pgn, unregister_pgn

__all__ = [
    "GroupNormBinding",
    "bind_group_norms",
    "bind_model",
    "build_model",
    "convert_to_ws",
    "fuse_norms",
    "register_norm",
    "register_pgn",
    "unregister_pgn",
]
