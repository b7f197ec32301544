"""MMDetection's two-stage detectors with FPN, in Detectron2's names.

The two agree in what lies behind the names: background is the last class, deltas are x, y, w, h of
one anchor or class after another, anchors come by ratio 0.5, 1, 2 at offset 0, and the first fully
connected layer takes (channel, y, x). So tensors are renamed and none is changed. MMDetection 1.x
had the background first and boxes one pixel wider, and is refused.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from gn_practical.weights.patterns import rename

_BOX, _MASK, _RPN = "roi_heads.box_head", "roi_heads.mask_head", "proposal_generator.rpn_head"
_NORM = r"(?:bn|gn)\.(\w+)"
_NAMES = (
    (r"rpn_head\.rpn_conv\.(\w+)", rf"{_RPN}.conv.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", rf"{_RPN}.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", rf"{_RPN}.anchor_deltas.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", rf"{_MASK}.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", rf"{_MASK}.predictor.\1"),
)
# Layers in a row, counted from 0: (pattern, Detectron2's name, what its count starts from).
_COUNTED = (
    (r"neck\.lateral_convs\.(\d+)\.(.+)", "backbone.fpn_lateral{}", 2),
    (r"neck\.fpn_convs\.(\d+)\.(.+)", "backbone.fpn_output{}", 2),
    (r"roi_head\.bbox_head\.shared_convs\.(\d+)\.(.+)", f"{_BOX}.conv{{}}", 1),
    (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(.+)", f"{_BOX}.fc{{}}", 1),
    (r"roi_head\.mask_head\.convs\.(\d+)\.(.+)", f"{_MASK}.mask_fcn{{}}", 1),
)
_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.", "semantic_head.")


def is_detector(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a detector of MMDetection.

    Args:
        tensors: by the names of the file.
    """
    return any(key.startswith("backbone.layer1.") for key in tensors) and any(
        key.startswith(_PARTS) for key in tensors
    )


def rename_detector(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name in the file: Detectron2's name} of all but the ResNet.

    Args:
        tensors: by the names of the file.

    Raises:
        ValueError: for a file of MMDetection 1.x, or heads that Detectron2 has otherwise.
    """
    if "bbox_head.fc_cls.weight" in tensors:
        raise ValueError(
            "a detector of MMDetection must be of version 2 or later, got bbox_head.fc_cls beside "
            "backbone, as 1.x has it, with the background as first class and other boxes. Convert "
            "it with MMDetection's tools/model_converters/upgrade_model_version.py."
        )
    if "roi_head.bbox_head.0.fc_cls.weight" in tensors:
        raise ValueError(
            "a detector of MMDetection must have one box head, got the stages of a cascade "
            "(roi_head.bbox_head.0). Cascades are not converted."
        )
    _check_levels(tensors)
    renamed = {key: _rename(key) for key in tensors}
    return {key: new for key, new in renamed.items() if new}


def _check_levels(tensors: Mapping[str, Tensor]) -> None:
    lateral = [key for key in tensors if re.match(r"neck\.lateral_convs\.\d+\.conv\.weight", key)]
    if lateral and len(lateral) != 4:
        raise ValueError(
            f"an FPN must take res2 to res5, got {len(lateral)} lateral convolutions. Detectors on "
            "other levels (RetinaNet, FCOS) are not converted; their backbone alone is: save "
            "its keys (backbone.) in a file of their own."
        )


def _rename(key: str) -> str | None:
    if (plain := rename(key, _NAMES)) is not None:
        return plain
    for pattern, new, first in _COUNTED:
        match = re.fullmatch(pattern, key)
        if match:
            # A ConvModule has its convolution in .conv and its norm in .gn or .bn.
            value = re.sub(rf"^{_NORM}$", r"norm.\1", match[2].removeprefix("conv."))
            return f"{new.format(int(match[1]) + first)}.{value}"
    return None
