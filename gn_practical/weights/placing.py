"""Names of weights in the model that takes them."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from gn_practical.weights.read import Weights

_TO_TORCHVISION = (
    (r"^stem\.conv1\.norm\.", "{}1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".{}\1."),
    (r"^linear\.", "fc."),
)


def names_for(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Return the state under the names that a model has: a backbone under the model's prefix.

    A file whose own names are the model's keeps them. A ResNet goes to Detectron2's in the model,
    or to torchvision's, wherever it lies.

    Args:
        model: what is to take them.
        weights: as they were read.
    """
    present = set(model.state_dict())
    if 2 * len(present.intersection(weights.in_file)) > len(weights.in_file):
        return dict(weights.in_file)
    if "stem.conv1.weight" not in weights.state or "stem.conv1.weight" in present:
        return dict(weights.state)
    for part in ("stem.conv1", "layer1"):
        found = [path for path, _ in model.named_modules() if re.search(rf"(^|\.){part}$", path)]
        if len(found) == 1:
            prefix = found[0].removesuffix(part)
            state = _in_torchvision(weights.state, present) if part == "layer1" else weights.state
            return {prefix + key: each for key, each in state.items()}
    return dict(weights.state)


def _in_torchvision(state: Mapping[str, Tensor], present: set[str]) -> dict[str, Tensor]:
    norm = "gn" if any(key.endswith("layer1.0.gn1.weight") for key in present) else "bn"
    return {_rename(key, norm): each for key, each in state.items()}


def _rename(key: str, norm: str) -> str:
    for pattern, new in _TO_TORCHVISION:
        key = re.sub(pattern, new.format(norm), key)
    return re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", key)
