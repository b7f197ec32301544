"""Checkpoints that know their numbers of groups, and weights in torchvision's names."""

import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from gn_practical.layers import PracticalGroupNorm

# torchvision's names of a ResNet's parts, and Detectron2's.
_TORCHVISION_NAMES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^(?:bn|gn)1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.(?:bn|gn)(\d)\.", r".conv\1.norm."),
)


class GroupsCheckpointer(DetectionCheckpointer):
    """A ``DetectionCheckpointer`` that saves each norm's number of groups and compares at loading.

    A model that runs with other groups than it was trained with computes something else with the
    same weights. So a difference is an error on resume, and a warning that names the layers for
    weights to fine-tune. Besides the formats of Detectron2 it reads files with a top-level
    ``state_dict`` and ResNets in torchvision's names.
    """

    _resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as Detectron2 does, with ``num_groups``: {path of the norm: groups}."""
        super().save(name, num_groups=self._num_groups(), **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint, or load the weights of ``path``.

        Raises:
            ValueError: on resume, if the checkpoint was trained with other groups.
        """
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def _num_groups(self) -> dict[str, int]:
        return {
            path: module.num_groups
            for path, module in self.model.named_modules()
            if isinstance(module, PracticalGroupNorm)
        }

    def _torch_load(self, f: str) -> dict[str, Any]:
        try:
            loaded = super()._torch_load(f)
        except Exception as error:  # of many kinds: a cut zip, a pickle that is refused, ...
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"a checkpoint must be a whole file of tensors and plain containers, got {f}: "
                f"{reason} Load another checkpoint, or save this one's state dict alone."
            ) from error
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = {"model": loaded["state_dict"]}
        weights = loaded.get("model", loaded)
        if any(re.match(r"layer1\.\d+\.conv1\.weight", key) for key in weights):
            loaded = {"model": self._from_torchvision(weights)}
        return loaded

    def _from_torchvision(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a torchvision ResNet to the backbone of this model."""
        stems = (name for name, _ in self.model.named_modules() if name.endswith("stem"))
        prefix = next(stems, "stem")[: -len("stem")]
        self.logger.info("Renaming torchvision's ResNet to %s*", prefix)
        return {prefix + _rename(key): value for key, value in weights.items()}

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
        if self._resuming:
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
            if isinstance(module, PracticalGroupNorm)
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


def _rename(key: str) -> str:
    for pattern, replacement in _TORCHVISION_NAMES:
        key = re.sub(pattern, replacement, key)
    return key
