#!/usr/bin/env python
"""Draw predictions beside the ground truth, the worst first; see --help."""

import argparse
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from gn_practical.training.evaluation.annotated import AnnotatedImages
    from gn_practical.training.evaluation.picture_files import PictureFolder
    from gn_practical.training.evaluation.result_files import Predictions
    from gn_practical.training.evaluation.result_pictures import Result

MEASURES = ("PQ", "SQ", "RQ", "score", "missed", "wrong")

_EPILOG = """
Examples:

  After an evaluation or training, whose predictions are in OUTPUT_DIR/inference:
    python tools/visualize_results.py --config-file configs/quickstart/pfpn.yaml \\
        --input output/quickstart --output output/worst
  Instances, of a registered data set:
    python tools/visualize_results.py --input output/inference/coco_instances_results.json \\
        --output output/worst --dataset coco_2017_val --conf-threshold 0.3
  Files, without a config:
    python tools/visualize_results.py --input predictions.json --output worst \\
        --panoptic panoptic.json panoptic --images images

PQ of an image is the mean over its classes; of instances at --conf-threshold, too, where a match
is an IoU of 0.5. The folder gets rank_value_image.jpg, index.html and index.csv.

Exit code: 0 all drawn, 1 some could not be, 2 wrong arguments, 130 interrupted.
More in docs/look.md.
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Draw predictions, instances or panoptic ones, beside the ground truth, the "
        "worst images first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="json of predictions, or its folder")
    add("--output", required=True, metavar="DIR", help="folder of the pictures")
    add("--png-dir", metavar="DIR", help="PNGs of a panoptic json (default: panoptic beside it)")
    add("--kind", choices=("instances", "panoptic"), help="of which, where a folder has both")
    add("--config-file", metavar="FILE", help="config with the data set, DATASETS.TEST")
    add("--dataset", metavar="NAME", help="data set (default: the config's, or coco_2017_val)")
    add("--instances", metavar="JSON", help="annotated instances, without a config")
    add("--panoptic", nargs=2, metavar=("JSON", "PNGDIR"), help="panoptic annotations, likewise")
    add("--images", metavar="DIR", help="folder of the images of --instances or --panoptic")
    least = "least score of instances, in [0, 1] (default: 0.5)"
    add("--conf-threshold", type=float, default=0.5, metavar="S", help=least)
    add("--by", choices=MEASURES, default="PQ", help="what ranks the images (default: PQ)")
    add("--num", type=int, default=50, metavar="N", help="pictures, 0 for all (default: 50)")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with what is wrong with the arguments."""
    given = [args.config_file or args.dataset, args.instances, args.panoptic]
    if sum(map(bool, given)) > 1:
        parser.error("--config-file or --dataset, --instances and --panoptic exclude each other")
    if (args.instances or args.panoptic) and not args.images:
        parser.error("--instances and --panoptic need --images")
    if args.opts and not args.config_file:
        parser.error(f"overrides need --config-file, got {' '.join(args.opts)}")
    if not 0 <= args.conf_threshold <= 1:
        parser.error(f"--conf-threshold must be in [0, 1], got {args.conf_threshold}")
    if args.num < 0:
        parser.error(f"--num must be at least 0, got {args.num}")


def read_truth(args: argparse.Namespace) -> "AnnotatedImages":
    """Read the ground truth that the arguments name."""
    from gn_practical.training.config import load_cfg
    from gn_practical.training.evaluation import annotated

    if args.instances:
        return annotated.from_instances(args.instances, args.images)
    if args.panoptic:
        return annotated.from_panoptic(*args.panoptic, args.images)
    names = [args.dataset or "coco_2017_val"]
    if args.config_file:
        cfg = load_cfg(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
        names = [args.dataset] if args.dataset else list(cfg.DATASETS.TEST[:1])
        if not names:
            raise ValueError(
                "DATASETS.TEST must name a data set, got none. Name it with --dataset."
            )
    return annotated.from_catalog(names)


def measure_all(
    args: argparse.Namespace, images: "AnnotatedImages", predictions: "Predictions"
) -> tuple[list["Result"], int]:
    """Compare every predicted image with its annotations; return the number that failed, too."""
    from tqdm import tqdm

    from gn_practical.training.data import DatasetError
    from gn_practical.training.evaluation.result_pictures import check_kind, measure

    records = check_kind(predictions, images)
    results, failed = [], 0
    for record in tqdm(records, "comparing", leave=False, disable=None):
        try:
            results.append(measure(record, predictions, args.conf_threshold))
        except DatasetError as error:
            print(f"not compared: {error}", file=sys.stderr)
            failed += 1
    left_out = len(images.records) - len(records)
    if left_out:
        print(f"{left_out} of {len(images.records)} images have no prediction and are left out.")
    return results, failed


def draw_all(
    args: argparse.Namespace,
    images: "AnnotatedImages",
    predictions: "Predictions",
    results: list["Result"],
) -> int:
    """Draw the worst, write the index of all; return the exit code."""
    from gn_practical.training.data import DatasetError
    from gn_practical.training.evaluation.picture_files import PictureFolder
    from gn_practical.training.evaluation.result_pictures import draw_result

    read = {os.path.dirname(record["file_name"]) or "." for record in images.records}
    read |= {os.path.dirname(path) for path in predictions.pngs.values()}
    folder = PictureFolder(args.output, sources=read)
    pictures: list[str] = []
    code = 0
    try:
        for rank, result in enumerate(results[: args.num or len(results)], start=1):
            stem = os.path.splitext(os.path.basename(result.record["file_name"]))[0]
            name = f"{rank:04d}_{args.by}{result.values[args.by]:.1f}_{stem}"
            try:
                drawn = draw_result(result, predictions, images.classes)
                pictures.append(folder.save(name, drawn))
            except DatasetError as error:
                print(f"not drawn: {error}", file=sys.stderr)
                pictures.append("")
                code = 1
    except KeyboardInterrupt:
        code = 130
    write_index(args, folder, images.name, results, pictures)
    return code


def write_index(
    args: argparse.Namespace,
    folder: "PictureFolder",
    name: str,
    results: list["Result"],
    pictures: list[str],
) -> None:
    """Write index.csv of all images and index.html of those that were drawn."""
    from gn_practical.training.evaluation import result_pictures

    rows = result_pictures.index_rows(results, pictures)
    whole = result_pictures.whole_quality(results)
    values = ", ".join(f"{key} {value:.2f}" for key, value in whole.items())
    remark = f"All {len(results)} images together: {values}. Worst first by {args.by}."
    folder.write("index.csv", result_pictures.index_csv(rows))
    title = f"{args.input} on {name}"
    page = result_pictures.index_html(rows[: len(pictures)] or rows[:1], title, remark)
    path = folder.write("index.html", page)
    print(f"{remark}\n{sum(map(bool, pictures))} pictures and index.csv beside {path}")


def run(args: argparse.Namespace) -> int:
    """Read, compare, draw."""
    from gn_practical.training.evaluation.result_files import find_predictions, read_predictions
    from gn_practical.training.evaluation.result_pictures import ranked

    images = read_truth(args)
    path = find_predictions(args.input, images, args.kind)
    predictions = read_predictions(path, images, args.png_dir)
    results, failed = measure_all(args, images, predictions)
    if not results:
        return 1
    code = draw_all(args, images, predictions, ranked(results, args.by))
    return code or int(bool(failed))


def main() -> int:
    """Run, ending with one clear error where the user can correct it."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.engine.run import one_clear_error

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        try:
            return run(args)
        except KeyboardInterrupt:  # while reading
            return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
