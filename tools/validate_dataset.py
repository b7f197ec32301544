#!/usr/bin/env python
"""Find corrupt images and wrong annotations before training; see --help."""

import argparse
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from gn_practical.training.validation import Report
    from gn_practical.training.validation.targets import Target

_DESCRIPTION = """\
Decode every image and PNG of data sets in COCO's format, check every annotation, and report what
is wrong with which file, image and annotation. docs/own_data.md lists what is checked.
"""

_EPILOG = """
Examples:

  All of DATASETS.TRAIN and DATASETS.TEST of a run:
    python tools/validate_dataset.py --config-file configs/pfpn_pgn.yaml
    python tools/validate_dataset.py --config-file configs/faster_rcnn_gn_ws_pgn.yaml \\
        DATASETS.COCO_INSTANCES '[("my_train", "images", "train.json")]' \\
        DATASETS.TRAIN '("my_train",)' DATASETS.TEST '()'

  Files, without a config:
    python tools/validate_dataset.py --instances train.json --images images
    python tools/validate_dataset.py --panoptic panoptic.json panoptic --images images

  Train on what is sound:
    python tools/validate_dataset.py --instances train.json --images images \\
        --write-clean train_clean.json

Exit code: 0 no error (there may be warnings), 1 errors, 2 wrong arguments, 130 interrupted (the
report says what was not checked).
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="validate the data of this config")
    add("--instances", metavar="JSON", help="validate a json of instances")
    add("--panoptic", nargs=2, metavar=("JSON", "PNGDIR"), help="validate panoptic annotations")
    add("--images", metavar="DIR", help="folder of the images of --instances and --panoptic")
    add("--stuff", metavar="DIR", help="stuff PNGs that belong to --panoptic")
    add("--annotations-only", action="store_true", help="the jsons alone: no image, no PNG")
    where = "(default: validation.json in OUTPUT_DIR of the config, or in output)"
    add("--output", metavar="FILE", help=f"report with all faults, .json or .csv {where}")
    clean = "write the json again without the images and annotations that have errors"
    add("--write-clean", metavar="PATH", help=f"{clean}; a folder if there are several jsons")
    add("--first", type=int, default=5, metavar="N", help="shown of each reason (default: 5)")
    add("--workers", type=int, metavar="N", help="processes (default: all cores)")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    if not (args.config_file or args.instances or args.panoptic):
        parser.error("give --config-file, --instances or --panoptic")
    if args.opts and not args.config_file:
        parser.error(f"overrides need --config-file, got {' '.join(args.opts)}")
    if args.instances and not (args.images or args.annotations_only):
        parser.error("--instances needs --images, or --annotations-only")
    if args.stuff and not args.panoptic:
        parser.error("--stuff needs --panoptic")
    if args.first < 0 or (args.workers is not None and args.workers < 1):
        parser.error("--first must be at least 0 and --workers at least 1")
    return args


def read_targets(args: argparse.Namespace) -> "list[Target]":
    """Return what is to be validated; sets the default of --output."""
    from gn_practical.training.validation import InstancesTarget, PanopticTarget, targets_of

    folder, targets, images = "output", [], None if args.annotations_only else args.images
    if args.config_file:
        from gn_practical.training.engine import load_cfg

        cfg = load_cfg(args.config_file, args.opts)
        folder, targets = cfg.OUTPUT_DIR, targets_of(cfg, files=not args.annotations_only)
    if args.instances:
        targets.append(InstancesTarget(args.instances, images))
    if args.panoptic:
        others = (None, args.stuff, not args.annotations_only, args.instances)
        targets.append(PanopticTarget(*args.panoptic, images, *others))
    args.output = args.output or os.path.join(folder, "validation.json")
    return targets


def clean_paths(targets: "list[Target]", path: str) -> dict[str, str]:
    """Map each json to the clean one that --write-clean asks for."""
    jsons = [target.json for target in targets if target.json.endswith(".json")]
    if len(jsons) == 1:
        return {jsons[0]: path}
    outputs = {json: os.path.join(path, os.path.basename(json)) for json in jsons}
    if path.endswith(".json") or len(set(outputs.values())) < len(jsons):
        raise ValueError(
            f"write-clean must be a folder for {len(jsons)} jsons with names of their own, got "
            f"write_clean={path} for {', '.join(jsons)}. Validate one at a time with --instances "
            "or --panoptic."
        )
    return outputs


def write_clean_jsons(report: "Report", paths: dict[str, str]) -> None:
    """Write the clean jsons of what was checked to the end, and say what they lack."""
    from gn_practical.training.validation import write_clean

    for source, output in paths.items():
        unusable = any(f.json == source and f.reason == "json unusable" for f in report.faults)
        if source not in report.checked or unusable:
            print(f"{output} is not written: {source} could not be checked to the end.")
            continue
        removed = write_clean(source, report.faults, output)
        print(f"{output}: without {removed.images} images and {removed.annotations} annotations.")
        if removed.kept:
            print(f"  {removed.kept} errors remain that no removal corrects: of categories, say.")


def run(args: argparse.Namespace) -> int:
    """Validate, report, clean."""
    from gn_practical.training.validation import check_ending, validate

    if args.output:
        check_ending(args.output)
    targets = read_targets(args)
    paths = clean_paths(targets, args.write_clean) if args.write_clean is not None else {}
    report = validate(targets, args.workers)
    print(report.table(args.first), end="")
    report.save(args.output)
    print(f"All of it is in {args.output}")
    write_clean_jsons(report, paths)
    return report.exit_code


def main() -> int:
    """Run, ending with one clear error where the user can correct it."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.engine.run import one_clear_error

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        try:
            return run(args)
        except RuntimeError as error:  # a worker died
            sys.exit(f"error: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
