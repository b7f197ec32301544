"""What each of Detectron2's models predicts, and where its config keeps the numbers of classes."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """What the rest of the trainer has to know of a meta-architecture.

    Attributes:
        predicts: keys of its output, of "instances", "sem_seg", "panoptic" and "proposals".
        things: config key of its number of thing classes; "" for none.
        stuff: config key of its number of stuff classes, "things" included; "" for none.
    """

    predicts: frozenset[str]
    things: str = ""
    stuff: str = ""


_ALL = frozenset({"instances", "sem_seg", "panoptic"})
_ROI_HEADS, _SEM_SEG = "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"

ARCHITECTURES = {
    "FCOS": Architecture(frozenset({"instances"})),  # has no keys: built by code alone
    "GeneralizedRCNN": Architecture(frozenset({"instances"}), things=_ROI_HEADS),
    "PanopticFPN": Architecture(_ALL, things=_ROI_HEADS, stuff=_SEM_SEG),
    "ProposalNetwork": Architecture(frozenset({"proposals"})),
    "RetinaNet": Architecture(frozenset({"instances"}), things="MODEL.RETINANET.NUM_CLASSES"),
    "SemanticSegmentor": Architecture(frozenset({"sem_seg"}), stuff=_SEM_SEG),
}


def architecture(name: str) -> Architecture:
    """Return what is known of a meta-architecture; of an unknown one, that it may predict all."""
    return ARCHITECTURES.get(name, Architecture(_ALL))
