"""Train or evaluate a detector or panoptic segmenter, as Detectron2's own train_net does."""

from gn_practical.training.engine import argument_parser, launch, main

if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
