"""Group normalization with the practical number of groups, for Detectron2.

Importing the package registers the norm type "PGN" and the embedded data set.
"""

import warnings

with warnings.catch_warnings():
    # What today's PyTorch and setuptools say when they see Detectron2.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)

    import detectron2.model_zoo  # noqa: F401 (speaks of pkg_resources)

    import gn_practical.classification  # noqa: F401 (registers its models)
    from gn_practical.config import add_pgn_config
    from gn_practical.data import register_scenes
    from gn_practical.layers import PracticalGroupNorm, WSConv2d, standardize_weight
    from gn_practical.modeling import bind_group_norms, build_model, convert_to_ws, register_pgn
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
    "gradient_variance_ratio",
    "ideal_num_groups",
    "practical_num_groups",
    "register_pgn",
    "standardize_weight",
]

register_pgn()
register_scenes()
