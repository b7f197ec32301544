"""Checkpoints that know their numbers of groups, and weights in torchvision's names."""

import os
import re
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from gn_practical.layers.protocol import BindableNorm
from gn_practical.training.checkpoint import files
from gn_practical.training.checkpoint.finite_weights import require_finite_weights
from gn_practical.training.checkpoint.snapshot import Snapshot
from gn_practical.training.ranks import raise_on_all_ranks
from gn_practical.weights.safe_loading import load_pickle, load_torch

# torchvision's names of a ResNet's parts, and Detectron2's.
_TORCHVISION_NAMES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^(?:bn|gn)1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.(?:bn|gn)(\d)\.", r".conv\1.norm."),
)
FINAL = "model_final"
BEST = "model_best"  # the one checkpoint that never becomes the one to resume from


class GroupsCheckpointer(DetectionCheckpointer):
    """A ``DetectionCheckpointer`` whose checkpoints are whole, safe and know their groups.

    Saving takes a snapshot in host memory and writes it in the background; the file is there whole
    or not at all (:mod:`.files`). A save that fails, on a full disk, is logged, and training goes
    on to the next one. Resuming takes the newest checkpoint that is whole. Nothing that is read
    can run code (:mod:`gn_practical.weights.safe_loading`).

    A model that runs with other groups than it was trained with computes something else with the
    same weights: an error on resume, a warning for weights to fine-tune.

    Args:
        model: the model.
        save_dir: ``OUTPUT_DIR``.
        keep_last: how many periodic checkpoints to keep; 0 for all.
        checkpointables: what else has a state, by name, as Detectron2's.

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
        self, model: nn.Module, save_dir: str = "", *, keep_last: int = 0, **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._keep_last = keep_last
        self._snapshot = Snapshot()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copying: Future[None] | None = None
        self._writing: Future[None] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._unwritten: tuple[Any, str] = (None, "")
        self._written = ""  # path of what was written last
        self._resumed_from = ""

    def copy_beside(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``save`` return before an optimizer's parameters and state are copied.

        Its next step, which alone may change them, waits for the copy.
        """
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as Detectron2 does, with ``num_groups``: {path of the norm: groups}.

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
        state = {"model": self.model.state_dict(), "num_groups": self._num_groups(), **kwargs}
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

    def _num_groups(self) -> dict[str, int]:
        return {
            path: module.num_groups
            for path, module in self.model.named_modules()
            if isinstance(module, BindableNorm)
        }

    def _load_file(self, filename: str) -> dict[str, Any]:
        # The first two kinds are Detectron2's, which unpickles them.
        if filename.endswith(".pkl"):
            return _from_zoo(self._read(load_pickle, filename))
        if filename.endswith(".pyth"):
            return _from_pycls(self._read(load_torch, filename), filename)
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict[str, Any]:
        loaded = self._read(self._load_whole, f)
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = {"model": loaded["state_dict"]}
        weights = loaded.get("model", loaded)
        if any(re.match(r"layer1\.\d+\.conv1\.weight", key) for key in weights):
            loaded = {"model": self._from_torchvision(weights)}
        return loaded

    def _load_whole(self, path: str) -> Any:
        if path != self._resumed_from and zipfile.is_zipfile(path):
            files.check_whole(path)
        return load_torch(path)

    @staticmethod
    def _read(load: Callable[[str], Any], path: str) -> dict[str, Any]:
        """Load a file, with an error that names it if it is no state to load."""
        try:
            loaded = load(path)
            if not isinstance(loaded, dict):
                raise ValueError(f"it holds a {type(loaded).__name__}")
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(
                f"a checkpoint must be a whole file of tensors and plain containers, got {path}: "
                f"{reason}. Load another checkpoint, or save this one's state dict alone."
            ) from error
        return loaded

    def _from_torchvision(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a torchvision ResNet to this model's backbone, torchvision's or Detectron2's."""
        paths = [path for path, _ in self.model.named_modules()]
        for part, rename in (("layer1", str), ("stem", _rename)):
            found = next((path for path in paths if path.endswith(part)), None)
            if found is not None:
                prefix = found.removesuffix(part)
                self.logger.info("Renaming torchvision's ResNet to %s*", prefix)
                return {prefix + rename(key): value for key, value in weights.items()}
        return weights

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        trained = checkpoint.pop("num_groups", None)
        if trained is not None:
            self._compare(trained)
        else:
            self._warn_frozen_norms()
        return super()._load_model(checkpoint)

    def _compare(self, trained: dict[str, int]) -> None:
        present = self._num_groups()
        differences = [
            f"{path} ({trained[path]} in the checkpoint, {groups} in the model)"
            for path, groups in present.items()
            if trained.get(path, groups) != groups
        ]
        if not differences:
            return
        message = (
            "the number of groups must be what the checkpoint was trained with, got other groups "
            f"in {len(differences)} layers: {', '.join(differences[:8])}"
            f"{' ...' if len(differences) > 8 else ''}. "
        )
        if self._resumed_from:
            raise ValueError(
                message + "Resume with the MODEL.PGN keys of that run, or start another one from "
                "its weights with MODEL.WEIGHTS and a new OUTPUT_DIR."
            )
        self.logger.warning(
            "%sFine-tuning adapts to them; an evaluation without it does not.", message
        )

    def _warn_frozen_norms(self) -> None:
        frozen = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, BindableNorm)
            and module.affine
            and not module.weight.requires_grad
        ]
        if frozen:
            self.logger.warning(
                "%d PGN layers are frozen and the weights do not say with how many groups they "
                "were trained (first: %s). Where the groups differ they cannot adapt: set "
                "MODEL.BACKBONE.FREEZE_AT 0, or their groups with MODEL.PGN.LAYER_NUM_GROUPS.",
                len(frozen),
                frozen[0],
            )


def _from_zoo(data: dict[str, Any]) -> dict[str, Any]:
    """Return what a ``.pkl`` file of Detectron2's zoo, or of Caffe2's and Detectron's, holds."""
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)  # the ones for ImageNet lack this level
    weights = {key: each for key, each in blobs.items() if not key.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(data: dict[str, Any], path: str) -> dict[str, Any]:
    """Return what a ``.pyth`` file, of pycls, holds."""
    if not isinstance(data.get("model_state"), dict):
        raise ValueError(f"a .pyth file must hold 'model_state', got {path}. Rename it to .pth.")
    weights = {k: v for k, v in data["model_state"].items() if not k.endswith("batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _rename(key: str) -> str:
    for pattern, replacement in _TORCHVISION_NAMES:
        key = re.sub(pattern, replacement, key)
    return key
