"""What a run is about to do, in a few lines: data, model, groups, schedule, and where to look."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from gn_practical.layers import PracticalGroupNorm
from gn_practical.training.engine.logs import log_file


def describe_run(cfg: CfgNode, model: nn.Module, train_loader: Iterable[Any]) -> str:
    """Describe a training for the first screen.

    Args:
        cfg: of the run, as scaled to its number of ranks.
        model: as built.
        train_loader: of the training data.
    """
    images = len(train_loader.dataset) if hasattr(train_loader, "dataset") else 0
    lines = {
        "Data": _data(cfg, images),
        "Model": _model(cfg, model),
        "Groups": _groups(model),
        "Schedule": _schedule(cfg, images),
        "Results": f"{cfg.OUTPUT_DIR}; environment, config and tables: {log_file() or 'not kept'}",
    }
    return "\n".join(["This run:", *(f"  {what:9} {text}" for what, text in lines.items() if text)])


def _data(cfg: CfgNode, images: int) -> str:
    train = f"{', '.join(cfg.DATASETS.TRAIN)}{f' ({images:,} images)' if images else ''}"
    evaluation = ", ".join(cfg.DATASETS.TEST)
    evaluation = f"evaluated on {evaluation}" if evaluation else "no evaluation"
    return f"{train}; {evaluation}"


def _model(cfg: CfgNode, model: nn.Module) -> str:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ranks = comm.get_world_size()
    where = f"{cfg.MODEL.DEVICE}{f', {ranks} processes' if ranks > 1 else ''}"
    return f"{cfg.MODEL.META_ARCHITECTURE}, {size:.2f} million parameters, on {where}"


def _groups(model: nn.Module) -> str:
    norms = (module for module in model.modules() if isinstance(module, PracticalGroupNorm))
    counts = Counter(norm.num_groups for norm in norms)
    each = ", ".join(f"G = {groups} in {count}" for groups, count in sorted(counts.items()))
    return f"{sum(counts.values())} PGN layers: {each}" if counts else ""


def _schedule(cfg: CfgNode, images: int) -> str:
    solver = cfg.SOLVER
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / images if images else 0
    length = f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images"
    return (
        f"{length}{f' ({epochs:.3g} epochs)' if images else ''}; {solver.LR_SCHEDULER_NAME} from "
        f"{solver.BASE_LR:g}, warm-up {solver.WARMUP_ITERS}"
    )
