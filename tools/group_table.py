#!/usr/bin/env python
"""Print the groups of every norm of a config's model and the K they give; see --help."""

import argparse
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

FORMATS = ("text", "md", "csv", "json")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Layer, channels, G_ideal (Eq. 32), and for each choice of groups G, K by "
        "Eq. 31 and K with the exact factor. Needs no data, no weights and no GPU.",
        epilog="Example: python tools/group_table.py --config-file configs/pfpn_pgn_all.yaml "
        "--format md --output groups.md MODEL.RESNETS.DEPTH 101",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["practical", "exact", "32", "1"],
        metavar="CHOICE",
        help="practical, exact, model or numbers (default: practical exact 32 1)",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="(default: text)")
    parser.add_argument("--output", metavar="FILE", help="write there instead")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    split_overrides(args)
    return args


def split_overrides(args: argparse.Namespace) -> None:
    """Give back the overrides that --groups, which takes any number of words, has swallowed."""
    keys = [index for index, word in enumerate(args.groups) if word.isupper()]
    if keys:
        args.opts = args.groups[keys[0] :] + args.opts
        args.groups = args.groups[: keys[0]]


def main() -> None:
    """Build the model without memory or weights, and print its table."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    import torch

    from gn_practical import build_model
    from gn_practical.analysis import format_rows
    from gn_practical.analysis.group_table import group_table
    from gn_practical.training.engine import load_cfg
    from gn_practical.training.engine.run import one_clear_error

    with one_clear_error():
        cfg = load_cfg(args.config_file, [*args.opts, "MODEL.DEVICE", "meta"])
        with torch.device("meta"):
            model = build_model(cfg)
        text = format_rows(group_table(model, args.groups), args.format)
        if not args.output:
            print(text, end="")
            return
        try:
            with open(args.output, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ValueError(f"output must be a file that can be written, got {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
