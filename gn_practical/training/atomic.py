"""Files that are whole or not there, under the name that the trainer knows them by."""

from gn_practical.atomic import PathLike, refuse_overwriting, replace_file, write_json

__all__ = ["PathLike", "refuse_overwriting", "replace_file", "write_json"]
