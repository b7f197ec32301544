"""Validation of whole data sets before training: every image, PNG and annotation."""

from gn_practical.data.validation.clean import write_clean
from gn_practical.data.validation.findings import REASONS, Fault
from gn_practical.data.validation.instances import InstancesTarget
from gn_practical.data.validation.panoptic import PanopticTarget
from gn_practical.data.validation.records import RecordsTarget
from gn_practical.data.validation.report import Report, check_ending
from gn_practical.data.validation.run import validate
from gn_practical.data.validation.targets import targets_of

__all__ = [
    "REASONS",
    "Fault",
    "InstancesTarget",
    "PanopticTarget",
    "RecordsTarget",
    "Report",
    "check_ending",
    "targets_of",
    "validate",
    "write_clean",
]
