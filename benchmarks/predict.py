"""What reading, drawing and writing add to the model's own time in predict.py; and its memory.

The model alone, on pictures that are read and resized already, and all of predicting, from files to
a folder of results, take turns in one process on the same pictures. The figure is the ratio of the
medians of their turns. Then many pictures are predicted, and the resident memory is watched.

Examples:
  python benchmarks/predict.py --weights output/quickstart/model_final.pth
  python benchmarks/predict.py --weights output/quickstart/model_final.pth --threads 2 --turns 9
"""

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from time import perf_counter

os.environ.setdefault("GOMP_SPINCOUNT", "50000")

import psutil
import torch

from gn_practical.inference import Predictor
from gn_practical.inference.results import ResultsFolder
from gn_practical.inference.run import predict_all
from gn_practical.inference.sources import Source, find_sources

MOST_OVERHEAD = 0.30
MOST_GROWTH = 0.02  # of resident memory, between the second fifth and the last
_EVERY = 20  # pictures between two looks at the memory


def main() -> int:
    """Measure and print; return 1 if a figure is above its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="output/quickstart/model_final.pth")
    parser.add_argument("--images", default="datasets/scenes/images/val")
    parser.add_argument("--pictures", type=int, default=100, help="of a turn (default: 100)")
    parser.add_argument("--turns", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--memory", type=int, default=1000, help="pictures (default: 1000)")
    parser.add_argument("--threads", type=int, default=1, help="of the model (default: 1)")
    parser.add_argument("--device", help="by default CUDA where there is a GPU")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
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
    alone, whole = [], []
    for turn in range(turns):
        for part in (alone, whole) if turn % 2 else (whole, alone):
            seconds = (
                all_of_it(predictor, sources) if part is whole else model_alone(predictor, loaded)
            )
            part.append(seconds / len(sources))
    medians = [statistics.median(each) for each in (alone, whole)]
    for name, each in (("the model alone", alone), ("all of it", whole)):
        times = ", ".join(f"{1e3 * seconds:.1f}" for seconds in each)
        print(f"{name:16}{1e3 * statistics.median(each):8.1f} ms a picture ({times})")
    overhead = medians[1] / medians[0] - 1
    print(f"on top: {overhead:.1%} (at most {MOST_OVERHEAD:.0%})")
    return overhead


def model_alone(predictor: Predictor, loaded: list) -> float:
    """Return the seconds that the model takes, one picture at a time."""
    start = perf_counter()
    for each in loaded:
        predictor.predict([each])
    return perf_counter() - start


def all_of_it(predictor: Predictor, sources: list[Source]) -> float:
    """Return the seconds from files to results."""
    with tempfile.TemporaryDirectory() as path:
        start = perf_counter()
        with ResultsFolder(path, predictor.classes) as folder:
            predict_all(predictor, sources, folder)
        return perf_counter() - start


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
