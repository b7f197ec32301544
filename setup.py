"""Package metadata; the versions that are tested together stand in requirements/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "gn_practical/__init__.py").read_text())[1]

EXTRAS = {
    "train": [  # gn_practical.training
        "fvcore>=0.1.5.post20221221",
        "hotcoco>=1.3,<2",
        "iopath>=0.1.9",
        "opencv-python>=4.8",
        "Pillow>=10",
        "portalocker>=2",
        "pycocotools>=2.0.8",
        "PyYAML>=6",
        "safetensors>=0.4",
        "setuptools<81",  # detectron2.model_zoo imports pkg_resources
        "tensorboard>=2.12",
    ],
    "experiments": [  # sweeps of many runs, and projects/
        "joblib>=1.3",
        "scikit-learn>=1.3",  # the digits, classification's embedded data set
        "scipy>=1.11",
        "submitit>=1.5",
    ],
    "export": ["onnx>=1.16", "onnxruntime>=1.20"],  # gn_practical.inference.export, .exported
    "report": ["bokeh>=3.4", "Jinja2>=3.1", "scipy>=1.11"],  # the page that compares runs
    "fast": ["faster-coco-eval>=1.6"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
    "dev": [
        "build>=1",
        "hypothesis>=6.100",
        "psutil>=5.9",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
        "timm>=1.0",
    ],
}

setup(
    name="gn_practical",
    version=VERSION,
    description="Group normalization with the practical number of groups, for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gn_practical", "gn_practical.*"]),
    package_data={"gn_practical": ["py.typed", "training/comparison/page.html.j2"]},
    python_requires=">=3.10",
    # Detectron2 is not listed: its authors publish no package, and pip must not replace a build
    # from source. tools/install_detectron2.sh installs it with what it needs.
    install_requires=[
        "torch>=2.7",
        "torchvision>=0.22",
        "numpy>=1.26",
        "matplotlib>=3.7",
        "tabulate>=0.9",
        "tqdm>=4.60",
    ],
    extras_require={**EXTRAS, "all": sorted(set().union(*EXTRAS.values()))},
)
