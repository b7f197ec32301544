"""What is wrong with data sets: quickly at the start of a run, wholly by the validator."""

from gn_practical.training.validation.clean import write_clean
from gn_practical.training.validation.findings import REASONS, Fault
from gn_practical.training.validation.instances import InstancesTarget
from gn_practical.training.validation.panoptic import PanopticTarget
from gn_practical.training.validation.report import Report, check_ending, validate
from gn_practical.training.validation.start import check_datasets
from gn_practical.training.validation.targets import RecordsTarget, targets_of

__all__ = [
    "REASONS",
    "Fault",
    "InstancesTarget",
    "PanopticTarget",
    "RecordsTarget",
    "Report",
    "check_datasets",
    "check_ending",
    "targets_of",
    "validate",
    "write_clean",
]
