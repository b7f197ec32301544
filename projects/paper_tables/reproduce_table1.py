#!/usr/bin/env python
"""Reproduce Table 1 of arXiv:2302.03193: gradient variance ratios of unit blocks, and go beyond."""

import argparse
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Measured variance ratios of the gradient over a unit block (weight layer, "
        "group normalization, ReLU): A over the weight layer, B over the norm, C over ReLU, D over "
        "the block, with standard errors, beside Eqs. of the paper and the exact value.",
        epilog="L = Σ v·z with random v. paper_tables/unit_block.py says what is sampled, "
        "docs/theory.md what came out.",
    )
    grids = parser.add_mutually_exclusive_group()
    grids.add_argument(
        "--extended",
        action="store_true",
        help="Linear, n_g = 4 ... 64, n_in/n_out = 1.5, 2, 4",
    )
    grids.add_argument(
        "--convolutions", action="store_true", help="kernel, stride, padding, size, correlation"
    )
    grids.add_argument(
        "--stack",
        choices=("plain", "residual", "pooled", "stages", "calibrated"),
        help="K along a stack of convolutional blocks",
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        metavar="N_IN,N_OUT,G",
        help="rows of the table instead of ours, e.g. 256,128,32 512,256,64",
    )
    parser.add_argument(
        "--experiments", type=int, help="per row (default: 100_000; draws of weights: 100)"
    )
    parser.add_argument(
        "--loss", default="random", choices=("random", "distance", "squares", "sum")
    )
    parser.add_argument("--activation", default="relu", help="of --extended (default: relu)")
    parser.add_argument("--groups", type=int, default=16, help="G of --stack (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--output", metavar="FILE", help="save as .md, .csv, .json or .txt")
    return parser.parse_args()


def parse_blocks(texts: list[str]) -> list[tuple[int, int, int]]:
    """Turn "256,128,32" into (256, 128, 32)."""
    try:
        blocks = [tuple(int(part) for part in text.split(",")) for text in texts]
    except ValueError:
        blocks = [()]
    if any(len(block) != 3 for block in blocks):
        raise ValueError(
            f"blocks must be triples N_IN,N_OUT,G of integers, got blocks={' '.join(texts)}. "
            "Write for example 256,128,32."
        )
    return blocks


def main() -> None:
    """Print the table, and save it where asked."""
    args = parse_args()
    # After parsing: importing torch takes seconds, and --help should not.
    from paper_tables import beyond
    from paper_tables.files import check_output, save_rows
    from paper_tables.table1 import BLOCKS, table1_rows

    from gn_practical.analysis import format_rows

    if args.output:
        check_output(args.output)
    seed, linear, drawn = args.seed, args.experiments or 100_000, args.experiments or 100
    if args.extended:
        rows = beyond.extended_rows(experiments=linear, seed=seed, activation=args.activation)
    elif args.convolutions:
        rows = beyond.convolution_rows(draws=drawn, seed=seed)
    elif args.stack:
        rows = beyond.stack_rows(beyond.STACKS[args.stack], args.groups, draws=drawn, seed=seed)
    else:
        blocks = parse_blocks(args.blocks) if args.blocks else BLOCKS
        rows = table1_rows(blocks, linear, seed, args.loss)
    print(format_rows(rows), end="")
    if args.output:
        save_rows(rows, args.output)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
