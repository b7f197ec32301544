#!/usr/bin/env python
"""Print the groups of every norm of a config's model and the K they give; see --help."""

import argparse
import os
import sys
from pathlib import Path

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Layer, channels, G_ideal (Eq. 32), and for each choice of groups G and K by "
        "Eq. 31; md, csv and json also K with the exact factor. Needs no data, weights or GPU.",
        epilog="Example: python tools/group_table.py --config-file configs/pfpn_pgn_all.yaml "
        "--format md --output groups.md MODEL.RESNETS.DEPTH 101",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE")
    model.add_argument(
        "--checkpoint", metavar="FILE", help="one of a training here, with its config"
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["practical", "exact", "32", "1"],
        metavar="CHOICE",
        help="practical, exact, instance, model or numbers (default: practical exact 32 1)",
    )
    parser.add_argument(
        "--format", choices=("text", "md", "csv", "json"), default="text", help="(default: text)"
    )
    parser.add_argument("--output", metavar="FILE", help="write there instead")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.config.node import split_overrides

    args.groups, swallowed = split_overrides(args.groups)
    args.opts = swallowed + args.opts
    return args


def main() -> None:
    """Build the model without memory or weights, and print its table."""
    args = parse_args()
    import torch

    from gn_practical import build_model
    from gn_practical.analysis import format_rows
    from gn_practical.analysis.group_table import group_table, reading_columns
    from gn_practical.training.engine import load_cfg
    from gn_practical.training.engine.run import one_clear_error
    from gn_practical.weights.stored import merge_stored_config

    with one_clear_error():
        opts = [*args.opts, "MODEL.DEVICE", "meta"]
        if args.checkpoint:
            cfg = load_cfg("", opts, add_config=lambda c: merge_stored_config(c, args.checkpoint))
        else:
            cfg = load_cfg(args.config_file, opts)
        with torch.device("meta"):
            model = build_model(cfg)
        rows = group_table(model, args.groups)
        rows = reading_columns(rows) if args.format == "text" else rows
        text = format_rows(rows, args.format, width=100)
        if not args.output:
            print(text, end="")
            return
        try:
            Path(args.output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"output must be a file that can be written, got {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
