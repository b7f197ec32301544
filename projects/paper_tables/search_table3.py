#!/usr/bin/env python
"""Search the hyperparameters of Table 3 of arXiv:2302.03193, which the paper does not print."""

import argparse
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train the MLP of Table 3 on MNIST with random hyperparameters, keep those "
        "whose errors are nearest to the paper's, and run the best at all ten G with three seeds.",
        epilog="MNIST is read from MNIST/raw in the folder that DETECTRON2_DATASETS names, "
        "datasets if it is not set. A run takes about a minute on one core; an interrupted search "
        "goes on from its file.",
    )
    parser.add_argument("--settings", type=int, default=64, help="drawn at first (default: 64)")
    parser.add_argument("--finalists", type=int, default=2, help="run in full (default: 2)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument(
        "--output",
        default="output/table3_search.csv",
        metavar="CSV",
        help="one line a run (default: output/table3_search.csv)",
    )
    return parser.parse_args()


def main() -> None:
    """Run the search and print Table 3 of each finalist."""
    args = parse_args()
    # After parsing: importing torch takes seconds, and --help should not.
    from paper_tables.mnist import load_mnist
    from paper_tables.table3 import Search

    from gn_practical.analysis import format_rows

    data = load_mnist(os.environ.get("DETECTRON2_DATASETS", "datasets"), args.download)
    search = Search(args.output, data, args.workers)
    for setting in search.run(args.settings, args.seed, args.finalists):
        print(setting)
        print(format_rows(search.rows(setting)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
