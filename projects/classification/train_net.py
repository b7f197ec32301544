"""Train or evaluate an image classifier, with the options of train_net."""

import os

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

from gn_classification.run import argument_parser, main

from gn_practical.training.engine import launch

if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
