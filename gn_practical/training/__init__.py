"""Detectron2's trainer with PGN models, checks, and runs that survive what clusters do to them.

Importing the package registers the embedded data set and the ResNet-D backbones.
"""

import warnings

with warnings.catch_warnings():
    # What today's PyTorch and setuptools say when they see Detectron2.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)

    import detectron2.model_zoo  # noqa: F401 (speaks of pkg_resources)

    import gn_practical.modeling.resnet_d  # noqa: F401 (registers them)
    from gn_practical.training.config import add_training_config
    from gn_practical.training.data import register_scenes
    from gn_practical.training.engine import Trainer

__all__ = ["Trainer", "add_training_config"]

register_scenes()
