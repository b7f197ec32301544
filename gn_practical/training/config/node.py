"""``RunConfig``: a config that is read without running code, and knows its overrides."""

import os
from collections.abc import Sequence
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

_PYTHON_TAG = "tag:yaml.org,2002:python/"
# Part of the installed code, and trusted as it is: RetinaNet's base computes its anchors by a tag.
_INSTALLED_CONFIGS = os.path.realpath(os.path.join(os.path.dirname(model_zoo.__file__), "configs"))
# Read before the recording starts, or by the evaluation, which comes later.
_READ_ELSEWHERE = ("SEED", "CUDNN_BENCHMARK", "OUTPUT_DIR", "VERSION", "DATASETS.", "TEST.")


class ConfigFileError(ValueError):
    """A config file that would run code, or is no config."""


class _Reads(set):
    """Keys of a node that were read, one set for the node and all of its clones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Reads":
        return self


class RunConfig(CfgNode):
    """A config whose files are read by YAML's safe loader, and which notes what is read of it.

    Detectron2's own files, in the folder where it is installed, may hold what they please.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = RunConfig(get_cfg())
        >>> cfg.merge_from_list(["SOLVER.MAX_ITER", "9", "SOLVER.GAMMA", "0.2"])
        >>> cfg.overridden, cfg.recipe.SOLVER.MAX_ITER
        (['SOLVER.MAX_ITER', 'SOLVER.GAMMA'], 40000)
        >>> cfg.forget_reads()
        >>> cfg.clone().SOLVER.MAX_ITER
        9
        >>> cfg.unread_overrides()
        ['SOLVER.GAMMA']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The keys of the command line, and the config before them. Beside the keys, where yacs
        # keeps its own.
        self.__dict__.update(overridden=[], recipe=None, reads=_Reads())

    def __getitem__(self, name: str) -> Any:
        self.__dict__["reads"].add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, as a dict does."""
        self.__dict__["reads"].add(name)
        return super().get(name, default)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge keys and values in turn; ``recipe`` is the config without them."""
        keys, recipe = list(override_pairs(cfg_list)), self.recipe or self.clone()
        super().merge_from_list(cfg_list)
        self.__dict__.update(overridden=[*self.overridden, *keys], recipe=recipe)

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Read a YAML file and its ``_BASE_`` as Detectron2 does.

        Raises:
            ConfigFileError: naming file and line, if it holds no keys, or would run code and is not
                ``allow_unsafe``.
        """
        trusted = allow_unsafe or _is_installed(filename)
        if not trusted:
            _check_yaml(filename)
        return super().load_yaml_with_base(filename, allow_unsafe=trusted)

    def forget_reads(self) -> None:
        """Begin to note what is read, of this config and of the clones that it has."""
        self.__dict__["reads"].clear()
        for child in self.values():
            if isinstance(child, RunConfig):
                child.forget_reads()

    def unread_overrides(self) -> list[str]:
        """Return the overridden keys that nothing has read, without those read elsewhere."""
        return [
            key
            for key in self.overridden
            if not (key.startswith(_READ_ELSEWHERE) or "_TEST" in key or self._was_read(key))
        ]

    def _was_read(self, key: str) -> bool:
        folder, _, name = key.rpartition(".")
        node = look_up(self, folder) if folder else self
        return not isinstance(node, RunConfig) or name in node.__dict__["reads"]


def look_up(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key, None if there is no such key; it does not count as read."""
    for part in key.split("."):
        cfg = dict.get(cfg, part) if isinstance(cfg, CfgNode) else None
    return cfg


def override_pairs(opts: Sequence[Any]) -> dict[Any, Any]:
    """Return {KEY: VALUE} of words in turn; a ValueError if a key or value is left over.

    Example:
        >>> override_pairs(["SEED", "1"])
        {'SEED': '1'}
    """
    if len(opts) % 2:
        raise ValueError(
            f"overrides must be pairs of KEY VALUE, got {len(opts)} words ending in {opts[-1]!r}. "
            "Quote values that hold spaces."
        )
    return dict(zip(opts[::2], opts[1::2], strict=True))


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part an option's words from the overrides behind it, which begin with a word in capitals.

    Example:
        >>> split_overrides(["exact", "32", "SEED", "1"])
        (['exact', '32'], ['SEED', '1'])
    """
    first = next((index for index, word in enumerate(words) if word.isupper()), len(words))
    return list(words[:first]), list(words[first:])


def _is_installed(filename: str) -> bool:
    path = os.path.realpath(os.path.expanduser(filename))
    return path.startswith(_INSTALLED_CONFIGS + os.sep)


def _check_yaml(filename: str) -> None:
    with PathManager.open(filename, "r") as file:
        try:
            loaded = yaml.safe_load(file)
        except yaml.constructor.ConstructorError as error:
            if _PYTHON_TAG not in str(error.problem):
                raise
            raise ConfigFileError(
                f"a config must hold plain values, got a Python tag in {filename}, "
                f"line {error.problem_mark.line + 1}, which would run code: "
                f"{str(error.problem).split(_PYTHON_TAG)[-1].rstrip(chr(39))}. Write the value "
                "itself, or add --trust-config if you have read the file and trust it."
            ) from None
    if not isinstance(loaded, dict):
        raise ConfigFileError(
            f"a config must hold keys and values, got {type(loaded).__name__} in {filename}. "
            "Write KEY: value lines."
        )
