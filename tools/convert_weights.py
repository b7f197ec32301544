#!/usr/bin/env python
"""Read weights of other libraries, say what they need, and write them for MODEL.WEIGHTS."""

import argparse
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from gn_practical.weights import Weights

_DESCRIPTION = """\
Recognize weights by the names inside the file, print what they were trained with and the config
keys they need, and write them in Detectron2's names with all of this inside. MODEL.WEIGHTS takes
the same files without conversion; convert to fold something, or to keep what the file does not
tell. docs/weights.md has a section for each source.
"""

_EPILOG = """
Sources: Detectron2 and Detectron (.pkl), pycls, torchvision, timm, MMDetection, MMPretrain, jhu's
GN+WS, MoCo, DINO; .pth, .pkl, .pyth, .tar, .safetensors; files, URLs, detectron2:// and catalog://.

Examples:

  What is this file?
    python tools/convert_weights.py resnet50_gn_ws.pth

  A backbone for configs that keep Detectron2's BGR and std of 1:
    python tools/convert_weights.py resnet50-0676ba61.pth r50.pth --input-format BGR --fold-std

  Standardized weights as plain ones, for a model without MODEL.WS:
    python tools/convert_weights.py resnet50_gn_ws.pth r50_gn.pth --fold-ws plain

  A file whose keys leave its source open, and weights of one's own with timm's StdConv2d:
    python tools/convert_weights.py gn.pth out.pth --source mmcv_detectron_gn
    python tools/convert_weights.py mine.pth out.pth --fold-ws ws --describe \\
        weight_standardization=True standardization.eps=1e-6 \\
        standardization.eps_under_root=True standardization.biased=True
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN", help="file or address of weights")
    parser.add_argument("output", metavar="OUT", nargs="?", help=".pth to write (default: none)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument(
        "--source", metavar="NAME", help="where IN comes from, if its keys leave that open"
    )
    parser.add_argument(
        "--level", metavar="KEY", help="IN's key to take, if it has several (state_dict, teacher)"
    )
    parser.add_argument(
        "--describe", nargs="+", default=[], metavar="KEY=VALUE", help="what IN does not tell"
    )
    parser.add_argument(
        "--input-format", choices=("BGR", "RGB"), help="reorder the first convolution's channels"
    )
    parser.add_argument(
        "--fold-std", action="store_true", help="MODEL.PIXEL_STD into the first convolution"
    )
    parser.add_argument(
        "--fold-ws",
        choices=("plain", "ws"),
        help="standardized weights into plain ones, or into MODEL.WS's definition",
    )
    parser.add_argument(
        "--fold-bn", action="store_true", help="statistics of batch norms into scale and shift"
    )
    parser.add_argument(
        "--config-overrides", action="store_true", help="print the keys alone, as overrides"
    )
    args = parser.parse_args()
    check_output(parser, args)
    return args


def check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse to write over a file without --force."""
    output = args.output
    if output is None:
        return
    if not output.endswith(".pth"):
        parser.error(f"OUT must end in .pth, got {output}")
    if os.path.exists(output) and not args.force:
        parser.error(f"OUT must be a new file, got {output}. Choose another, or add --force")


def described(pairs: list[str]) -> dict[str, Any]:
    """Return {key: value} of KEY=VALUE."""
    import ast

    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"what is described must be KEY=VALUE, got {pair}. Add the value.")
        try:
            values[key] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            values[key] = text  # RGB, say
    return values


def check_input_stays(args: argparse.Namespace) -> None:
    """Refuse to write over the input, under any of its names."""
    from detectron2.utils.file_io import PathManager

    if args.output is None or not os.path.exists(args.output):
        return
    if os.path.samefile(PathManager.get_local_path(args.input), args.output):
        raise ValueError(
            f"OUT must be another file than IN, got {args.output} for both. Choose one."
        )


def convert(args: argparse.Namespace) -> "Weights":
    """Read and fold."""
    from dataclasses import replace

    from gn_practical.weights import folding, read_weights

    check_input_stays(args)
    weights = read_weights(args.input, args.source, args.level)
    known = weights.description.with_values(described(args.describe))
    weights = replace(weights, description=known)
    if args.fold_ws:  # before the std, which standardizing would undo
        weights = folding.fold_ws(weights, args.fold_ws)
    if args.input_format:
        weights = folding.fold_input_order(weights, args.input_format)
    if args.fold_std:
        weights = folding.fold_std(weights)
    if args.fold_bn:
        weights = folding.fold_bn(weights)
    return weights


def in_words(value: Any) -> Any:
    """Return a value of a description as the table shows it."""
    if value is None:
        return "not known"
    if isinstance(value, dict) and all(isinstance(each, int) for each in value.values()):
        return f"{len(value)} norms with {', '.join(map(str, sorted(set(value.values()))))}"
    return value


def report(weights: "Weights") -> None:
    """Print what was recognized and which keys it needs."""
    from tabulate import tabulate

    from gn_practical.weights.config_keys import as_yaml, config_keys

    long = ("class_colors", "class_ids", "config", "lazy_config", "standardized_layers")
    hidden = (*long, "versions")
    rows = [
        (key.replace("_", " "), in_words(value))
        for key, value in vars(weights.description).items()
        if key not in hidden
    ]
    print(f"{len(weights.state)} tensors.\n")
    print(tabulate(rows, disable_numparse=True, maxcolwidths=[None, 70]))
    for note in weights.notes:
        print(f"\nNote: {note}.")
    if weights.unused:
        print(f"\nNot used: {len(weights.unused)} tensors ({', '.join(weights.unused[:4])}, ...).")
    print(f"\nThe config keys that they need:\n\n{as_yaml(config_keys(weights))}")


def write(weights: "Weights", output: str) -> None:
    """Write the weights with their description, whole or not at all."""
    from gn_practical.training.checkpoint.files import write_checkpoint

    state = {
        "model": {key: each.contiguous() for key, each in weights.state.items()},
        "description": weights.description.to_dict(),
        "matching_heuristics": True,  # for Detectron2 without this package, too
        "__author__": "gn_practical",
    }
    try:
        write_checkpoint(state, output)
    except OSError as error:
        raise ValueError(f"OUT must be a file that can be written, got {error}.") from error
    print(f"Written: {output}", file=sys.stderr)


def main() -> None:
    """Convert, ending with one clear error where the user can correct it."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.engine.run import one_clear_error

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        weights = convert(args)
        if args.config_overrides:
            from gn_practical.weights.config_keys import as_overrides, config_keys

            print(as_overrides(config_keys(weights)))
        else:
            report(weights)
        if args.output:
            write(weights, args.output)


if __name__ == "__main__":
    sys.exit(main())
