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
    """Describe a training for the first screen, with its config as scaled to the ranks."""
    solver, images = cfg.SOLVER, len(getattr(train_loader, "dataset", ()))
    data = ", ".join(cfg.DATASETS.TRAIN) + (f" ({images:,} images)" if images else "")
    tested = ", ".join(cfg.DATASETS.TEST)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ranks = comm.get_world_size()
    where = cfg.MODEL.DEVICE + (f", {ranks} processes" if ranks > 1 else "")
    norms = (module for module in model.modules() if isinstance(module, PracticalGroupNorm))
    counts = Counter(norm.num_groups for norm in norms)
    groups = ", ".join(f"G = {groups} in {count}" for groups, count in sorted(counts.items()))
    length = f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images"
    if images:
        length += f" ({solver.MAX_ITER * solver.IMS_PER_BATCH / images:.3g} epochs)"
    lines = {
        "Data": f"{data}; {f'evaluated on {tested}' if tested else 'no evaluation'}",
        "Model": f"{cfg.MODEL.META_ARCHITECTURE}, {size:.2f} million parameters, on {where}",
        "Groups": f"{sum(counts.values())} PGN layers: {groups}" if counts else "",
        "Schedule": f"{length}; {solver.LR_SCHEDULER_NAME} from {solver.BASE_LR:g}, "
        f"warm-up {solver.WARMUP_ITERS}",
        "Results": f"{cfg.OUTPUT_DIR}; environment, config and tables: {log_file() or 'not kept'}",
    }
    return "\n".join(["This run:", *(f"  {what:9} {text}" for what, text in lines.items() if text)])
