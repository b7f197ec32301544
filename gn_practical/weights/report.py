"""What of a model was filled from a file, and what of the file was used."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Size, Tensor, nn

from gn_practical.weights.describe import trunk_of

MIN_SHARE = 0.9  # of a backbone's parameters
_NAMED = 3
# What no training learns, or every model makes for itself.
_IGNORED = ("num_batches_tracked", "pixel_mean", "pixel_std", "cell_anchors")


@dataclass(frozen=True)
class Filling:
    """What of a model was filled from a file, and what of the file was used.

    Attributes:
        model_share: of the model's values, by their count.
        trunk: path of the backbone, "" where the whole model is judged.
        trunk_share: of its values.
        file_share: of the file's values that were used.
        missing: names in the model that the file does not fill.
        unused: names in the file that the model has not.
        shapes: {name: (shape in the file, shape in the model)} where these differ.
    """

    model_share: float
    trunk: str
    trunk_share: float
    file_share: float
    missing: list[str]
    unused: list[str]
    shapes: dict[str, tuple[Size, Size]]

    def __str__(self) -> str:
        """Say it in one line."""
        text = f"{self.shares_text()}."
        if self.shapes:
            text += f" Of another shape: {self.shapes_text()}."
        if self.missing:
            text += f" Not in the file: {_by_part(self.missing)}."
        if self.unused:
            text += f" Not used: {_by_part(self.unused)}."
        return text

    def shares_text(self) -> str:
        """Say what share of model, backbone and file took part."""
        trunk = f" ({self.trunk} {_percent(self.trunk_share)})" if self.trunk else ""
        return (
            f"{_percent(self.model_share)} of the model{trunk} filled, "
            f"{_percent(self.file_share)} of the file used"
        )

    def shapes_text(self) -> str:
        """Name tensors of another shape, with both."""
        named = [
            f"{name} ({_shape(old)} in the file, {_shape(new)} in the model)"
            for name, (old, new) in list(self.shapes.items())[:_NAMED]
        ]
        return ", ".join(named) + _more(self.shapes)

    def mismatch_text(self) -> str:
        """Name a few tensors of the backbone that are not filled, with the nearest of the file."""
        named = []
        missing = [name for name in self.missing if name.startswith(self.trunk)]
        for name in missing[:_NAMED]:
            near = difflib.get_close_matches(name, self.unused, n=1, cutoff=0.0)
            named.append(f"{name} (nearest in the file: {near[0]})" if near else name)
        said = [f"Of another shape: {self.shapes_text()}."] if self.shapes else []
        said += [f"Not in the file: {', '.join(named)}{_more(missing)}."] if named else []
        return " ".join(said)


def report_filling(
    model: nn.Module,
    file: Mapping[str, Tensor],
    missing: Sequence[str],
    unused: Sequence[str],
) -> Filling:
    """Count what was filled.

    Args:
        model: after the file was loaded.
        file: its tensors, by the names of the model where it has them.
        missing: names that it did not fill, those of another shape among them.
        unused: names that the model has not.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
        >>> file = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4, bias=False)).state_dict()
        >>> print(report_filling(model, file, ["1.weight"], []))
        66.7 % of the model filled, 50.0 % of the file used. Of another shape: 1.weight (4×3 in \
the file, 2×3 in the model).
    """
    state = model.state_dict(keep_vars=True)
    state = {k: v for k, v in state.items() if isinstance(v, Tensor) and _counts(k)}
    not_filled = set(missing)
    # A tensor may have two names, of which the file need have one.
    filled = {id(tensor) for name, tensor in state.items() if name not in not_filled}
    missing = [name for name in missing if name in state and id(state[name]) not in filled]
    reshaped = {n: other for n in missing if (other := _of_another_shape(n, state[n], file))}
    trunk = trunk_of(state)

    def share(prefix: str) -> float:
        sizes = {id(v): v.numel() for k, v in state.items() if k.startswith(prefix)}
        return sum(n for i, n in sizes.items() if i in filled) / max(1, sum(sizes.values()))

    sizes = {name: tensor.numel() for name, tensor in file.items() if _counts(name)}
    used = sum(n for name, n in sizes.items() if name in state and name not in not_filled)
    return Filling(
        model_share=share(""),
        trunk=trunk,
        trunk_share=share(trunk and f"{trunk}."),
        file_share=used / max(1, sum(sizes.values())),
        missing=[name for name in missing if name not in reshaped],
        unused=[n for n in unused if _counts(n) and n not in reshaped.values()],
        shapes={n: (file[other].shape, state[n].shape) for n, other in reshaped.items()},
    )


def _of_another_shape(name: str, tensor: Tensor, file: Mapping[str, Tensor]) -> str | None:
    """Return the file's tensor of a name and another shape.

    Detectron2's matching of suffixes leaves its name as it is in the file.
    """
    ends = (name.split(".", cut)[-1] for cut in range(name.count(".") + 1))
    return next((e for e in ends if e in file and file[e].shape != tensor.shape), None)


def _counts(name: str) -> bool:
    return not any(part in name for part in _IGNORED)


def _by_part(names: Sequence[str]) -> str:
    """Name the parts that tensors belong to, the two outermost, with their numbers."""
    parts = Counter(".".join(name.split(".")[:-1][:2]) or name for name in names)
    named = [f"{part} ({count})" for part, count in parts.most_common(2 * _NAMED)]
    more = len(parts) - len(named)
    return ", ".join(named) + (f" and {more} other parts" if more else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 1 else "100 %"


def _shape(shape: Size) -> str:
    return "×".join(map(str, shape)) or "1"


def _more(items: Sequence | Mapping) -> str:
    return f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
