"""What is checked and said when weights have been loaded: nothing is left out silently."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from gn_practical.layers.protocol import BindableNorm
from gn_practical.weights.comparison import class_differences, differences
from gn_practical.weights.describe import trunk_of
from gn_practical.weights.description import Description
from gn_practical.weights.placing import names_for
from gn_practical.weights.read import Weights
from gn_practical.weights.report import MIN_SHARE, Filling, report_filling

_logger = logging.getLogger(__name__)
# Lists of names, which logs keep and consoles do not show.
_details = logging.getLogger("detectron2.checkpoint")


@dataclass(frozen=True)
class Purpose:
    """What weights are loaded for; what is not as it was trained is an error but for training."""

    name: str = "training"  # or "resuming", "evaluation"
    min_share: float = MIN_SHARE  # of the backbone's values that a file must fill for training
    allow_differences: bool = False  # take as a warning what is an error for an evaluation


# What to do about weights that a model cannot take as they are.
_ADVICE = {
    "resuming": "Resume with the keys of that run, or start another one from its weights with "
    "MODEL.WEIGHTS and a new OUTPUT_DIR.",
    "evaluation": "Set the config as it was trained; TEST.ALLOW_DIFFERENCES True evaluates the "
    "model as it is.",
}
# Names and shapes are the same in both, and what is computed is another network.
_NO_RESNET_D = (
    "the backbone must be a ResNet-D for these weights, whose shortcuts average 2x2 pixels before "
    "their convolution, got {path} for {backbone}, whose shortcuts do not. Set MODEL.BACKBONE.NAME "
    "build_resnet_d_fpn_backbone, or build_resnet_d_backbone without FPN."
)


def place(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Return weights by the names of a model, as far as they have a place in it."""
    state = names_for(model, weights)
    consume_prefix_in_state_dict_if_present(state, "module.")
    if weights.matching_heuristics:
        with _without_warnings("detectron2.checkpoint.c2_model_loading"):
            return align_and_update_state_dicts(model.state_dict(), state, c2_conversion=False)
    return state


def check_loaded(
    path: str,
    weights: Weights,
    placed: Mapping[str, Tensor],
    model: nn.Module,
    incompatible: Any,
    present: Description,
    purpose: Purpose,
) -> None:
    """Say in one line what weights have filled; compare what they were trained with.

    The model, which is ``present``, was given ``placed`` of them; its ``load_state_dict`` returned
    ``incompatible``.

    Raises:
        ValueError: if they fill less of the backbone than ``min_share``; but for training, if they
            fill not all of the model, or were trained with another model, input or classes.
    """
    # Names that have no place in a ResNet, unless the model's own names are those of the file.
    left = {key: weights.in_file[key] for key in weights.unused if key not in placed}
    missing, unused = incompatible.missing_keys, [*incompatible.unexpected_keys, *left]
    filling = report_filling(model, {**placed, **left}, missing, unused)
    _report(path, weights, filling, purpose)
    not_taken = {*missing, *unused}
    filled = {key: each for key, each in placed.items() if key not in not_taken}
    _compare(path, weights.description, present, model, filled, purpose)


def _report(path: str, weights: Weights, filling: Filling, purpose: Purpose) -> None:
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in weights.notes)
    _details.info("Not filled from %s: %s", path, ", ".join(filling.missing) or "nothing")
    _details.info("Not used of %s: %s", path, ", ".join(filling.unused) or "nothing")
    if filling.trunk_share < purpose.min_share:
        raise ValueError(
            f"weights must fill {100 * purpose.min_share:g} % of {filling.trunk or 'the model'}, "
            f"got {path}: {filling.shares_text()}. {filling.mismatch_text()} Give weights of this "
            "architecture, convert them with tools/convert_weights.py, or lower "
            "MODEL.WEIGHTS_MIN_SHARE."
        )
    if purpose.name != "training" and (filling.missing or filling.shapes):
        raise ValueError(
            f"weights must fill the whole model for {purpose.name}, got {path}: {filling}{notes} "
            "What is not filled would be random. Give the config that they were trained with, or "
            "train from them with MODEL.WEIGHTS."
        )
    _logger.info("Weights from %s (%s): %s%s", path, weights.description.source, filling, notes)


def _compare(
    path: str,
    trained: Description,
    present: Description,
    model: nn.Module,
    filled: Mapping[str, Tensor],
    purpose: Purpose,
) -> None:
    strict = purpose.name != "training"
    if trained.pooled_shortcuts and present.pooled_shortcuts is False:
        raise ValueError(_NO_RESNET_D.format(path=path, backbone=trunk_of(filled) or "the model"))
    found = differences(trained, present, model, filled)
    found += class_differences(trained, present) if strict else []
    if found and strict and not purpose.allow_differences:
        raise ValueError(
            f"the model must be as its weights were trained for {purpose.name}, got "
            f"{'; '.join(found)}. The weights: {path}. {_ADVICE[purpose.name]}"
        )
    if found:
        _logger.warning(
            "The model is not as the weights of %s were trained: %s. Fine-tuning adapts to them; "
            "an evaluation without it does not.",
            path,
            "; ".join(found),
        )
    if trained.num_groups is None and trained.norm != "BN":
        _warn_of_unknown_groups(path, model, filled)


def _warn_of_unknown_groups(path: str, model: nn.Module, filled: Mapping[str, Tensor]) -> None:
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BindableNorm) and f"{name}.weight" in filled
    ]
    frozen = [name for name, module in norms if not module.weight.requires_grad]
    if frozen:
        _logger.warning(
            "%d PGN layers are frozen and the weights do not say with how many groups they "
            "were trained (first: %s). Where the groups differ they cannot adapt: set "
            "MODEL.BACKBONE.FREEZE_AT 0, or their groups with MODEL.PGN.LAYER_NUM_GROUPS.",
            len(frozen),
            frozen[0],
        )
    elif norms:
        _logger.info(
            "%s does not say with how many groups its norms were trained; %d PGN layers have "
            "taken their weights.",
            path,
            len(norms),
        )


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Keep a logger to its errors: what it warns of is said in one line."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
