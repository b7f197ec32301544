"""What a trained model is used for: predictions, pictures of them, exports.

Importing the package registers the ResNet-D backbones, which checkpoints may name.
"""

import gn_practical.modeling.resnet_d  # noqa: F401 (registers them)
