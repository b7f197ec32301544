"""Tools as modules, for tests that call them in their own process."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load(name):
    """Return ``tools/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net = load("train_net")


def run(*arguments, tool=train_net):
    """Train or evaluate in this process, as the command line would."""
    args = tool.argument_parser().parse_args([str(word) for word in arguments])
    return tool.launch(tool.main, args)
