"""How the layers reach a model: registration, binding, weight standardization, building."""

from gn_practical.modeling.binding import GroupNormBinding, bind_group_norms, group_norm_bindings
from gn_practical.modeling.build import build_model, prepare_model
from gn_practical.modeling.conversion import convert_to_ws
from gn_practical.modeling.fusion import fuse_norms
from gn_practical.modeling.recalibration import recalibrate_norms
from gn_practical.modeling.registration import register_norm, register_pgn, unregister_pgn

__all__ = [
    "GroupNormBinding",
    "bind_group_norms",
    "build_model",
    "convert_to_ws",
    "fuse_norms",
    "group_norm_bindings",
    "prepare_model",
    "recalibrate_norms",
    "register_norm",
    "register_pgn",
    "unregister_pgn",
]
