"""The open door for norms: get_norm asks whoever was there, and every holder knows ours."""

import functools
import os
import subprocess
import sys
import textwrap
import types

import detectron2.layers
import detectron2.modeling.backbone.resnet as resnet
import pytest
from detectron2.layers import batch_norm
from torch import nn

from gn_practical import PracticalGroupNorm, register_norm, register_pgn
from gn_practical.modeling import registration, unregister_pgn


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(registration, "_factories", dict(registration._factories))
    yield
    unregister_pgn()
    for module in (batch_norm, detectron2.layers, resnet):
        function = module.get_norm
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        module.get_norm = function
    register_pgn()


def in_new_process(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_bound_before_the_import_know_pgn():
    output = in_new_process("""
        from detectron2.layers import get_norm as x
        import gn_practical
        print(type(x("PGN", 8)).__name__, type(x("GN", 32)).__name__)
        gn_practical.modeling.unregister_pgn()
        try:
            x("PGN", 8)
        except KeyError as error:
            print(type(error).__name__)
    """)
    assert output.split() == ["PracticalGroupNorm", "GroupNorm", "KeyError"]


def test_any_name_in_any_module_is_reached_and_restored():
    unregister_pgn()
    original = batch_norm.get_norm
    holder = types.ModuleType("someones_module")
    holder.make_norm = original
    sys.modules[holder.__name__] = holder
    try:
        register_pgn()
        register_pgn()
        assert isinstance(holder.make_norm("PGN", 8), PracticalGroupNorm)
        assert holder.make_norm is batch_norm.get_norm is resnet.get_norm
        unregister_pgn()
        assert holder.make_norm is batch_norm.get_norm is resnet.get_norm is original
    finally:
        del sys.modules[holder.__name__]


def another_extension(previous, name):
    @functools.wraps(previous)
    def get_norm(norm, out_channels):
        return nn.Identity() if norm == name else previous(norm, out_channels)

    return get_norm


@pytest.mark.parametrize("whole", [True, False])
def test_an_extension_that_came_before_is_asked(whole):
    unregister_pgn()
    theirs = another_extension(batch_norm.get_norm, "THEIRS")
    for module in (batch_norm, detectron2.layers, resnet)[: 3 if whole else 2]:
        module.get_norm = theirs
    register_pgn()
    for module in (batch_norm, detectron2.layers, resnet):
        assert isinstance(module.get_norm("PGN", 8), PracticalGroupNorm)
        assert isinstance(module.get_norm("GN", 32), nn.GroupNorm)
    assert isinstance(batch_norm.get_norm("THEIRS", 8), nn.Identity)
    unregister_pgn()
    assert batch_norm.get_norm is theirs


def test_an_extension_that_comes_after_may_ask_us_or_not():
    batch_norm.get_norm = another_extension(batch_norm.get_norm, "THEIRS")
    assert isinstance(batch_norm.get_norm("PGN", 8), PracticalGroupNorm)
    with pytest.raises(KeyError, match="THEIRS"):
        resnet.get_norm("THEIRS", 8)  # which they did not replace
    batch_norm.get_norm = lambda norm, channels: {"THEIRS": nn.Identity}[norm]()
    register_pgn()
    assert isinstance(batch_norm.get_norm("PGN", 8), PracticalGroupNorm)
    assert isinstance(batch_norm.get_norm("THEIRS", 8), nn.Identity)


def test_other_norm_types_stay_and_unknown_ones_are_explained():
    get_norm = detectron2.layers.get_norm
    assert isinstance(get_norm("GN", 64), nn.GroupNorm)
    assert get_norm("", 64) is None
    assert get_norm(None, 64) is None
    assert isinstance(get_norm(lambda c: nn.Identity(), 64), nn.Identity)
    for kind in (KeyError, ValueError):
        with pytest.raises(kind, match=r"one of BN, .*PGN.* got NORM='PGM'. Did you mean PGN\?"):
            get_norm("PGM", 64)


def test_a_key_error_of_a_norm_itself_passes():
    register_norm("BROKEN", lambda channels: {}["width"])
    with pytest.raises(KeyError, match=r"^'width'$"):
        detectron2.layers.get_norm("BROKEN", 8)


def test_a_name_belongs_to_one_norm():
    def factory(channels):
        return nn.GroupNorm(8, channels)

    register_norm("GN8", factory)
    register_norm("GN8", factory)
    assert resnet.get_norm("GN8", 16).num_groups == 8
    for name in ("GN8", "GN", "PGN", ""):
        with pytest.raises(ValueError, match=rf"no other norm has, got name='{name}'"):
            register_norm(name, nn.Identity)
