"""The one error that a data set raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

_MARK = "DatasetError: "


class DatasetError(ValueError):
    """A data set that cannot be used: what is wrong with which file, and what to do.

    PyTorch raises a worker's exception again in the main process as ``type(error)(<text of the
    whole traceback>)``; of such a text only the message itself, which follows the last
    ``DatasetError: ``, is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(str(message).rpartition(_MARK)[2].strip())


@contextmanager
def writing(path: str | PathLike) -> Iterator[None]:
    """Make a `DatasetError` of what goes wrong in writing a file, or of what forbids it."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{path} must be a file that can be written, got: {error}. Choose another."
        ) from None
    except ValueError as error:
        raise DatasetError(str(error)) from None
