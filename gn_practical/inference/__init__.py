"""What a trained model is used for: predictions, pictures of them, exports.

Importing the package registers the ResNet-D backbones, which checkpoints may name.
"""

import gn_practical.modeling.resnet_d  # noqa: F401 (registers them)
from gn_practical.inference.classes import Classes
from gn_practical.inference.prediction import Prediction, Segment
from gn_practical.inference.predictor import Predictor

__all__ = ["Classes", "Prediction", "Predictor", "Segment"]
