#!/usr/bin/env python
"""Draw annotations, or what the loader feeds a model with; see --help."""

import argparse
import contextlib
import logging
import os
import random
import sys
import warnings
from typing import TYPE_CHECKING, Any

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gn_practical.training.evaluation.annotated import AnnotatedImages
    from gn_practical.training.evaluation.data_pictures import Picture

_SECTIONS = (
    *("MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST", "GLOBAL"),
    *("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK"),
)

_EPILOG = """
Examples:

  The annotations of a config's training data, and what training makes of them:
    python tools/visualize_data.py --config-file configs/quickstart/pfpn.yaml
    python tools/visualize_data.py --config-file configs/quickstart/pfpn.yaml --source loader
  A random sample of it, or some images by id or file name:
    python tools/visualize_data.py --config-file configs/quickstart/pfpn.yaml --seed 1 --num 8
    python tools/visualize_data.py --config-file configs/quickstart/pfpn.yaml \\
        --image-ids 12 000034.jpg
  Files, without a config:
    python tools/visualize_data.py --instances train.json --images images
    python tools/visualize_data.py --panoptic panoptic.json panoptic --images images

Exit code: 0 all drawn, 1 some could not be, 2 wrong arguments, 130 interrupted.
More in docs/look.md.
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Draw the annotations of data sets, instances, panoptic segments and stuff "
        "labels side by side, or the augmented samples that training feeds the model with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="draw the data of this config")
    sources = ("annotation", "loader", "dataloader")
    add("--source", choices=sources, default="annotation", help="(default: annotation)")
    add("--dataset", nargs="+", metavar="NAME", help="data sets (default: DATASETS.TRAIN)")
    add("--instances", metavar="JSON", help="draw a json of instances")
    add("--panoptic", nargs=2, metavar=("JSON", "PNGDIR"), help="draw panoptic annotations")
    add("--images", metavar="DIR", help="folder of the images of --instances or --panoptic")
    where = "(default: data_pictures in OUTPUT_DIR of the config, or in output)"
    add("--output", "--output-dir", metavar="DIR", help=f"folder of the pictures {where}")
    add("--num", type=int, default=20, metavar="N", help="pictures, 0 for all (default: 20)")
    add("--seed", type=int, metavar="S", help="a random sample in place of the first ones")
    add("--image-ids", nargs="+", metavar="ID", help="these alone, by id or file name")
    add("--show", action="store_true", help="show them in a window, and write nothing")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    for name in ("image_ids", "dataset"):  # what is behind them are overrides
        words = getattr(args, name) or []
        first = next((i for i, w in enumerate(words) if i and is_key(w)), len(words))
        setattr(args, name, words[:first])
        args.opts = words[first:] + args.opts
    check_args(parser, args)
    return args


def is_key(word: str) -> bool:
    """Whether a word of the command line is a key of a config, and no name of a file."""
    return word.partition(".")[0] in _SECTIONS


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with what is wrong with the arguments."""
    sources = [args.config_file or args.dataset, args.instances, args.panoptic]
    if sum(map(bool, sources)) != 1:
        parser.error("give one of --config-file (or --dataset), --instances and --panoptic")
    if (args.instances or args.panoptic) and not args.images:
        parser.error("--instances and --panoptic need --images")
    if args.opts and not args.config_file:
        parser.error(f"overrides need --config-file, got {' '.join(args.opts)}")
    if args.source != "annotation":
        if not args.config_file:
            parser.error(f"--source {args.source} needs --config-file")
        if args.image_ids or args.num == 0:
            parser.error(f"--source {args.source} is endless: give --num, and no --image-ids")
    if args.num < 0:
        parser.error(f"--num must be at least 0, got {args.num}")


def read_config(args: argparse.Namespace) -> Any:
    """Read the config, with the chosen data sets and seed."""
    from gn_practical.training.config import load_cfg

    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", *args.opts]
    if args.dataset:
        opts += ["DATASETS.TRAIN", repr(tuple(args.dataset))]
    if args.source != "annotation" and args.seed is not None:
        opts += ["SEED", str(args.seed)]
    return load_cfg(args.config_file or "", opts)


def make_pictures(args: argparse.Namespace) -> "tuple[Iterable[Picture], set[str]]":
    """Return the pictures that are asked for and the folders read; sets --output's default."""
    from gn_practical.training.evaluation import annotated, data_pictures

    folder = "output"
    if args.instances:
        images = annotated.from_instances(args.instances, args.images)
    elif args.panoptic:
        images = annotated.from_panoptic(*args.panoptic, args.images)
    else:
        cfg = read_config(args)
        folder = cfg.OUTPUT_DIR
        images = annotated.from_catalog(cfg.DATASETS.TRAIN)
    args.output = args.output or os.path.join(folder, "data_pictures")
    read = {os.path.dirname(record["file_name"]) or "." for record in images.records}
    if args.source == "annotation":
        return data_pictures.of_records(choose(images, args), images.classes), read
    return loader_pictures(cfg, images, args.num), read


def loader_pictures(cfg: Any, images: "AnnotatedImages", count: int) -> "Iterable[Picture]":
    """Return pictures of the first samples of a training."""
    from gn_practical.training.engine import Trainer
    from gn_practical.training.evaluation.data_pictures import of_samples

    batches = Trainer.build_train_loader(cfg)
    return of_samples(batches, images.classes, cfg.INPUT.FORMAT, count)


def choose(images: "AnnotatedImages", args: argparse.Namespace) -> list[dict]:
    """Return the records that are to be drawn."""
    records = images.records
    if not records:
        raise ValueError(f"a data set must have images, got none in {images.name}. Check the file.")
    if args.image_ids:
        known: dict[str, dict] = {}
        for record in records:
            name = os.path.basename(record["file_name"])
            for key in (name, os.path.splitext(name)[0], str(record["image_id"])):
                known[key] = record
        unknown = [each for each in args.image_ids if each not in known]
        if unknown:
            raise ValueError(
                f"image ids must be ids or file names in {images.name}, got {unknown[0]}. It has "
                f"{len(records)} images" + (f", such as {next(iter(known))}." if known else ".")
            )
        return [known[each] for each in args.image_ids]
    count = min(args.num or len(records), len(records))
    if args.seed is not None:
        return random.Random(args.seed).sample(records, count)
    return records[:count]


def write(pictures: "Iterable[Picture]", read: set[str], args: argparse.Namespace) -> int:
    """Draw and write, naming what cannot be drawn; return the exit code."""
    from gn_practical.training.evaluation.picture_files import PictureFolder, show

    folder = None if args.show else PictureFolder(args.output, sources=read)
    drawn = failed = 0
    interrupted = False
    try:
        for picture in pictures:
            try:
                pixels = picture.draw()
            except ValueError as error:  # which a DatasetError is
                print(f"not drawn: {error}", file=sys.stderr)
                failed += 1
                continue
            if folder is None:
                show(picture.name, pixels)
            else:
                folder.save(picture.name, pixels)
            drawn += 1
    except KeyboardInterrupt:
        interrupted = True
    where = "" if folder is None else f" in {folder.path}"
    print(f"{drawn} pictures{where}" + (f", {failed} could not be drawn" if failed else ""))
    return 130 if interrupted else int(bool(failed))


def main() -> int:
    """Run, ending with one clear error where the user can correct it."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.engine.run import one_clear_error

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # of Detectron2
    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        try:
            return write(*make_pictures(args), args)
        except KeyboardInterrupt:  # while reading
            return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
