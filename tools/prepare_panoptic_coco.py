#!/usr/bin/env python
"""Make what a panoptic FPN needs beside COCO's panoptic annotations; see --help."""

import argparse
import logging
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

_DESCRIPTION = """\
Make the PNGs of stuff labels that a panoptic FPN trains on, from COCO's panoptic annotations:
0 for all things, 1.. for stuff in the order of the category ids, 255 for void.

Without arguments: COCO 2017 under the environment variable DETECTRON2_DATASETS (default:
./datasets), laid out as Detectron2 wants it,
  coco/annotations/panoptic_{train,val}2017.json
  coco/panoptic_{train,val}2017/*.png               (unpack the zips in coco/annotations)
writes
  coco/panoptic_stuff_{train,val}2017/*.png

Your own data: give --panoptic-json, --panoptic-root and --output; add --instances-json to make
the instances json too, from the things in the panoptic PNGs.

Uses all cores. Can be interrupted: PNGs that are there and whole are kept. Verifies all PNGs at
the end.
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line; the three arguments for own data come together or not at all."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--panoptic-json", help="panoptic annotations of your own data")
    parser.add_argument("--panoptic-root", help="folder of the panoptic PNGs")
    parser.add_argument("--output", help="folder for the stuff PNGs")
    parser.add_argument("--instances-json", help="instances json to write, with RLE masks")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="make all PNGs anew")
    args = parser.parse_args()
    own = [args.panoptic_json, args.panoptic_root, args.output]
    if any(own) != all(own) or (args.instances_json and not all(own)):
        parser.error("--panoptic-json, --panoptic-root and --output must be given together")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    return args


def main() -> int:
    """Prepare COCO or the user's own data."""
    args = parse_args()
    # Only now, so that --help need not wait for PyTorch.
    from gn_practical.training.data.errors import DatasetError
    from gn_practical.training.data.prepare import prepare_coco, prepare_stuff, write_instances_json

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.panoptic_json is None:
            root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
            prepare_coco(root, args.workers, args.overwrite)
            return 0
        source = (args.panoptic_json, args.panoptic_root)
        prepare_stuff(*source, args.output, args.workers, args.overwrite)
        if args.instances_json:
            count = write_instances_json(*source, args.instances_json, args.workers)
            logging.info("%s: %d instances.", args.instances_json, count)
    except DatasetError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
