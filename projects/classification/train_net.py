#!/usr/bin/env python
"""Train or evaluate an image classifier, with the options of tools/train_net.py."""

import os

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from runpy import run_path
from typing import Any

_EPILOG = """
Examples, in projects/classification:

  The two-layer MLP of the paper's Table 3 on scikit-learn's digits, in seconds, without download:
    python train_net.py --config-file configs/mlp_digits.yaml

  The same on MNIST with 64 groups; data sets lie in DETECTRON2_DATASETS or are downloaded there:
    python train_net.py --config-file configs/mlp_mnist.yaml --download MODEL.PGN.NUM_GROUPS 64

  ResNet-56 on CIFAR-10 with batch norm; LN, IN, GN and PGN likewise:
    python train_net.py --config-file configs/resnet56_cifar10.yaml --download \\
        CLASSIFICATION.NORM BN

  Your own images, in my/{train,val}/<class>/ or my/<class>/:
    python train_net.py --config-file configs/resnet50_pet.yaml \\
        CLASSIFICATION.IMAGE_FOLDERS '[("my", "my")]' CLASSIFICATION.NUM_CLASSES 0 \\
        DATASETS.TRAIN '("my_train",)' DATASETS.TEST '("my_val",)'

  A backbone for the detectors, on 8 GPUs; MODEL.WEIGHTS output/.../backbone.pth takes it there:
    python train_net.py --config-file configs/resnet50_imagenet_pgn.yaml --num-gpus 8

Results go to OUTPUT_DIR: results.json (errors in percent), metrics.json, curves.png,
num_groups.json, checkpoints, TensorBoard's events, and backbone.pth of Detectron2's ResNets.
"""


def argument_parser() -> ArgumentParser:
    """Return the detectors' parser with ``--download`` and examples of classification."""
    # Read from its file, for importing the package takes seconds.
    package = find_spec("gn_practical").submodule_search_locations[0]
    shared = run_path(f"{package}/training/engine/arguments.py")["argument_parser"]
    parser = shared("Train or evaluate an image classifier.", _EPILOG)
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch torchvision's data sets that are missing to DETECTRON2_DATASETS",
    )
    return parser


if __name__ == "__main__":
    ARGS = argument_parser().parse_args()

# Before Detectron2: it keeps off the screen what PyTorch says at the sight of that.
from gn_practical import training

# isort: split
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from gn_classification import (
    AverageWeights,
    ClassificationEvaluator,
    add_classification_config,
    build_test_loader,
    build_train_loader,
    check_config,
    complete_config,
    export_backbone,
    open_datasets,
)
from gn_classification.averaging import plain

from gn_practical.training import engine
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import RunConfig, load_cfg
from gn_practical.training.evaluation import write_results


class Trainer(training.Trainer):
    """The package's ``Trainer`` with batches of labelled images and their errors.

    Args:
        cfg: a complete config, as :func:`setup` returns it.
    """

    build_train_loader = staticmethod(build_train_loader)
    build_test_loader = staticmethod(build_test_loader)

    def build_hooks(self) -> list[HookBase | None]:
        """Return the package's hooks, and the average of the weights where it is asked for."""
        built, decay = super().build_hooks(), self.cfg.CLASSIFICATION.EMA_DECAY
        self.average = None
        if decay:
            averaging = AverageWeights(self.model, decay)
            self.average = averaging.average
            self.checkpointer.add_checkpointable("ema", self.average)
            last = max(i for i, hook in enumerate(built) if isinstance(hook, EvalHook))
            evaluation = EvalHook(self.cfg.TEST.EVAL_PERIOD, self._test_average)
            built = [averaging, *built[: last + 1], evaluation, *built[last + 1 :]]
        return built

    def train(self) -> dict[str, Any] | None:
        """Train, and write the backbone for detectors beside the last checkpoint."""
        results = super().train()
        detectors = self.cfg.MODEL.BACKBONE.NAME == "build_detectron2_resnet_backbone"
        if comm.is_main_process() and detectors:
            path = os.path.join(self.cfg.OUTPUT_DIR, "backbone{}.pth")
            export_backbone(plain(self.model), self.cfg, path.format(""))
            if self.average is not None:
                export_backbone(self.average.module, self.cfg, path.format("_ema"))
        return results

    def _test_average(self) -> dict[str, Any]:
        """Evaluate the average, as tasks named "..._ema" beside the weights' in results.json."""
        averaged = self._test(self.cfg, self.average.module, None)
        averaged = {f"{task}_ema": values for task, values in averaged.items()}
        if comm.is_main_process() and averaged:
            results = {**(self._last_eval_results or {}), **averaged}
            write_results(results, os.path.join(self.cfg.OUTPUT_DIR, "results.json"))
        return averaged

    @classmethod
    def build_evaluator(
        cls, cfg: RunConfig, dataset_name: str, output_folder: str | None = None
    ) -> ClassificationEvaluator:
        """Return what counts errors."""
        return ClassificationEvaluator()


def setup(args: Namespace) -> RunConfig:
    """Read the config, open the data, set up folder and logs, and check all that is known."""
    cfg = load_cfg(
        args.config_file,
        args.opts,
        trusted=args.trust_config,
        add_config=add_classification_config,
    )
    check_config(cfg, args.eval_only)
    datasets = open_datasets(cfg, args.eval_only, args.download)
    cfg = complete_config(cfg, datasets, args.eval_only)
    engine.default_setup(cfg, args)
    engine.check_run(cfg, args.eval_only, args.resume)
    return cfg


def main(args: Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, on this rank."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = GroupsCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, evaluation=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    engine.launch(main, ARGS)
