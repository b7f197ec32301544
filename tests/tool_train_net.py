"""``tools/train_net.py`` as a module, for tests that call it in their own process."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("train_net", ROOT / "tools/train_net.py")
sys.modules["train_net"] = train_net = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_net)


def run(*arguments):
    """Train or evaluate in this process, as the command line would."""
    args = train_net.argument_parser().parse_args([str(word) for word in arguments])
    return train_net.launch(train_net.main, args)
