"""What weights of known origin need, and which origins a file's keys leave open."""

import re
from collections.abc import Sequence
from dataclasses import fields

from gn_practical.weights.description import Description, Standardization

_RGB = {
    "input_format": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}
_BGR = {
    "input_format": "BGR",
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (57.375, 57.12, 58.395),
}
_CAFFE = {**_BGR, "pixel_std": (1.0, 1.0, 1.0)}
_BN = {"weight_standardization": False, "norm": "BN", "norm_eps": 1e-5}
_GN = {"weight_standardization": False, "norm": "GN", "num_groups": 32, "norm_eps": 1e-5}
_GN_WS = {**_GN, "weight_standardization": True, "standardization": Standardization()}
_IN_3X3 = {"stride_in_1x1": False, "pooled_shortcuts": False}
_IN_1X1 = {"stride_in_1x1": True, "pooled_shortcuts": False}

SOURCES = {
    "torchvision": Description("torchvision, or timm in the same names", **_RGB, **_IN_3X3, **_BN),
    "torchvision_gn": Description(
        "torchvision's ResNet with group norm, by anyone",
        **_RGB,
        **_IN_3X3,
        **{**_GN, "num_groups": None},
    ),
    "timm_gn": Description("timm's resnet50_gn", **_RGB, **_IN_3X3, **_GN),
    "jhu": Description("weight standardization's authors (jhu)", **_RGB, **_IN_3X3, **_GN_WS),
    "jhu_gn": Description("GN ResNeXts of jhu", **_RGB, **_IN_3X3, **_GN),
    "mmcv_contrib_gn": Description("MMCV's contrib/resnet50_gn", **_RGB, **_IN_3X3, **_GN),
    "mmcv_detectron_msra": Description(
        "ResNets of MSRA as MMCV keeps them", **_CAFFE, **_IN_1X1, **_BN
    ),
    "mmcv_detectron_resnext": Description(
        "Detectron's ResNeXts as MMCV keeps them", **_BGR, **_IN_3X3, **_BN
    ),
    "mmcv_detectron_gn": Description(
        "Detectron's R-50-GN as MMCV keeps it", **_CAFFE, **_IN_3X3, **_GN
    ),
    "moco": Description("MoCo", **_RGB, **_IN_3X3, **_BN),
    "dino": Description("DINO", **_RGB, **_IN_3X3, **_BN),
    "mmpretrain": Description("MMPretrain", **_RGB, **_IN_3X3, **_BN),
    "mmpretrain_gn": Description("MMPretrain with group norm", **_RGB, **_IN_3X3, **_GN),
    "mmdetection": Description("MMDetection, style pytorch", **_RGB, **_IN_3X3, **_BN),
    "mmdetection_caffe": Description("MMDetection, style caffe", **_CAFFE, **_IN_1X1, **_BN),
    "mmdetection_gn": Description("MMDetection with GN", **_CAFFE, **_IN_3X3, **_GN),
    "mmdetection_gn_ws": Description("MMDetection with GN+WS", **_RGB, **_IN_3X3, **_GN_WS),
    "detectron_gn": Description("Detectron's GN ResNets", **_CAFFE, **_IN_3X3, **_GN),
    "detectron_msra": Description("Detectron's ResNets of MSRA", **_CAFFE, **_IN_1X1, **_BN),
    "detectron_resnext": Description("Detectron's ResNeXts", **_BGR, **_IN_3X3, **_BN),
    "detectron2_torchvision": Description(
        "torchvision, converted by Detectron2", **_RGB, **_IN_3X3, **_BN
    ),
    "detectron2": Description("Detectron2"),
    "pycls": Description("pycls", **_BGR, **_BN),
}
# What in a file's name decides between sources whose keys are the same.
_WS = r"(?<![a-z])ws(?![a-z])"
_HINTS = {
    "jhu": _WS,
    "mmdetection_gn_ws": _WS,
    "timm_gn": "gn_a1h",
    "mmcv_contrib_gn": "thangvubk",
}


def choose_source(
    candidates: Sequence[str], file_name: str, source: str | None = None
) -> tuple[Description, tuple[str, ...]]:
    """Return what is known of weights that may come from any of several sources.

    Args:
        candidates: keys of :data:`SOURCES` that the file's keys allow.
        file_name: decides among them, never against them.
        source: what the user says.

    Returns:
        The description, with None where candidates that are left differ, and what to tell.

    Raises:
        ValueError: for a source that the keys do not allow.

    Example:
        >>> description, notes = choose_source(["jhu", "mmcv_detectron_gn"], "weights.pth")
        >>> description.num_groups, description.input_format, len(notes)
        (32, None, 1)
        >>> choose_source(["jhu", "mmcv_detectron_gn"], "resnet50_gn_ws.pth")[0].input_format
        'RGB'
        >>> choose_source(["jhu", "mmcv_detectron_gn"], "laws.pth")[0].input_format is None
        True
    """
    if source is not None:
        if source not in candidates:
            raise ValueError(
                f"the source must be one that the file's keys allow, got source={source} for "
                f"{file_name}. Choose {' or '.join(candidates)}, or none."
            )
        return SOURCES[source], ()
    name = file_name.lower()
    hinted = [each for each in candidates if each in _HINTS and re.search(_HINTS[each], name)]
    if len(hinted) == 1:
        return SOURCES[hinted[0]], (f"told by the file's name: {hinted[0]}",)
    if len(candidates) == 1:
        return SOURCES[candidates[0]], ()
    note = f"its keys are those of {' and of '.join(candidates)}; not known is what they differ in"
    return _common([SOURCES[each] for each in candidates]), (note,)


def _common(descriptions: Sequence[Description]) -> Description:
    known = {}
    for each in fields(Description):
        values = [getattr(description, each.name) for description in descriptions]
        if all(value == values[0] for value in values):
            known[each.name] = values[0]
    known["source"] = " or ".join(description.source for description in descriptions)
    return Description(**known)
