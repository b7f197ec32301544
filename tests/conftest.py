"""A folder of data sets for the whole test run, and small helpers."""

import os
import tempfile

# Read when gn_practical is imported, as Detectron2's own data sets are.
os.environ["DETECTRON2_DATASETS"] = tempfile.mkdtemp(prefix="gn_practical_datasets_")
# Two ranks and their workers share two cores with the test process; spinning would stall them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
