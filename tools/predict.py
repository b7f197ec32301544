#!/usr/bin/env python
"""Show what a trained model sees in pictures, videos and cameras; see --help."""

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
# Before OpenCV is loaded: what is wrong with a video is said in one line, here.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")

if TYPE_CHECKING:
    from gn_practical.inference import Predictor
    from gn_practical.inference.dataset_ids import DatasetIds
    from gn_practical.inference.run import Progress
    from gn_practical.inference.sources import Source

_DESCRIPTION = """\
Predict with a checkpoint, which knows its config, classes and input, or with an exported model, and
write pictures and COCO's files of results into a folder.
"""

_EPILOG = """
Examples:

  Pictures, a folder, a pattern, a video, the first camera:
    python tools/predict.py --weights output/quickstart/model_final.pth photo.jpg
    python tools/predict.py --weights model_final.pth folder/ 'more/*.png' video.mp4 --output out
    python tools/predict.py --weights model.onnx 0

  Results that pycocotools evaluates, with the data set's own ids:
    python tools/predict.py --weights model_final.pth images/val --ids-from instances_val.json

  Weights of Detectron2's, which hold no config:
    python tools/predict.py --weights model_final_280758.pkl photo.jpg \\
        --config-file COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml

Exit code: 0; 1 a file could not be read, or an error; 2 wrong arguments; 130 interrupted. What was
done before is kept. docs/predict.md describes the files.
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder, pattern, video, camera's number")
    add("--weights", required=True, metavar="FILE", help="checkpoint, or exported model (.onnx)")
    add("--output", metavar="DIR", help="folder of the results (default: output/predictions)")
    add("--threshold", type=float, metavar="SCORE", help="least score of a detection (default: as "
        "evaluated in the files of results, 0.5 in pictures)")  # fmt: skip
    add("--classes", action="append", metavar="A,B", help="keep these classes alone")
    add("--batch-size", type=int, default=1, metavar="N", help="pictures of one size that run "
        "together (default: 1)")  # fmt: skip
    add("--min-size", type=int, metavar="PX", help="shortest side at test time (default: trained)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--config-file", metavar="FILE", help="for weights that hold no config: YAML, or a name in "
        "Detectron2's model zoo")  # fmt: skip
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the config")
    add("--recursive", action="store_true", help="take folders in folders too")
    add("--no-pictures", action="store_true", help="write the files of results alone")
    add("--format", choices=("coco", "none"), default="coco", help="of the results (default: coco)")
    add("--ids-from", metavar="JSON", help="take ids of pictures and classes from a data set's")
    add("--replace", action="store_true", help="write over earlier results in --output")
    args = parser.parse_intermixed_args()  # inputs may stand on both sides of the options
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold must be from 0 to 1, got {args.threshold:g}")
    for name in ("batch_size", "min_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.no_pictures and args.format == "none":
        parser.error("--no-pictures and --format none leave nothing to write")
    if args.output is None:
        args.output = free_folder("output/predictions")
    return args


def free_folder(path: str) -> str:
    """Return a folder that is not there yet."""
    number, candidate = 1, path
    while os.path.exists(candidate):
        number += 1
        candidate = f"{path}_{number}"
    return candidate


def find(args: argparse.Namespace, ids: "DatasetIds | None") -> "tuple[list[Source], list[str]]":
    """Return what is to be predicted, and what is wrong with the rest of the inputs."""
    from gn_practical.inference.sources import find_sources

    inside = any(os.path.isdir(i) and os.path.realpath(i) == os.path.realpath(args.output)
                 for i in args.inputs)  # fmt: skip
    without = args.output if not inside else None
    sources, problems = find_sources(args.inputs, args.recursive, without)
    if ids is not None:
        sources, unknown = ids.known(sources)
        problems += unknown
    return sources, problems


def load(args: argparse.Namespace, ids: "DatasetIds | None") -> "Predictor":
    """Load the model."""
    from gn_practical.inference import Predictor

    predictor = Predictor(
        args.weights,
        args.config_file,
        device=args.device,
        min_size=args.min_size,
        threshold=args.threshold,
        opts=args.opts,
    )
    if args.classes:
        predictor.keep_classes(args.classes)
    if ids is not None:
        predictor.classes = predictor.classes.with_ids_of(ids.categories, ids.path)
    return predictor


def say(text: str) -> None:
    """Write a line to stderr, beside the progress bar."""
    from tqdm import tqdm

    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    tqdm.write(f"error: {line}", file=sys.stderr)


def counted(number: int, what: str) -> str:
    """Return a number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def report(progress: "Progress", args: argparse.Namespace, has_ids: bool) -> None:
    """Say what was done, and where it is."""
    rate = progress.done / progress.seconds if progress.seconds else 0
    took = f"{progress.seconds:.1f} s ({rate:.1f} pictures/s)"
    failed = f", {counted(progress.failed, 'input')} failed" if progress.failed else ""
    print(f"{counted(progress.done, 'picture')} in {took}{failed}.")
    if progress.done:
        print(f"Results: {args.output}")
    if progress.done and args.format == "coco" and not has_ids:
        print(
            "Class ids are the model's own, from 0: the weights do not know the data set's. "
            "--ids-from JSON takes those of a data set."
        )


def run(args: argparse.Namespace) -> int:
    """Find the pictures, load the model, predict; return the exit code."""
    from gn_practical.inference.interruption import Interruption

    with Interruption() as interruption:
        from tqdm import tqdm

        from gn_practical.inference.dataset_ids import DatasetIds
        from gn_practical.inference.frames import count_frames
        from gn_practical.inference.results import ResultsFolder, check_folder
        from gn_practical.inference.run import predict_all

        ids = DatasetIds(args.ids_from) if args.ids_from else None
        sources, problems = find(args, ids)
        for problem in problems:
            say(problem)
        if not sources:
            return 1
        read = [each.path for each in sources if each.kind != "camera"]
        read += [each for each in (args.weights, args.config_file, args.ids_from) if each]
        check_folder(args.output, args.replace, read)  # before the model, which takes a while
        predictor = load(args, ids)
        if interruption.asked:
            return interruption.exit_code
        with (
            ResultsFolder(
                args.output,
                predictor.classes,
                pictures=not args.no_pictures,
                coco=args.format == "coco",
                replace=args.replace,
                inputs=read,
                ids=ids,
            ) as folder,
            tqdm(total=count_frames(sources), unit=" pictures", disable=None) as bar,
        ):
            progress = predict_all(
                predictor,
                sources,
                folder,
                batch_size=args.batch_size,
                stop=lambda: interruption.asked,
                on_pictures=bar.update,
                on_failure=say,
            )
        progress.failed += len(problems)
        report(progress, args, predictor.classes.has_ids)
        return interruption.exit_code or (1 if progress.failed else 0)


def main() -> int:
    """Run, ending with one clear error where the user can correct it."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # What today's PyTorch says at the sight of Detectron2; what matters is raised.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        return run(args)
    except ValueError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
