"""Training and evaluation as ``tools/train_net.py`` runs them, on every rank."""

import logging
import os
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from gn_practical.engine.checkpoint import GroupsCheckpointer
from gn_practical.engine.checks import check_run
from gn_practical.engine.setup import setup
from gn_practical.engine.trainer import Trainer


def main(args: Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, as the arguments say.

    Args:
        args: what :func:`gn_practical.engine.argument_parser` parsed.

    Returns:
        The results of the evaluation on the main rank.
    """
    with one_clear_error():
        cfg = setup(args)
    with one_clear_error(os.path.join(cfg.OUTPUT_DIR, "error.log")):
        check_run(cfg, eval_only=args.eval_only, resume=args.resume)
        results = _evaluate(cfg, args) if args.eval_only else _train(cfg, args)
    logging.getLogger(__name__).info(
        "Done. Results, pictures, curves and checkpoints are in %s", cfg.OUTPUT_DIR
    )
    return results


def _train(cfg: Any, args: Namespace) -> dict[str, Any] | None:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _evaluate(cfg: Any, args: Namespace) -> dict[str, Any]:
    model = Trainer.build_model(cfg)
    checkpointer = GroupsCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
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
    """Keep the training loop from printing the traceback of an error that is told anyway."""
    return not (record.exc_info and _is_for_the_user(record.exc_info[1]))
