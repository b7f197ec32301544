"""From sources to a folder of results: reading ahead of the model, writing behind it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from gn_practical.inference.frames import Behind, Failure, Frame, ahead, read_frames
from gn_practical.inference.predictor import Predictor
from gn_practical.inference.results import ResultsFolder
from gn_practical.inference.sources import Source


@dataclass
class Progress:
    """How far predicting has come.

    Attributes:
        done: pictures predicted.
        failed: files that could not be read, or not to their end.
        seconds: since the first picture was asked for.
        model_seconds: of these, in the model.
    """

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0


def predict_all(
    predictor: Predictor,
    sources: Sequence[Source],
    folder: ResultsFolder,
    *,
    batch_size: int = 1,
    stop: Callable[[], bool] = lambda: False,
    on_pictures: Callable[[int], None] = lambda count: None,
    on_failure: Callable[[str], None] = lambda reason: None,
) -> Progress:
    """Predict all pictures and write the results.

    A thread reads and resizes, another draws and writes, while the model works. A file that cannot
    be read is left out and counted.

    Args:
        predictor: of the model.
        sources: of the pictures.
        folder: for the results; what is in it when this returns is whole.
        batch_size: pictures that go through the model together, if they are of one size.
        stop: looked at after each batch.
        on_pictures: called with the number of pictures that were predicted.
        on_failure: called with what could not be read.

    Raises:
        ValueError: if the results cannot be written.
    """
    progress, start = Progress(), perf_counter()
    frames = ahead(read_frames(sources, predictor.load), 2 * batch_size)
    with Behind(2 * batch_size) as behind:
        for batch in _batches(frames, batch_size):
            pictures = [each for each in batch if isinstance(each, Frame)]
            for failure in (each for each in batch if isinstance(each, Failure)):
                progress.failed += 1
                on_failure(failure.reason)
            began = perf_counter()
            predictions = predictor.predict(each.loaded for each in pictures)
            progress.model_seconds += perf_counter() - began
            for picture, prediction in zip(pictures, predictions, strict=True):
                behind.do(folder.add, picture, prediction)
            progress.done += len(pictures)
            on_pictures(len(pictures))
            if stop():
                frames.close()
                break
    progress.seconds = perf_counter() - start
    return progress


def _batches(frames: Iterable[Frame | Failure], size: int) -> Iterator[list[Frame | Failure]]:
    """Yield lists of frames, so many that may go through the model together, and failures."""
    batch: list[Frame | Failure] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size or isinstance(frame, Failure) or frame.source.kind == "camera":
            yield batch
            batch = []
    if batch:
        yield batch
