"""What all ranks of a distributed run have to learn together."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm


@contextmanager
def raise_on_all_ranks(kind: type[Exception]) -> Iterator[None]:
    """Raise on every rank, at the end of the block, what the block raised on one of them.

    A barrier that also tells: a rank that raised alone would leave the others waiting. Every rank
    must enter and leave the block; inside it, one may work alone.

    Args:
        kind: of the errors that are passed on, made again from their text on the other ranks;
            any other error ends its own rank at once.

    Raises:
        kind: what this rank raised, or else the first that another one did.
    """
    error = None
    try:
        yield
    except kind as raised:
        error = raised
    texts = comm.all_gather(None if error is None else str(error))
    if error is not None:
        raise error
    for text in texts:
        if text is not None:
            raise kind(text)
