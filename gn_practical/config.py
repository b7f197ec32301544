"""Configuration keys of the norm, added to a Detectron2 config: MODEL.PGN and MODEL.WS."""

from detectron2.config import CfgNode

_DEFAULTS = {
    "PGN": {
        # Number of groups of every "PGN" norm. 0: what RULE says for each layer by itself;
        # a number: the same everywhere, for the paper's baselines through the same code.
        "NUM_GROUPS": 0,
        # "paper": Algorithm 1 of arXiv:2302.03193.
        # "exact": the group size n_g = 3 + n_out / (n_in - n_out), from the factor
        # (n_g - 2) / (n_g - 3) in place of the paper's 1 + 4 / n_g; same clipping and divisor step.
        # For comparisons: "16_channels" in a group, and "paper_or_32", 32 groups where a layer
        # does not narrow.
        "RULE": "paper",
        # The activation that follows the norms, by its name in gn_practical.activation_gain: the
        # rule takes its forward over its backward gain (Section 2.3), 1 for the ReLU family. It
        # names what the model has; it does not change the model.
        "ACTIVATION": "relu",
        # ((pattern, num_groups), ...): the number of groups of single layers, by shell-style
        # pattern on the norm's path in the model; the last match wins. A pattern that matches
        # nothing, or a number that does not divide the layer's channels, is an error.
        "LAYER_NUM_GROUPS": (),
        # ((pattern, in_channels), ...): input channels of the weight layer that feeds a norm,
        # where they cannot be inferred from the modules.
        "IN_CHANNELS": (),
        # Run each norm with the residual sum and the ReLU that follow it as one operator, where
        # the model has a structure that gn_practical.modeling.fusion knows. docs/performance.md.
        "FUSED": True,
        # Memory mode: what the norms return is computed again in the backward pass instead of
        # stored, which halves the activation memory of a chain of convolutions. Needs FUSED.
        "RECOMPUTE": False,
        # Let group norms run whose groups hold a single value, for an experiment that shows what
        # happens: the output is constant and no gradient passes.
        "ALLOW_DEGENERATE": False,
    },
    "WS": {
        # Weight standardization of every convolution that a norm follows.
        "ENABLED": False,
        # (pattern, ...): convolutions, by pattern on their path, that keep their plain weights.
        "EXCLUDE": (),
    },
}


def add_pgn_config(cfg: CfgNode) -> None:
    """Add the keys of the norm, with their defaults, to a Detectron2 config in place.

    What the config holds already is kept, so calling it twice changes nothing.

    Args:
        cfg: a config as ``detectron2.config.get_cfg()`` returns it.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> add_pgn_config(cfg)
        >>> cfg.MODEL.PGN.NUM_GROUPS
        0
    """
    for name, keys in _DEFAULTS.items():
        node = cfg.MODEL.setdefault(name, CfgNode())
        for key, value in keys.items():
            node.setdefault(key, value)


def check_pgn_config(cfg: CfgNode) -> None:
    """Refuse a config without the keys of the norm.

    Raises:
        ValueError: if one is missing.
    """
    missing = [
        f"MODEL.{name}.{key}"
        for name, keys in _DEFAULTS.items()
        for key in keys
        if key not in cfg.MODEL.get(name, {})
    ]
    if missing:
        raise ValueError(
            "the config must have the keys of the norm, got one without "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Call "
            "gn_practical.add_pgn_config(cfg) right after get_cfg()."
        )
