#!/usr/bin/env python
"""Write a trained model as ONNX or TorchScript, and check that the file computes the same."""

import argparse
import contextlib
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from detectron2.config import CfgNode
    from torch import nn

    from gn_practical.inference.export.contents import Contents
    from gn_practical.inference.export.formats import Format
    from gn_practical.weights import Weights

_DESCRIPTION = """\
Write a detector or panoptic segmenter as one file that takes a picture of any size and gives boxes,
scores, classes, masks and logits of semantic classes. The file says what it takes and gives; weight
standardization is folded. It is then run beside the model on pictures of three sizes: where results
differ, it is renamed to *.failed. docs/export.md has the details.
"""

_EPILOG = """
Examples:

  To ONNX, checked with drawn scenes, or with pictures of one's own:
    python tools/export_model.py --weights output/quickstart/model_final.pth --output exported
    python tools/export_model.py --weights model.pth --output exported --check a.jpg b.jpg c.jpg

  With ONNX's GroupNormalization, for a runtime that has it:
    python tools/export_model.py --weights model.pth --output exported --group-norm onnx

Exit code: 0 written and the same; 1 not the same, or an error; 2 wrong arguments, or written but
only in part (torch.export: the backbone and its neck).
"""

LARGEST_DIFFERENCE = 1e-4  # of the backbone's maps, as a share of their largest value


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="checkpoint of a trained model")
    add("--output", required=True, metavar="FOLDER", help="folder of the file, model.onnx or so")
    formats = ("onnx", "torchscript", "torch.export")
    add("--format", choices=formats, default="onnx", help="of the file (default: onnx)")
    add("--config-file", metavar="FILE", help="for a checkpoint that does not hold its config")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the config")
    add(
        "--group-norm",
        choices=("fast", "plain", "onnx"),
        default="fast",
        help="ONNX only: by what suits onnxruntime best, by means and products alone, or by the "
        "operator GroupNormalization (default: fast)",
    )
    add(
        "--opset", type=int, choices=range(18, 22), help="of ONNX (default: the first that will do)"
    )
    add("--check", nargs="+", metavar="IMAGE", help="pictures to check with (default: drawn ones)")
    add("--no-check", action="store_true", help="leave the file unchecked")
    add("--force", action="store_true", help="replace a file of an earlier export")
    args = parser.parse_args()
    if args.check and args.no_check:
        parser.error("--check and --no-check exclude each other")
    if args.format != "onnx" and (args.group_norm != "fast" or args.opset):
        parser.error("--group-norm and --opset need --format onnx")
    if args.group_norm == "onnx" and args.opset and args.opset < 21:
        parser.error("--group-norm onnx needs --opset 21, the first with that operator")
    if len(args.opts) % 2:
        parser.error(f"--opts must be pairs of a key and a value, got {' '.join(args.opts)}")
    return args


def read_model(args: argparse.Namespace, weights: "Weights", cfg: "CfgNode") -> "nn.Module":
    """Build the model and fill all of it."""
    from gn_practical import build_model
    from gn_practical.inference.export.network import detector_outputs
    from gn_practical.inference.models import fill
    from gn_practical.weights.describe import describe_config

    model = build_model(cfg).eval()
    detector_outputs(model)  # refuses what cannot be exported, before minutes are spent
    allowed = cfg.TEST.get("ALLOW_DIFFERENCES", False)
    fill(model, weights, args.weights, describe_config(cfg), allowed)
    return model


def read_pictures(args: argparse.Namespace, cfg: "CfgNode") -> "list[np.ndarray]":
    """Read the pictures to check with, or draw some."""
    import numpy as np
    from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
    from PIL import Image

    from gn_practical.training.data.drawing import draw_scene

    if not args.check:
        scenes = [draw_scene(np.random.default_rng(seed), 256)[0] for seed in range(3)]
        sizes = ((320, 240), (256, 256), (240, 360))
        drawn = (Image.fromarray(s).resize(size) for s, size in zip(scenes, sizes, strict=True))
        return [convert_PIL_to_numpy(each, cfg.INPUT.FORMAT) for each in drawn]
    pictures = []
    for path in args.check:
        try:
            pictures.append(read_image(path, cfg.INPUT.FORMAT))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of broken files
            raise ValueError(f"--check must name pictures, got {path}: {error}.") from error
    return pictures


def write(
    model: "nn.Module", contents: "Contents", to: "Format", path: str, args: argparse.Namespace
) -> None:
    """Write the file, standardization folded."""
    import copy

    from gn_practical.inference.export.standardization import fold_standardization

    folded = copy.deepcopy(model)
    fold_standardization(folded)
    opset = args.opset or (21 if args.group_norm == "onnx" else 18)
    to.write(folded, contents, path, opset)
    size = os.path.getsize(path) / 2**20
    print(f"{args.format}, {size:.1f} MB: {', '.join(contents.outputs)}", flush=True)


def check_whole(
    model: "nn.Module", path: str, inputs: "list[dict[str, Any]]", args: argparse.Namespace
) -> bool:
    """Run the file beside the model, and print what differs and both times."""
    import torch

    from gn_practical.inference.export.check import (
        check,
        ratio,
        roundings,
        table,
    )
    from gn_practical.inference.exported import ExportedModel

    checks = list(check(model, ExportedModel(path), inputs))
    print(table(checks, args.format))
    alone = [f"{c.size[1]} x {c.size[0]}: {each}" for c in checks for each in c.agreement.alone]
    for line in (*alone, *roundings(checks)):
        print(f"  {line}")
    threads = torch.get_num_threads()
    print(f"{args.format} takes {ratio(checks):.2f} of PyTorch's time (threads: {threads}).")
    if not any(each.agreement.detections for each in checks):
        print("Nothing was found, so boxes were not compared: give pictures with --check.")
    return all(each.agreement.holds for each in checks)


def check_part(model: "nn.Module", path: str) -> bool:
    """Run an exported backbone beside the model's."""
    from gn_practical.inference.export.check import check_backbone

    largest = check_backbone(model, path)
    print(f"Feature maps of three sizes differ by {largest:.1e} of their largest value at most.")
    return largest <= LARGEST_DIFFERENCE


@contextlib.contextmanager
def unchecked_folder(args: argparse.Namespace) -> "Iterator[str]":
    """Make the folder of the output, and one in it for what has not been checked."""
    try:
        os.makedirs(args.output, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=args.output, prefix=".unchecked_")
    except OSError as error:
        raise ValueError(f"--output must be a folder to write to, got {error}.") from error
    with folder as path:
        yield path


def export(args: argparse.Namespace) -> int:
    """Write and check; the file takes its name when it is known to be right."""
    from gn_practical.inference.configs import config_for
    from gn_practical.inference.export.check import inputs_of
    from gn_practical.inference.export.contents import contents_of
    from gn_practical.inference.export.formats import FORMATS
    from gn_practical.weights import read_weights

    to = FORMATS[args.format]
    final = os.path.join(args.output, f"model{to.suffix}")
    if os.path.exists(final) and not args.force:
        raise ValueError(f"--output must be without {final}. Choose another, or add --force.")
    with unchecked_folder(args) as folder:
        weights = read_weights(args.weights)
        stored = weights.description
        cfg = config_for(args.weights, stored, args.config_file, device="cpu", opts=args.opts)
        inputs = list(inputs_of(read_pictures(args, cfg), cfg))
        model = read_model(args, weights, cfg)
        contents = contents_of(model, cfg, stored, args.group_norm, backbone_only=bool(to.limit))
        path = os.path.join(folder, os.path.basename(final))
        write(model, contents, to, path, args)
        same = args.no_check or (
            check_part(model, path) if to.limit else check_whole(model, path, inputs, args)
        )
        os.replace(path, final if same else f"{final}.failed")
    return report(args, to, final, same)


def report(args: argparse.Namespace, to: "Format", final: str, same: bool) -> int:
    """Say what there is now; return the exit code."""
    if not same:
        print(f"error: the export must compute the same, got {final}.failed.", file=sys.stderr)
        return 1
    print(f"Written{' unchecked' if args.no_check else ''}: {final}")
    if to.limit:
        print(f"note: {to.limit}", file=sys.stderr)
    return 2 if to.limit else 0


def main() -> int:
    """Run, ending with one clear error where the user can correct it."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.engine.run import one_clear_error

    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        try:
            return export(args)
        except OSError as error:
            raise ValueError(f"files must be there and have room, got {error}.") from error
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
