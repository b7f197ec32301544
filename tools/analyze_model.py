#!/usr/bin/env python
"""Print parameters, operations and activations of a model by module; see --help."""

import argparse
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn


TASKS = ("parameter", "flop", "activation", "structure")
_DATA_INPUTS = 100  # of --use-data, as in Detectron2's tool

_EPILOG = """
Examples:

  A config's model, without data or weights:
    python tools/analyze_model.py --config-file configs/pfpn_pgn.yaml --tasks parameter flop
  A trained one on its own validation images:
    python tools/analyze_model.py --checkpoint output/quickstart/model_final.pth \\
        --tasks flop activation --use-data --num-inputs 20
  A Python config:
    python tools/analyze_model.py --config-file mask_rcnn.py --tasks flop model.backbone.norm=PGN

FLOPs and activations depend on the boxes that are found. Without --use-data the image is random and
weights are 0, and as many detections are kept as the config allows: the most that it costs.
More in docs/look.md.
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Count parameters, operations (FLOPs, a multiply-add is one) and activations "
        "of every module, as Detectron2's analyze_model does, and what norms have of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="a YAML file, or a Python config (which is run)")
    add("--checkpoint", metavar="FILE", help="one of a training here, with its config")
    what = f"{', '.join(TASKS)} (default: parameter flop)"
    add("--tasks", nargs="+", default=["parameter", "flop"], metavar="TASK", help=what)
    add("--image-size", nargs=2, type=int, metavar=("H", "W"), help="of the random image")
    add("--use-data", action="store_true", help="images of DATASETS.TEST, and MODEL.WEIGHTS")
    number = f"(default: 1, with --use-data {_DATA_INPUTS})"
    add("-n", "--num-inputs", type=int, metavar="N", help=f"images to count on {number}")
    add("--max-depth", type=int, default=3, help="levels of modules in the table (default: 3)")
    add("--output", metavar="FILE", help="all modules with all digits, .csv, .json or .md")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    args.tasks, swallowed = split_tasks(args.tasks)
    args.opts = swallowed + args.opts
    if unknown := [task for task in args.tasks if task not in TASKS] or not args.tasks:
        parser.error(f"--tasks must be of {', '.join(TASKS)}, got {unknown}")
    if not args.config_file and not args.checkpoint:
        parser.error("give --config-file or --checkpoint")
    if (args.config_file or "").endswith(".py") and args.checkpoint:
        parser.error("a Python config and --checkpoint exclude each other: override train")
    if min(args.image_size or [1]) < 1 or (args.num_inputs or 1) < 1 or args.max_depth < 0:
        parser.error("--image-size and --num-inputs must be at least 1, --max-depth at least 0")
    if args.use_data and args.image_size:
        parser.error("--image-size is of the random image, --use-data takes others")
    if args.output and not args.output.endswith((".csv", ".json", ".md")):
        parser.error(f"--output must end in .csv, .json or .md, got {args.output}")
    args.num_inputs = args.num_inputs or (_DATA_INPUTS if args.use_data else 1)
    return args


def split_tasks(words: list[str]) -> tuple[list[str], list[str]]:
    """Part the tasks from overrides behind them, which have a dot or capitals."""
    first = next((i for i, w in enumerate(words) if "." in w or w.isupper()), len(words))
    return words[:first], words[first:]


def read_config(args: argparse.Namespace) -> Any:
    """Read a YAML config, a Python config or the one in a checkpoint."""
    from gn_practical.training.config import load_cfg
    from gn_practical.weights.stored import merge_stored_config

    if (args.config_file or "").endswith(".py"):
        from detectron2.config import LazyConfig

        return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    if args.config_file:
        weights = ["MODEL.WEIGHTS", args.checkpoint] if args.checkpoint else []
        return load_cfg(args.config_file, [*opts, *weights, *args.opts])
    opts += ["MODEL.WEIGHTS", args.checkpoint, *args.opts]
    return load_cfg("", opts, add_config=lambda cfg: merge_stored_config(cfg, args.checkpoint))


def build(cfg: Any, args: argparse.Namespace) -> "nn.Module":
    """Build the model: without memory, where nothing is run."""
    import torch
    from detectron2.config import CfgNode, instantiate

    from gn_practical import bind_group_norms, build_model
    from gn_practical.layers.protocol import BindableNorm

    runs = {"flop", "activation"} & set(args.tasks)
    torch.manual_seed(0)
    if isinstance(cfg, CfgNode):
        with torch.device(cfg.MODEL.DEVICE if runs else "meta"):
            return build_model(cfg if runs else on_meta(cfg)).eval()
    model = instantiate(cfg.model)
    if any(isinstance(module, BindableNorm) for module in model.modules()):
        bind_group_norms(model)
    return model.eval()


def on_meta(cfg: "CfgNode") -> "CfgNode":
    """Return the config for a model without memory."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    return cfg


def make_inputs(cfg: Any, model: "nn.Module", args: argparse.Namespace) -> list[list[dict]]:
    """Return inputs of one image each: random ones, or those of the test set."""
    from itertools import islice

    import torch
    from detectron2.config import CfgNode, instantiate

    if not args.use_data:
        from gn_practical.analysis.cost import keep_most_detections

        keep_most_detections(model)
        size = args.image_size or default_size(cfg)
        images = [torch.rand(3, *size) * 255 for _ in range(args.num_inputs)]
        return [[{"image": image}] for image in images]
    if not isinstance(cfg, CfgNode):
        return list(islice(instantiate(cfg.dataloader.test), args.num_inputs))
    from gn_practical.training.checkpoint import GroupsCheckpointer
    from gn_practical.training.engine import Trainer
    from gn_practical.training.validation import check_datasets

    check_datasets(cfg, eval_only=True)
    GroupsCheckpointer(model, cfg=cfg, evaluation=True).load(cfg.MODEL.WEIGHTS)
    return list(islice(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]), args.num_inputs))


def default_size(cfg: Any) -> tuple[int, int]:
    """Return height and width of a 4:3 picture as it is resized for testing."""
    from detectron2.config import CfgNode

    short, most = 800, 1333
    if isinstance(cfg, CfgNode):
        short, most = cfg.INPUT.MIN_SIZE_TEST or 800, cfg.INPUT.MAX_SIZE_TEST
    return min(short, round(most * 3 / 4)), min(round(short * 4 / 3), most)


def count(model: "nn.Module", inputs: list[list[dict]], args: argparse.Namespace) -> dict:
    """Count what the tasks ask for on every input."""
    from tqdm import tqdm

    from gn_practical.analysis.cost import Count

    found: dict[str, list[Count]] = {}
    for task, what in (("flop", "flops"), ("activation", "activations")):
        if task in args.tasks:
            steps = tqdm(inputs, f"counting {what}", leave=False, disable=None)
            try:
                found[what] = [Count(model, one_input, what) for one_input in steps]
            except (RuntimeError, TypeError, KeyError) as error:  # of whatever model it is
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ValueError(
                    f"the model must run on one image and be traced, got {reason}. Try another "
                    "--image-size, or --use-data."
                ) from error
    return found


def analyze(args: argparse.Namespace) -> None:
    """Build, count, print."""
    from gn_practical.analysis.cost import cost_table
    from gn_practical.analysis.cost_report import Total, format_costs, norm_lines, omission_lines

    cfg = read_config(args)
    model = build(cfg, args)
    counts = {}
    if {"flop", "activation"} & set(args.tasks):
        inputs = make_inputs(cfg, model, args)
        counts = count(model, inputs, args)
        what = "images of the test set" if args.use_data else "random, most detections allowed"
        sizes = sorted({"x".join(map(str, each[0]["image"].shape[1:])) for each in inputs})
        print(f"Images: {len(inputs)}, {', '.join(sizes[:5])} pixels ({what}).")
    if "structure" in args.tasks:
        print(model)
    table = cost_table(model, **counts)
    if set(args.tasks) != {"structure"}:
        print(format_costs(table, args.max_depth))
        for line in norm_lines(model):
            print(line)
    for name, each in counts.items():
        print(Total({"flops": "FLOPs", "activations": "Activations"}[name], each))
    for line in omission_lines(counts["flops"][0]) if "flops" in counts else ():
        print(line)
    if args.output:
        write(table, args.output)


def write(table: list, path: str) -> None:
    """Write all rows with all digits."""
    from pathlib import Path

    from gn_practical.analysis import format_rows

    rows = [{k: v for k, v in row._asdict().items() if v is not None} for row in table]
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(path).write_text(format_rows(rows, path.rpartition(".")[2]), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output must be a file that can be written, got {error}.") from error


def main() -> int:
    """Run, ending with one clear error that says what to change."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.engine.logs import quiet_torch
    from gn_practical.training.engine.run import one_clear_error

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    quiet_torch()
    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        try:
            analyze(args)
            return 0
        except KeyboardInterrupt:
            return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
