"""Training and evaluation as ``tools/train_net.py`` runs them, on every rank."""

import logging
import os
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config.errors import blame_config
from gn_practical.training.config.unread_keys import NameUnreadKeys, record_reads
from gn_practical.training.engine.checks import check_run
from gn_practical.training.engine.setup import setup
from gn_practical.training.engine.signals import STOP
from gn_practical.training.engine.trainer import Trainer


class Task(NamedTuple):
    """What a tool trains: how its config is read and checked, and the trainer of its models."""

    setup: Callable[[Namespace], CfgNode] = setup
    check_run: Callable[..., None] = check_run
    trainer: type[Trainer] = Trainer


def main(args: Namespace, task: Task = Task()) -> dict[str, Any] | None:  # noqa: B008
    """Train, or evaluate with ``--eval-only``, as the arguments say.

    Args:
        args: what :func:`gn_practical.training.engine.argument_parser` parsed.
        task: detection and segmentation by default.

    Returns:
        The results of the evaluation on the main rank.

    Raises:
        Interrupted: if a signal stopped it; the process ends with ``EXIT_INTERRUPTED``.
    """
    with STOP.handled():
        return _run(args, task)


def _run(args: Namespace, task: Task) -> dict[str, Any] | None:
    with one_clear_error(), blame_config(args):
        cfg = task.setup(args)
    with one_clear_error(os.path.join(cfg.OUTPUT_DIR, "error.log")):
        with blame_config(args):
            task.check_run(cfg, eval_only=args.eval_only, resume=args.resume)
        results = (_evaluate if args.eval_only else _train)(cfg, args, task.trainer)
    logging.getLogger(__name__).info(
        "Done. Results, pictures, curves and checkpoints are in %s", cfg.OUTPUT_DIR
    )
    return results


def _train(cfg: Any, args: Namespace, trainer_class: type[Trainer]) -> dict[str, Any] | None:
    cfg = record_reads(cfg)
    with blame_config(args):
        trainer = trainer_class(cfg)
        trainer.register_hooks([NameUnreadKeys(cfg, args.opts)])
        trainer.resume_or_load(resume=args.resume)
    # What fails in the first step fails for the config; what fails later does not.
    with blame_config(args, applies=lambda: trainer.iter == trainer.start_iter):
        return trainer.train()


def _evaluate(cfg: Any, args: Namespace, trainer_class: type[Trainer]) -> dict[str, Any]:
    with blame_config(args):
        model = trainer_class.build_model(cfg)
        checkpointer = GroupsCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = trainer_class.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer_class.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


@contextmanager
def one_clear_error(log_path: str = "") -> Iterator[None]:
    """End the process with the message alone of an error that the user can mend.

    Such are ValueError, FloatingPointError, and what Detectron2 says of a config with an assertion
    or of a name that a registry does not know; any other shows its traceback. The traceback is kept
    in a file.

    Args:
        log_path: the file; none if empty.
    """
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(_is_for_the_log)
    try:
        yield
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        where = ""
        if log_path:
            with open(log_path, "a") as file:
                file.write(traceback.format_exc())
            where = f" (traceback: {log_path})"
        raise SystemExit(f"error: {error.args[0]}{where}") from error
    finally:
        loop.removeFilter(_is_for_the_log)


def _is_for_the_user(error: BaseException | None) -> bool:
    if not (error and error.args and str(error.args[0])):
        return False
    if isinstance(error, KeyError):
        return "registry" in str(error.args[0])
    return isinstance(error, ValueError | FloatingPointError | AssertionError)


def _is_for_the_log(record: logging.LogRecord) -> bool:
    """Keep the training loop from printing the traceback of an error that it raises again."""
    return not record.exc_info
