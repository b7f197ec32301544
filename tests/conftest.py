"""A folder of data sets for the whole test run, and small helpers."""

import os
import tempfile

# Read when gn_practical is imported, as Detectron2's own data sets are.
os.environ["DETECTRON2_DATASETS"] = tempfile.mkdtemp(prefix="gn_practical_datasets_")
# Ranks, workers and the test process share the cores: waiting in a long loop would stall them.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
