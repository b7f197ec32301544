"""Train or evaluate an image classifier, with the options of train_net."""

from gn_classification.run import argument_parser, main

from gn_practical.training.engine import launch

if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
