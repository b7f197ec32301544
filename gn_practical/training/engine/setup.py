"""From the command line to a frozen config whose data sets are registered."""

import difflib
import logging
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from gn_practical.config import add_pgn_config
from gn_practical.training.config import add_training_config
from gn_practical.training.config.overrides import override_pairs
from gn_practical.training.config.safe_yaml import ConfigFileError, SafeCfgNode
from gn_practical.training.data import register_datasets

# What yacs raises for keys and values that it cannot take.
_OF_YACS = (KeyError, AssertionError, ValueError, TypeError, AttributeError, RecursionError)

_EPILOG = """
Examples:

  Train on 8 GPUs, continue after an interruption, evaluate:
    python tools/train_net.py --config-file configs/pfpn_pgn.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/pfpn_pgn.yaml --num-gpus 8 --resume
    python tools/train_net.py --config-file configs/pfpn_pgn.yaml --num-gpus 8 --eval-only \\
        MODEL.WEIGHTS output/pfpn_pgn/model_final.pth

  The same under torchrun, which starts the processes and can restart them:
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/pfpn_pgn.yaml

  Your own data in COCO's format, without code:
    python tools/train_net.py --config-file configs/faster_rcnn_gn_ws_pgn.yaml \\
        DATASETS.COCO_INSTANCES \\
        '[("my_train", "images", "train.json"), ("my_val", "images", "val.json")]' \\
        DATASETS.TRAIN '("my_train",)' DATASETS.TEST '("my_val",)' MODEL.ROI_HEADS.NUM_CLASSES 3

Results go to OUTPUT_DIR: results.json, metrics.json, curves.png, pictures/, num_groups.json,
checkpoints and TensorBoard's events.
"""


def argument_parser() -> ArgumentParser:
    """Return Detectron2's own parser, with examples of this project."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.description = "Train or evaluate a detector or panoptic segmenter."
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="let the config run code: its Python tags, and the pickled proposals that it names. "
        "Only for files you have read",
    )
    return parser


def setup(
    args: Namespace,
    complete: Callable[[CfgNode], CfgNode] = lambda cfg: cfg,
    add_config: Callable[[CfgNode], None] = lambda cfg: None,
) -> CfgNode:
    """Read the config, register its data sets, and set up logging and the output folder.

    Args:
        args: what :func:`argument_parser` parsed.
        complete: fills in what follows from the config, before it is logged and saved.
        add_config: adds keys of a project's own.

    Raises:
        ValueError: for a config that cannot be read or has a wrong key or value.
    """
    trusted = getattr(args, "trust_config", False)
    cfg = load_cfg(args.config_file, args.opts, trusted=trusted, add_config=add_config)
    cfg = complete(cfg)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gn_practical")
    _warn_learning_rate(args.config_file, cfg, trusted, add_config)
    return cfg


def load_cfg(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    trusted: bool = False,
    add_config: Callable[[CfgNode], None] = lambda cfg: None,
) -> CfgNode:
    """Merge a YAML file and ``KEY VALUE`` overrides into Detectron2's and our defaults.

    ``MODEL.DEVICE: "auto"`` becomes CUDA where there is a GPU and the CPU elsewhere. The data sets
    of ``DATASETS.COCO_INSTANCES`` and ``DATASETS.COCO_PANOPTIC`` are registered.

    Args:
        config_file: path of the YAML file; empty for the defaults.
        opts: keys and values in turn.
        trusted: let the file, and the pickled proposals it names, run code.
        add_config: adds keys of a project's own.

    Returns:
        A frozen config.

    Raises:
        ValueError: naming the key or line that is wrong, and what is near to it.

    Example:
        >>> load_cfg("configs/pfpn_pgn.yaml", ["SOLVER.BASE_LR", "0.01"]).SOLVER.BASE_LR
        0.01
    """
    cfg = _merge(config_file, opts, trusted, add_config)
    if cfg.MODEL.LOAD_PROPOSALS and not trusted:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS must be False, got True: Detectron2 unpickles the proposals, "
            "which can run code. Add --trust-config if you trust their files."
        )
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def _merge(
    config_file: str, opts: Sequence[str], trusted: bool, add_config: Callable[[CfgNode], None]
) -> CfgNode:
    cfg = get_cfg()
    for add in (add_pgn_config, add_training_config, add_config):
        add(cfg)
    cfg = SafeCfgNode(cfg)
    known = list(_keys(cfg))
    override_pairs(opts)  # refuses what is no pairs
    if config_file.endswith(".py"):
        raise ConfigFileError(
            f"a config must be a YAML file, got {config_file}. Python configs are code and are not "
            "read; write its keys as a YAML file."
        )
    try:
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=trusted)
        cfg.merge_from_list(list(opts))
    except ConfigFileError:
        raise
    except _OF_YACS as error:
        raise ValueError(_explain(str(error.args[0] if error.args else error), known)) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"a config must be a readable YAML file, got {what}") from error
    return CfgNode(cfg)


def _explain(message: str, known: list[str]) -> str:
    missing = re.search(r"[Nn]on-existent (?:config )?key: (\S+)", message)
    if not missing:
        return f"the config must be a file of known keys and values of their types: {message}"
    near = difflib.get_close_matches(missing[1], known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"config keys must exist, got {missing[1]}.{hint}"


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def _warn_learning_rate(
    config_file: str, cfg: CfgNode, trusted: bool, add_config: Callable[[CfgNode], None]
) -> None:
    """Warn where an override changed the batch and left the learning rate of the recipe."""
    if not config_file:
        return
    recipe = _merge(config_file, (), trusted, add_config).SOLVER
    solver = cfg.SOLVER
    if recipe.get("REFERENCE_BATCH"):  # the learning rate follows the batch
        return
    if solver.IMS_PER_BATCH != recipe.IMS_PER_BATCH and solver.BASE_LR == recipe.BASE_LR:
        fitting = recipe.BASE_LR * solver.IMS_PER_BATCH / recipe.IMS_PER_BATCH
        logging.getLogger(__name__).warning(
            "SOLVER.IMS_PER_BATCH is %d in place of the recipe's %d, with the same learning rate. "
            "The linear rule asks for SOLVER.BASE_LR %g; SOLVER.REFERENCE_WORLD_SIZE scales batch, "
            "learning rate and schedule together with the number of GPUs.",
            solver.IMS_PER_BATCH,
            recipe.IMS_PER_BATCH,
            fitting,
        )
