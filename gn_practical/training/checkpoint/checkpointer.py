"""Checkpoints that describe what they were trained with, and weights of any source."""

import os
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from gn_practical.training.checkpoint import files
from gn_practical.training.checkpoint.finite_weights import require_finite_weights
from gn_practical.training.checkpoint.snapshot import Snapshot
from gn_practical.training.ranks import raise_on_all_ranks
from gn_practical.weights import read_weights
from gn_practical.weights.describe import class_names, describe, describe_config
from gn_practical.weights.loading import Purpose, check_loaded, place
from gn_practical.weights.report import MIN_SHARE
from gn_practical.weights.safe_loading import load_torch

FINAL = "model_final"
BEST = "model_best"  # the one checkpoint that never becomes the one to resume from


class GroupsCheckpointer(DetectionCheckpointer):
    """A ``DetectionCheckpointer`` whose checkpoints are whole, safe and know their groups.

    Saving takes a snapshot in host memory and writes it in the background; the file is there whole
    or not at all (:mod:`.files`). A save that fails, on a full disk, is logged, and training goes
    on to the next one. Resuming takes the newest checkpoint that is whole. Nothing that is read
    can run code (:mod:`gn_practical.weights.safe_loading`).

    A checkpoint says what it was trained with. A model that differs, in its groups for one,
    computes something else with the same weights: an error on resume and for an evaluation, a
    warning for weights to fine-tune. What was filled of the model is said in one line.

    Args:
        cfg: the model's config, which its checkpoints describe, and what they are compared with.
        evaluation: weights are loaded to be evaluated: all must fit.
        keep_last: how many periodic checkpoints to keep; 0 for all.

    Example:
        >>> import tempfile
        >>> folder, model = tempfile.mkdtemp(), nn.Linear(2, 2)
        >>> checkpointer = GroupsCheckpointer(model, folder, keep_last=2)
        >>> checkpointer.save("model_0000009", iteration=9)
        >>> checkpointer.wait()
        >>> checkpointer.resume_or_load("", resume=True)["iteration"]
        9
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode | None = None,
        evaluation: bool = False,
        keep_last: int = 0,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._cfg, self._evaluation, self._keep_last = cfg, evaluation, keep_last
        self._of_config = describe_config(cfg) if cfg else {}
        self._snapshot = Snapshot()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copying: Future[None] | None = None
        self._writing: Future[None] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._unwritten: tuple[Any, str] = (None, "")
        self._written = ""  # path of what was written last
        self._path = self._resumed_from = ""  # what was asked for, and what was resumed from

    def copy_beside(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``save`` return before an optimizer's parameters and state are copied.

        Its next step, which alone may change them, waits for the copy.
        """
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as Detectron2 does, with a ``description`` of the model and its config.

        Returns when the state may change (see :meth:`copy_beside`). "model_best" does not become
        the last checkpoint.

        Raises:
            ValueError: for a name with a folder, or a state that could not be safely read again.
            FloatingPointError: for weights that are not finite; after :meth:`copy_beside` the
                optimizer's next step raises it, or :meth:`wait`.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = files.checkpoint_path(self.save_dir, name)
        if self._writing is None:
            files.remove_leftovers(self.save_dir)
        else:
            self._writing.exception()  # waits; it has been logged
        periodic = f"model_{kwargs.get('iteration', -1):07d}"
        if name == FINAL and self._written == files.checkpoint_path(self.save_dir, periodic):
            self._unwritten = (self._unwritten[0], path)  # the same state
            self._writing = self._writer.submit(self._write, self._written)
            return
        described = describe(self.model, self._of_config).to_dict()
        state = {"model": self.model.state_dict(), "description": described, **kwargs}
        state.update((key, each.state_dict()) for key, each in self.checkpointables.items())
        self._unwritten = (self._snapshot.take(state, self._changed_by_steps()), path)
        self._copying = self._writer.submit(self._copy)
        if self._optimizer is None:
            self._wait_for_copy()
        self._writing = self._writer.submit(self._write)

    def wait(self) -> None:
        """Wait, where training ends, for the write under way; if it failed, try once more.

        Raises:
            ValueError: if the last save could not be written.
            FloatingPointError: for weights that are not finite.
        """
        self._wait_for_copy()
        if self._writing is None or self._writing.exception() is None:
            return
        self._writing = self._writer.submit(self._write)
        if error := self._writing.exception():
            raise ValueError(
                f"the last checkpoint must be written, got {error} for {self._unwritten[1]}. "
                "Make room on its disk and add --resume: training goes on from the checkpoint "
                "before."
            ) from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest whole checkpoint, or load the weights of ``path``.

        The main rank looks for the checkpoint, all take the one that it found.

        Raises:
            ValueError: on resume, if all checkpoints are damaged, or the one taken was trained
                with other groups.
        """
        self._resumed_from = ""
        if resume:
            with raise_on_all_ranks(ValueError):
                if comm.is_main_process():
                    self._resumed_from = self.get_checkpoint_file()
            self._resumed_from = comm.all_gather(self._resumed_from)[0]
        if self._resumed_from:
            return self.load(self._resumed_from)
        return self.load(path, checkpointables=[])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights of any source that :func:`gn_practical.weights.read_weights` reads.

        Raises:
            ValueError: if the file is no whole file of weights, or fills too little of the model;
                on resume and for an evaluation, if it fills not all of it, or was trained with
                another model or input.
        """
        self._path = path
        return super().load(path, checkpointables)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return bool(self._resumed_from or self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the newest whole checkpoint, or "" if there is none, and name the damaged ones.

        Raises:
            ValueError: if there are checkpoints, and all are damaged.
        """
        if not self.save_dir:
            return ""
        newest, damaged = files.newest_whole(self.save_dir)
        listed = "; ".join(f"{path} ({reason})" for path, reason in damaged.items())
        if damaged and not newest:
            raise ValueError(
                f"--resume must find a whole checkpoint, got {len(damaged)} damaged: {listed}. "
                "Bring one of them back from a copy, or remove them to start from MODEL.WEIGHTS."
            )
        if damaged:
            self.logger.warning("Damaged: %s. Resuming from %s instead.", listed, newest)
        return newest

    def read_best(self) -> dict[str, Any]:
        """Return ``{"metric": name, "value": highest so far}`` of ``model_best.pth``, or {}."""
        path = files.checkpoint_path(self.save_dir, BEST)
        if not os.path.isfile(path):
            return {}
        try:
            files.check_whole(path)
            return load_torch(path, mmap=True).get("best", {})
        except ValueError as error:
            self.logger.warning("%s is damaged: %s. The best value starts from none.", path, error)
            return {}

    def _changed_by_steps(self) -> list[Tensor]:
        if self._optimizer is None:
            return []
        parameters = (each for group in self._optimizer.param_groups for each in group["params"])
        states = (each for state in self._optimizer.state.values() for each in state.values())
        return [each for each in (*parameters, *states) if isinstance(each, Tensor)]

    def _copy(self) -> None:
        """Complete the snapshot and look at its weights; runs in the background."""
        self._snapshot.complete()
        require_finite_weights(self._unwritten[0]["model"])

    def _wait_for_copy(self) -> None:
        if self._copying is not None:
            self._copying.result()

    def _write(self, equal: str = "") -> None:
        """Write the snapshot, make it the last, and remove the oldest; runs in the background."""
        start = time.perf_counter()
        state, path = self._unwritten
        name = os.path.basename(path)
        try:
            self._wait_for_copy()
            if equal:
                files.copy_checkpoint(equal, path)
            else:
                files.write_checkpoint(state, path)
            if name != f"{BEST}.pth":
                files.write_last(self.save_dir, name)
            files.remove_old(path, self._keep_last)
            self._written = path
        except Exception as error:
            self.logger.error(
                "%s could not be written: %s. Older checkpoints are as they were; the next save "
                "tries again.",
                path,
                error,
            )
            raise
        self.logger.info("Saved %s in %.1f s", path, time.perf_counter() - start)

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Of the formats that Detectron2 reads here, it unpickles two.
        if filename != self._resumed_from and zipfile.is_zipfile(filename):
            try:
                files.check_whole(filename)
            except ValueError as error:
                raise ValueError(
                    f"a checkpoint must be a whole file, got {filename}: {error}. Load another one."
                ) from error
        query = urlparse(self._path).query
        weights = read_weights(f"{filename}?{query}" if query else filename)
        return {**weights.beside, "weights": weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint.pop("weights")
        state = place(self.model, weights)
        incompatible = super()._load_model({"model": dict(state)})
        present = describe(self.model, self._of_config)
        if self._cfg and self._evaluation:
            present = replace(present, class_names=class_names(self._cfg.DATASETS.TEST))
        purpose = self._purpose()
        check_loaded(self._path, weights, state, self.model, incompatible, present, purpose)
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Say nothing: all of it has been said in one line."""

    def _purpose(self) -> Purpose:
        keys = self._cfg or CfgNode({"MODEL": {}, "TEST": {}})
        name = "resuming" if self._resumed_from else "training"
        return Purpose(
            "evaluation" if self._evaluation else name,
            keys.MODEL.get("WEIGHTS_MIN_SHARE", MIN_SHARE),
            self._evaluation and keys.TEST.get("ALLOW_DIFFERENCES", False),
        )
