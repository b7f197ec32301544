"""What reading, drawing and writing add to the model's own time in predict.py; and its memory.

The model alone, on pictures that are read and resized already, and all of predicting, from files to
a folder of results, take turns of ten pictures in one process. The figure is the ratio of the
medians of their turns: by the clock, where reading and writing run beside the model if a core is
free; and by the processor's time of all threads, which other work on the machine disturbs less and
which is the most that can be added. Then many pictures are predicted, and the resident memory is
watched.

Examples:
  python benchmarks/predict.py --weights output/quickstart/model_final.pth
  python benchmarks/predict.py --weights output/quickstart/model_final.pth --threads 2 --turns 9
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from time import perf_counter, process_time
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "50000")

import psutil
import torch

from gn_practical.inference import Predictor
from gn_practical.inference.predictor import Loaded
from gn_practical.inference.results import ResultsFolder
from gn_practical.inference.run import predict_all
from gn_practical.inference.sources import Source, find_sources

MOST_OVERHEAD = 0.30
MOST_GROWTH = 0.02  # of resident memory, between the second fifth and the last
_OF_A_TURN = 10  # pictures
_EVERY = 20  # pictures between two looks at the memory


class Times(NamedTuple):
    """Seconds."""

    clock: float
    processor: float  # of all threads


def main() -> int:
    """Measure and print; return 1 if a figure is above its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="output/quickstart/model_final.pth")
    parser.add_argument("--images", default="datasets/scenes/images/val")
    parser.add_argument("--pictures", type=int, default=100, help="(default: 100)")
    parser.add_argument(
        "--turns", type=int, default=3, help="of each over all pictures (default: 3)"
    )
    parser.add_argument("--memory", type=int, default=1000, help="pictures (default: 1000)")
    parser.add_argument("--threads", type=int, default=1, help="of the model (default: 1)")
    parser.add_argument("--device", help="by default CUDA where there is a GPU")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    predictor = Predictor(args.weights, device=args.device)
    sources = find_sources([args.images])[0][: args.pictures]
    print(
        f"{len(sources)} pictures, {predictor.device}, {args.threads} threads of the model,", end=""
    )
    print(f" {os.cpu_count()} cores, torch {torch.__version__}")
    overhead = measure_overhead(predictor, sources, args.turns)
    growth = measure_memory(predictor, sources, args.memory) if args.memory else 0.0
    return int(overhead > MOST_OVERHEAD or growth > MOST_GROWTH)


def measure_overhead(predictor: Predictor, sources: list[Source], turns: int) -> float:
    """Print the times of both, and return what all of it takes beyond the model alone."""
    loaded = [predictor.load(source.path) for source in sources]
    predictor.predict(loaded[:3])  # warms up
    parts: dict[str, list[Times]] = {"the model alone": [], "all of it": []}
    for turn in range(turns):
        for start in range(0, len(sources), _OF_A_TURN):
            some = slice(start, start + _OF_A_TURN)
            runs = [partial(all_of_it, predictor, sources[some])]
            runs.insert(turn % 2, partial(model_alone, predictor, loaded[some]))
            for run in runs:
                name = "all of it" if run.func is all_of_it else "the model alone"
                parts[name].append(timed(run, len(loaded[some])))
    medians = []
    for name, times in parts.items():
        medians.append(Times(*(statistics.median(each) for each in zip(*times, strict=True))))
        clock, processor = (1e3 * each for each in medians[-1])
        print(f"{name:16}{clock:8.1f} ms a picture, {processor:.1f} ms of the processor")
    clock, processor = (b / a - 1 for a, b in zip(*medians, strict=True))
    print(f"on top: {clock:.1%} by the clock, {processor:.1%} of the processor", end="")
    print(f" (at most {MOST_OVERHEAD:.0%})")
    return min(clock, processor)


def timed(run: Callable[[], None], pictures: int) -> Times:
    """Return the times of one picture."""
    start = perf_counter(), process_time()
    run()
    return Times((perf_counter() - start[0]) / pictures, (process_time() - start[1]) / pictures)


def model_alone(predictor: Predictor, loaded: list[Loaded]) -> None:
    """Predict, one picture at a time."""
    for each in loaded:
        predictor.predict([each])


def all_of_it(predictor: Predictor, sources: list[Source]) -> None:
    """Predict from files to results."""
    with (
        tempfile.TemporaryDirectory() as path,
        ResultsFolder(path, predictor.classes) as folder,
    ):
        predict_all(predictor, sources, folder)


def measure_memory(predictor: Predictor, sources: list[Source], pictures: int) -> float:
    """Predict many pictures; print and return how much the memory grew after the first fifth."""
    repeated = (sources * (pictures // len(sources) + 1))[:pictures]
    process, usages, count = psutil.Process(), [], 0

    def look(new: int) -> None:
        nonlocal count
        count += new
        if count % _EVERY == 0:
            usages.append(process.memory_info().rss)

    with tempfile.TemporaryDirectory() as path, ResultsFolder(path, predictor.classes) as folder:
        predict_all(predictor, repeated, folder, on_pictures=look)
    fifth = max(1, len(usages) // 5)
    first, last = (statistics.median(each) for each in (usages[fifth : 2 * fifth], usages[-fifth:]))
    growth = last / first - 1
    print(
        f"memory over {pictures} pictures: {first / 2**20:.0f} MB, then {last / 2**20:.0f} MB",
        end="",
    )
    print(f": {growth:+.1%} (at most {MOST_GROWTH:+.0%})")
    return growth


if __name__ == "__main__":
    sys.exit(main())
