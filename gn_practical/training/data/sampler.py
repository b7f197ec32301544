"""The order of the training samples, as a stream that can be entered anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from gn_practical.training.detectron2_internals import stream_of_all_ranks

Sample = tuple[int, int]  # position in the stream, index in the data set


@dataclass
class BatchStream:
    """The endless batches of one rank, and where in the samples they have come to.

    All ranks read one stream of samples, that of a Detectron2 sampler, and fill the same batches
    from it, of one aspect ratio each where ``groups`` says so. Each takes its own: of ``num_ranks``
    batches in turn the one numbered ``rank``. So what was read and what still waits for its batch
    to be full is the same on every rank, and any number of ranks can go on from it.

    Differences from Detectron2: there each rank groups a stream of its own, after decoding.

    Args:
        sampler: gives the indices; its own rank is not used.
        groups: for each index of the data set the number of its aspect-ratio group, 0 or 1.
        position: of the next sample to be read; iterating moves it and `pending`.
        pending: for each group what was read and is in no batch yet.
    """

    sampler: TrainingSampler | RepeatFactorTrainingSampler
    batch_size: int
    groups: Sequence[int]
    rank: int = 0
    num_ranks: int = 1
    position: int = 0
    pending: list[list[Sample]] = field(default_factory=lambda: [[], []])

    def __iter__(self) -> Iterator[list[Sample]]:
        indices = islice(stream_of_all_ranks(self.sampler), self.position, None)
        while True:
            yield [self._next_batch(indices) for _ in range(self.num_ranks)][self.rank]

    def _next_batch(self, indices: Iterator[int]) -> list[Sample]:
        while True:
            for bucket in self.pending:
                if len(bucket) >= self.batch_size:
                    batch = bucket[: self.batch_size]
                    del bucket[: self.batch_size]
                    return batch
            self._put((self.position, next(indices)))
            self.position += 1

    def _put(self, sample: Sample) -> None:
        self.pending[self.groups[sample[1]]].append(sample)

    def copy(self) -> "BatchStream":
        """Return a stream at the same place that moves by itself."""
        return BatchStream(**{**vars(self), "pending": [list(bucket) for bucket in self.pending]})

    def state_dict(self) -> dict[str, int | list[list[int]]]:
        """Return the place in the stream; the same on every rank."""
        waiting = sorted(sample for bucket in self.pending for sample in bucket)
        return {"position": self.position, "pending": [list(sample) for sample in waiting]}

    def load_state_dict(self, state: dict[str, int | list[list[int]]]) -> None:
        """Go to a place, which another number of ranks or another batch size may have saved."""
        self.position = state["position"]
        self.pending = [[], []]
        for position, index in state["pending"]:
            self._put((position, index))
