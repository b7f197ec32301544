"""Package metadata; the versions that are tested together stand in requirements/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "gn_practical/__init__.py").read_text())[1]

setup(
    name="gn_practical",
    version=VERSION,
    description="Group normalization with the practical number of groups, for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gn_practical", "gn_practical.*"]),
    python_requires=">=3.10",
    # Detectron2 is not listed: its authors publish no package, and pip must not replace a build
    # from source. `make install` and the README say how to get it.
    install_requires=[
        "torch>=2.7",
        "torchvision>=0.22",
        "numpy>=1.26",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "pycocotools>=2.0.8",
        "opencv-python>=4.8",
        "Pillow>=10",
        "matplotlib>=3.7",
        "tqdm>=4.60",
        "tabulate>=0.9",
        "termcolor>=2",
        "yacs>=0.1.8",
        "cloudpickle>=2",
        "tensorboard>=2.12",
        "omegaconf>=2.1,<2.4",
        "hydra-core>=1.1",
        "packaging>=21",
        "portalocker>=2",
        "scipy>=1.11",
        "joblib>=1.3",
        "scikit-learn>=1.3",  # the digits, classification's embedded data set
        "hotcoco>=1.3,<2",
        "setuptools<81",  # detectron2.model_zoo imports pkg_resources
    ],
    extras_require={
        "experiments": ["submitit>=1.5"],  # sweeps on a SLURM cluster
        "fast": ["faster-coco-eval>=1.6"],
        "dev": [
            "hypothesis>=6.100",
            "onnx>=1.16",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.8",
            "timm>=1.0",
        ],
    },
)
