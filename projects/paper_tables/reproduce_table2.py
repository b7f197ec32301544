#!/usr/bin/env python
"""Reproduce Table 2 of arXiv:2302.03193: forward and backward gains of activations."""

import argparse
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Gains F = E[f(z)²]/σ² and B = E[f'(z)²], z ~ N(0, σ²), of eleven activations "
        "by quadrature (error below 1e-9), and B/F.",
        epilog="example: python reproduce_table2.py --samples 10_000_000 --output table2.md",
    )
    parser.add_argument(
        "--activations", nargs="+", metavar="NAME", help="others than the eleven, by name"
    )
    parser.add_argument("--sigmas", nargs="+", type=float, metavar="SIGMA", help="not 0.1 1 10")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        help="Monte Carlo samples each to check the quadrature; the paper took 10_000_000",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="save as .md, .csv, .json or .txt")
    return parser.parse_args()


def main() -> None:
    """Print the table, and save it where asked."""
    args = parse_args()
    # After parsing: importing torch takes seconds, and --help should not.
    import torch
    from paper_tables.files import check_output, save_rows
    from paper_tables.paper_numbers import TABLE2_ACTIVATIONS
    from paper_tables.table2 import SIGMAS, summary, table2_rows

    from gn_practical.analysis import format_rows

    if args.output:
        check_output(args.output)
    torch.set_num_threads(1)  # samples come in chunks that fit the cache: threads only wait
    rows = table2_rows(
        args.activations or TABLE2_ACTIVATIONS,
        args.sigmas or SIGMAS,
        samples=args.samples,
        seed=args.seed,
    )
    print(format_rows(rows), end="")
    print(summary(rows))
    if args.output:
        save_rows(rows, args.output)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
