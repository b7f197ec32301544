"""The command line of a training; this file imports nothing of PyTorch, so that it answers at once.

A script takes it without the package, whose import takes seconds:
``runpy.run_path(path)["argument_parser"]``.
"""

import os
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter

_DESCRIPTION = "Train or evaluate a detector or panoptic segmenter."
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


def argument_parser(description: str = _DESCRIPTION, epilog: str = _EPILOG) -> ArgumentParser:
    """Return a parser of all options of Detectron2's own, and ``--trust-config``.

    Example:
        >>> args = argument_parser().parse_args(["--num-gpus", "8", "SEED", "1"])
        >>> args.num_gpus, args.opts
        (8, ['SEED', '1'])
    """
    parser = ArgumentParser(
        description=description, epilog=epilog, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint in the output folder, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, without training")
    parser.add_argument("--num-gpus", type=int, default=1, help="of each machine (default: 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="(default: 1)")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="number of this machine, from 0 (default: 0)"
    )
    parser.add_argument(
        "--dist-url",
        default=_address_of_user(),
        help="where the processes meet, tcp://HOST:PORT of the first machine, or auto on a single "
        "one (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="let the config run code: its Python tags, and the pickled proposals that it names. "
        "Only for files you have read",
    )
    parser.add_argument(
        "opts",
        nargs=REMAINDER,
        help="changes of the config, after all options: KEY VALUE ..., or path.key=value ... of a "
        "Python config",
    )
    return parser


def _address_of_user() -> str:
    """Return an address whose port is each user's own, and as free as Detectron2's choice of it.

    It is the same in every process of a user, so that one left behind shows by a port in use.
    """
    user = os.getuid() if hasattr(os, "getuid") else 1
    return f"tcp://127.0.0.1:{49152 + user % 16384}"
