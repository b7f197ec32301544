"""``build_model(cfg)``: Detectron2 builds, then norms are bound and weights standardized."""

import logging

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from gn_practical.activation_gain import gain_ratio
from gn_practical.config import check_pgn_config
from gn_practical.layers.backends import backend
from gn_practical.layers.protocol import BindableNorm
from gn_practical.layers.recomputation import recompute_outputs
from gn_practical.modeling.binding import GroupNormBinding, bind_group_norms
from gn_practical.modeling.conversion import convert_to_ws
from gn_practical.modeling.fusion import fuse_norms


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the model of a config, bind its "PGN" norms and standardize weights where asked.

    Logs the table of the groups.

    Raises:
        ValueError: if the config lacks the keys of :func:`gn_practical.add_pgn_config`, or as
            :func:`bind_group_norms` and :func:`convert_to_ws`.

    Example:
        >>> from detectron2 import model_zoo
        >>> from gn_practical import add_pgn_config
        >>> cfg = model_zoo.get_config("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml")
        >>> add_pgn_config(cfg)
        >>> cfg.MODEL.DEVICE = "cpu"
        >>> cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "PGN"
        >>> model = build_model(cfg)
    """
    check_pgn_config(cfg)
    return prepare_model(modeling.build_model(cfg), cfg)


def prepare_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Do what :func:`build_model` does to a model that is there, in place, and return it."""
    table = bind_model(model, cfg)
    logger = logging.getLogger(__name__)
    if table:
        logger.info("%d PGN layers:\n%s", len(table), format_bindings(table))
    if cfg.MODEL.WS.ENABLED:
        paths = convert_to_ws(model, cfg.MODEL.WS.EXCLUDE)
        logger.info("%d convolutions have standardized weights.", len(paths))
    paths = fuse_norms(model, required_only=not cfg.MODEL.PGN.FUSED)
    if paths:
        what = backend(cfg.MODEL.DEVICE)
        logger.info("%d norms take their ReLU along. PGN layers run %s.", len(paths), what)
    if cfg.MODEL.PGN.RECOMPUTE:
        if not (table and cfg.MODEL.PGN.FUSED):
            raise ValueError(
                "MODEL.PGN.RECOMPUTE must meet PGN norms that run as one with their ReLU, got "
                f"{len(table)} PGN norms and MODEL.PGN.FUSED={cfg.MODEL.PGN.FUSED}. Set "
                'MODEL.PGN.FUSED True and a NORM to "PGN", or MODEL.PGN.RECOMPUTE False.'
            )
        recompute_outputs(model)
        logger.info("Outputs of PGN layers are computed again in the backward pass, not stored.")
    return model


def bind_model(model: nn.Module, cfg: CfgNode) -> list[GroupNormBinding]:
    """Bind the norms of a model as ``cfg.MODEL.PGN`` says, if it has any."""
    pgn = cfg.MODEL.PGN
    for module in model.modules():
        if hasattr(module, "allow_degenerate"):
            module.allow_degenerate = pgn.ALLOW_DEGENERATE
    if not any(isinstance(module, BindableNorm) for module in model.modules()):
        return []
    return bind_group_norms(
        model,
        pgn.NUM_GROUPS,
        rule=pgn.RULE,
        gain_ratio=gain_ratio(pgn.ACTIVATION),
        layer_num_groups=pgn.LAYER_NUM_GROUPS,
        in_channels=pgn.IN_CHANNELS,
        example_inputs=_run_backbone,
    )


def _run_backbone(model: nn.Module) -> None:
    """Run the backbone on the meta device; the heads need proposals, which have no shape there."""
    try:
        backbone = model.backbone.to("meta")
        square = backbone.padding_constraints.get("square_size", 0)
        size = square or 2 * max(backbone.size_divisibility, 32)
        backbone(torch.empty(1, len(model.pixel_mean), size, size, device="meta"))
    except Exception as error:  # of other people's backbones: the modules alone tell
        logging.getLogger(__name__).debug("No trial run of the backbone: %s", error)


def format_bindings(table: list[GroupNormBinding]) -> str:
    """Format the groups of a model for reading: layer, channels, G_ideal, G and K."""
    rows = [
        (b.norm, b.in_channels, b.out_channels, b.ideal_num_groups, b.num_groups,
         f"{b.gradient_variance_ratio:.3f}")
        for b in table
    ]  # fmt: skip
    return tabulate(rows, headers=("layer", "in", "out", "G_ideal", "G", "K"))
