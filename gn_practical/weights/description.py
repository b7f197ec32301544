"""What a checkpoint says about itself, or what its source is known to need."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Standardization:
    """A definition of weight standardization: what each filter is divided by.

    ``(W - mean) / (std + eps)``, or ``(W - mean) / sqrt(std**2 + eps)`` with ``eps_under_root``;
    ``biased`` divides the sum of squares by n, otherwise by n - 1.
    """

    eps: float = 1e-5
    eps_under_root: bool = False
    biased: bool = False

    def __str__(self) -> str:
        std = "biased" if self.biased else "unbiased"
        if self.eps_under_root:
            return f"(W - mean) / sqrt(var + {self.eps:g}), {std} var"
        return f"(W - mean) / (std + {self.eps:g}), {std} std"


@dataclass(frozen=True)
class Description:
    """What weights were trained with; None is "not known", which nothing is compared with.

    Attributes:
        source: where the weights come from, in words.
        input_format: order of the picture's channels, "RGB" or "BGR".
        pixel_mean: subtracted from each channel, in 0 to 255 and in the order of ``input_format``.
        pixel_std: divides each channel, likewise.
        stride_in_1x1: whether bottlenecks with a stride have it in their first convolution.
        pooled_shortcuts: whether shortcuts with a stride average 2x2 pixels before they convolve.
        weight_standardization: whether the convolutions standardize their weights.
        standardization: how they do.
        standardized_layers: paths of the convolutions that do, where known.
        num_groups: of all group norms, or {path of the norm: groups}.
        norm: kind of the backbone's norms, "GN" or "BN" (frozen ones too).
        norm_eps: epsilon of the norms.
        class_names: by "thing" and "stuff", in the order of the model's outputs.
        class_ids: the data set's ids of these classes, likewise.
        class_colors: (red, green, blue) that the data set draws them in, likewise.
        resize: ``INPUT``'s keys of the size at test time.
        rule: rule that the groups come from.
        versions: {package: version} of what trained them.
        config: the whole config as YAML.
        lazy_config: the Python config as YAML, for a run of tools/lazyconfig_train_net.py.
    """

    source: str = "an unknown source"
    input_format: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    stride_in_1x1: bool | None = None
    pooled_shortcuts: bool | None = None
    weight_standardization: bool | None = None
    standardization: Standardization | None = None
    standardized_layers: list[str] | None = None
    num_groups: int | dict[str, int] | None = None
    norm: str | None = None
    norm_eps: float | None = None
    class_names: dict[str, list[str]] | None = None
    class_ids: dict[str, list[int]] | None = None
    class_colors: dict[str, list[list[int]]] | None = None
    resize: dict[str, Any] | None = None
    rule: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    lazy_config: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, as a checkpoint keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Description":
        """Return the description that :meth:`to_dict` made; keys of later versions are dropped."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        if isinstance(known.get("standardization"), dict):
            known["standardization"] = Standardization(**known["standardization"])
        for key in ("pixel_mean", "pixel_std"):
            if known.get(key) is not None:
                known[key] = tuple(known[key])
        return cls(**known)

    def with_values(self, values: dict[str, Any]) -> "Description":
        """Return this description with what a user knows.

        Args:
            values: {field, or "standardization.eps" and its like: value}.

        Raises:
            ValueError: for another key.

        Example:
            >>> known = Description().with_values({"standardization.eps": 1e-6})
            >>> known.standardization.eps
            1e-06
        """
        inner = {key.partition(".")[2]: each for key, each in values.items() if "." in key}
        outer = {key: each for key, each in values.items() if "." not in key}
        known = {f"standardization.{key}" for key in Standardization.__dataclass_fields__}
        unknown = sorted(set(values) - known - set(self.__dataclass_fields__))
        if unknown:
            names = ", ".join([*self.__dataclass_fields__, *sorted(known)])
            raise ValueError(
                f"what is described must be one of {names}, got {', '.join(unknown)}. Correct it."
            )
        if inner:
            outer["standardization"] = {
                **asdict(self.standardization or Standardization()),
                **inner,
            }
        return Description.from_dict({**self.to_dict(), **outer})
