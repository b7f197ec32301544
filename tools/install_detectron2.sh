#!/bin/sh
# Install Detectron2 and what it imports into the environment of $PYTHON, unless it is there.
#
# Its authors publish no package. The one installed here is their commit a59f0563 as Python code,
# hash-checked; its wheel is tagged for Python 3.10 for the sake of an optional compiled part, so
# pip is told to take it for any Python. Models of this project need no compiled part. For one with
# it (deformable convolutions, rotated boxes), build from source first; it is then left alone:
#   pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2'
set -eu
PYTHON=${PYTHON:-python}
requirements=$(dirname "$0")/../requirements
if "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("detectron2"))'
then
    echo "Detectron2 is installed already; it is left as it is."
    exit 0
fi
"$PYTHON" -m pip install -r "$requirements/detectron2_runtime.txt"
site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$PYTHON" -m pip install --no-deps --require-hashes --only-binary=:all: \
    --python-version 3.10 --implementation cp --abi none --platform any \
    --target "$site" -r "$requirements/detectron2.txt"
