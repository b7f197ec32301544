"""YAML configs, read without running what they say: a tag can call any Python function."""

import os
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

_PYTHON_TAG = "tag:yaml.org,2002:python/"
# Part of the installed code, and trusted as it is: RetinaNet's base computes its anchors by a tag.
_INSTALLED_CONFIGS = os.path.realpath(os.path.join(os.path.dirname(model_zoo.__file__), "configs"))


class ConfigFileError(ValueError):
    """A config file that would run code, or is no config."""


class SafeCfgNode(CfgNode):
    """A config whose files, ``_BASE_`` and all, are read by YAML's safe loader.

    Detectron2's own files, in the folder where it is installed, may hold what they please.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "a.yaml")
        >>> with open(path, "w") as file:
        ...     _ = file.write("SEED: !!python/object/apply:os.getpid []")
        >>> SafeCfgNode.load_yaml_with_base(path)
        Traceback (most recent call last):
        gn_practical.training.config.safe_yaml.ConfigFileError: a config must hold plain values, ...
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Read a YAML file and its ``_BASE_`` as Detectron2 does.

        Args:
            filename: the file.
            allow_unsafe: let it run the code it names.

        Raises:
            ConfigFileError: naming file and line, if it would run code or holds no keys.
        """
        trusted = allow_unsafe or _is_installed(filename)
        if not trusted:
            _check_yaml(filename)
        return super().load_yaml_with_base(filename, allow_unsafe=trusted)


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
