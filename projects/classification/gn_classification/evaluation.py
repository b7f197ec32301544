"""Top-1 and top-5 error and the loss of a classifier."""

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from gn_classification.classifier import Batch

_TOP = 5


class ClassificationEvaluator(DatasetEvaluator):
    """Counts what a classifier gets wrong, over all ranks.

    Results are ``{"classification": {"error", "top5_error", "cross_entropy"}}``: images whose class
    is not the likeliest, and not among the five likeliest (where there are more than five), in
    percent; and the mean cross-entropy in nats.

    Example:
        >>> evaluator = ClassificationEvaluator()
        >>> evaluator.reset()
        >>> batch = Batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.arange(2))
        >>> evaluator.process(batch, torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
        >>> evaluator.evaluate()["classification"]["error"]
        50.0
    """

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums = torch.zeros(4, dtype=torch.float64)  # images, wrong, wrong of five, loss
        self._num_classes = 0

    def process(self, inputs: Batch, outputs: Tensor) -> None:
        """Count one batch, on the device of the logits.

        Args:
            inputs: the batch.
            outputs: its logits, of shape (N, classes).
        """
        logits, labels = outputs.float(), inputs.labels.to(outputs.device)
        self._num_classes = logits.shape[1]
        likeliest = logits.topk(min(_TOP, self._num_classes)).indices
        is_own = likeliest == labels[:, None]
        wrong = (~is_own[:, :1].any(1)).sum(), (~is_own.any(1)).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self._sums += torch.tensor([len(labels), *wrong, loss], dtype=torch.float64)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return the errors of all ranks' images, on the main rank.

        Raises:
            ValueError: if there was no image.
        """
        sums = torch.stack(comm.gather(self._sums) or [self._sums]).sum(0)
        if not comm.is_main_process():
            return None
        images, *wrong, loss = sums.tolist()
        if not images:
            raise ValueError("An evaluation must have images, got none. Check DATASETS.TEST.")
        metrics = {"error": 100 * wrong[0] / images, "cross_entropy": loss / images}
        if self._num_classes > _TOP:
            metrics["top5_error"] = 100 * wrong[1] / images
        return {"classification": metrics}
