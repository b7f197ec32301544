#!/usr/bin/env python
"""Compare runs on one page that opens without a network; see --help."""

import argparse
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Write one HTML page about runs: final numbers and differences, curves, single "
        "classes, the same validation pictures, what differs between the configs, groups per "
        "layer, machine and speed. Runs that differ by the seed alone are taken together.",
        epilog="Examples: python tools/compare_runs.py output/a output/b --output report.html; of "
        "a sweep: python tools/compare_runs.py output/sweeps/quickstart. Exit codes: 0 written, "
        "1 a folder holds no run or the page cannot be written, 2 wrong arguments.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="DIR", help="OUTPUT_DIR of a run, or a folder of runs")
    add("--output", default="report.html", metavar="FILE", help="(default: report.html)")
    text = "run that others are compared with, by its name on the page (default: the first)"
    add("--baseline", metavar="NAME", help=text)
    text = "most validation pictures that are shown (default: 4)"
    add("--pictures", type=int, default=4, metavar="N", help=text)
    args = parser.parse_args()
    if not args.output.endswith(".html"):
        parser.error(f"--output must end with .html, got {args.output}")
    if args.pictures < 0:
        parser.error(f"--pictures must be at least 0, got {args.pictures}")
    return args


def main() -> None:
    """Write the page, ending with one clear error where the user can correct it."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.comparison import compare_runs
    from gn_practical.training.engine.run import one_clear_error

    with one_clear_error():
        try:
            number = compare_runs(args.runs, args.output, args.baseline, args.pictures)
        except OSError as error:
            sys.exit(f"error: the page cannot be written: {error}")
        except ModuleNotFoundError as error:
            what = f"a page must find its packages, got no {error.name}."
            sys.exit(f"error: {what} pip install 'gn_practical[report]'")
    size = os.path.getsize(args.output) / 1e6
    print(f"{args.output}: {number} runs, {size:.1f} MB, opens without a network")


if __name__ == "__main__":
    main()
