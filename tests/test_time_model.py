"""The model of time in benchmarks/time_model.py, on layers that are computed by hand."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
SHAPE = (2, 64, 200, 336)  # large groups, of 64 · 200 · 336 values
COPY = 4 * 2 * 64 * 200 * 336 / (0.8 * 4.8e12)  # s for the bytes of it once, in float32, on an H200


@pytest.fixture(scope="module")
def time_model():
    pytest.importorskip("triton")
    sys.path.insert(0, BENCHMARKS)
    try:
        import time_model

        yield time_model
    finally:
        sys.path.remove(BENCHMARKS)


def seconds(time_model, shape, norm, half=False):
    works = time_model.layer(shape, norm, half)
    return sum(work.seconds(time_model.GPUS["H200"], half) for work in works)


def test_our_norm_moves_eight_accesses_of_an_element(time_model):
    assert seconds(time_model, SHAPE, "ours") == pytest.approx(8 * COPY)
    assert seconds(time_model, SHAPE, "ours", half=True) == pytest.approx(4 * COPY)
    assert sum(work.launches for work in time_model.layer(SHAPE, "ours", False)) == 3 + 3


def test_small_groups_are_two_launches(time_model):
    assert seconds(time_model, (2, 64, 8, 8), "ours") == pytest.approx(2 * 3e-6)


@pytest.mark.parametrize("groups", [1, 32])
def test_pytorchs_norm(groups, time_model):
    """Moments by a block a group; then y, ReLU, and their gradients: 2 + 2 and 3 + 5 accesses."""
    moments = 64 / groups * 200 * 336 / 512 * 650 / 1.83e9
    found = seconds(time_model, SHAPE, f"GN({groups})")
    assert found == pytest.approx(12 * COPY + max(moments, COPY), rel=1e-3)


def test_pytorchs_norm_under_autocast(time_model):
    """76 bytes of an element, with the casts; 4 of them are read by the moments."""
    found = seconds(time_model, SHAPE, "GN(32)", half=True)
    moments = 2 * 200 * 336 / 512 * 650 / 1.83e9
    assert found == pytest.approx(72 / 4 * COPY + max(moments, COPY), rel=1e-3)


def test_frozen_norm(time_model):
    """x · scale + bias, ReLU, and their gradients; the parameters of channels are left out."""
    works = time_model.layer(SHAPE, "FrozenBN of the zoo", False)
    large = [work for work in works if work.bytes > 1e6]
    assert sum(work.bytes for work in large) == pytest.approx(11 * 4 * 2 * 64 * 200 * 336, rel=1e-3)


def test_a_convolution_takes_the_longer_of_flops_and_bytes(time_model):
    gpu = time_model.GPUS["A100"]
    by_flops = time_model.Work("convolution", 1, bytes=1e6, flops=1e12)
    assert by_flops.seconds(gpu, half=True) == pytest.approx(1e12 / 156e12)
    assert by_flops.seconds(gpu, half=False) == pytest.approx(1e12 / 78e12)
    by_bytes = time_model.Work("convolution", 1, bytes=1e9, flops=1e9)
    assert by_bytes.seconds(gpu, half=True) == pytest.approx(1e9 / (0.8 * 2.039e12))


def test_a_step_takes_the_longer_of_host_and_gpu_in_each_part(time_model):
    works = {
        "backbone": [time_model.Work("a", 2, bytes=0.8 * 4.8e12 * 0.010)],
        "backbone backward": [time_model.Work("b", 1)],
    }
    rest = time_model.Rest(launches=10, host=0.004, waits=1)
    hosts = {"backbone": 0.003, "backbone backward": 0.005}
    found = time_model.step(works, hosts, rest, time_model.GPUS["H200"], half=False)
    launches = 2.5e-3
    assert found["ms"] == pytest.approx(10 + (5 + launches) + (4 + 10 * launches))
    assert found["bound by the host"] == ["backbone backward", "rest"]
    assert found["graph saves ms"] == pytest.approx(5 + launches - 2 * launches)
