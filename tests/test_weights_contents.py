"""Files of weights in every container, whole and damaged."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathManager
from safetensors.torch import save_file

from gn_practical.weights import read_weights
from gn_practical.weights.contents import read_contents

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def zoo(state, path):
    arrays = {key: each.numpy().astype(">f4") for key, each in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))


CONTAINERS = {
    "a.pth": torch.save,
    "legacy.pth": legacy,
    "a.pth.tar": lambda state, path: torch.save({"state_dict": state}, path),
    "a.pkl": zoo,
    "zip.pkl": torch.save,
    "a.safetensors": save_file,
    "renamed.pth": save_file,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_is_read_by_what_is_inside(tmp_path, name):
    CONTAINERS[name](STATE, tmp_path / name)
    weights = read_weights(str(tmp_path / name))
    assert weights.state.keys() == STATE.keys()
    for key, each in weights.state.items():
        assert torch.equal(each, STATE[key])


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_cut_file_is_refused_by_its_name(tmp_path, name):
    path = tmp_path / name
    CONTAINERS[name](STATE, path)
    data = path.read_bytes()
    for size in (len(data) - 5, len(data) // 2, 20, 0):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="must be a whole file") as error:
            read_weights(str(path))
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_changed_byte_is_found(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.index(torch.ones(2).numpy().tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"checksum|changed"):
        read_weights(str(tmp_path / "a.pth"))


def test_what_holds_no_weights_is_refused(tmp_path):
    page = tmp_path / "a.pth"
    page.write_text("\n<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match=r"a\.pth: it is a page of HTML"):
        read_weights(str(page))
    for thing, message in (
        ([1], "it holds a list"),
        ({}, "must hold tensors by name, got .* with nothing"),
        ({"epoch": 1, "lr": 0.1}, "with epoch, lr"),
        ({"model": {"x": 1}}, "with model"),
    ):
        torch.save(thing, tmp_path / "b.pth")
        with pytest.raises(ValueError, match=message):
            read_weights(str(tmp_path / "b.pth"))
    with pytest.raises(ValueError, match=r"can be read, got .*none\.pth: No such file"):
        read_weights(str(tmp_path / "none.pth"))


def test_the_query_is_detectron2_s(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    path = str(tmp_path / "a.pth")
    assert not read_weights(path).matching_heuristics
    assert read_weights(f"{path}?matching_heuristics=True").matching_heuristics
    with pytest.raises(ValueError, match=r"no query but matching_heuristics=True, got .*x=1"):
        read_weights(f"{path}?x=1")


def test_addresses_go_through_detectron2_s_path_manager(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "a.pth")
    asked = []
    here = lambda address: asked.append(address) or str(tmp_path / "a.pth")  # noqa: E731
    monkeypatch.setattr(PathManager, "get_local_path", here)
    for address in ("https://x.org/a.pth", "detectron2://a.pth", "catalog://a.pth"):
        assert read_weights(f"{address}?matching_heuristics=True").matching_heuristics
        assert asked.pop() == address


def test_what_stands_beside_the_weights_is_kept_apart(tmp_path):
    file = {"model": STATE, "state_dict": STATE, "iteration": 3, "scores": np.float64(1).item()}
    torch.save(file, tmp_path / "a.pth")
    contents = read_contents(str(tmp_path / "a.pth"))
    assert (contents.level, contents.others) == ("model", ("state_dict",))
    assert contents.beside == {"iteration": 3, "scores": 1.0}
    # Ours keeps an average beside the weights that training goes on with.
    torch.save({"model": STATE, "model_ema": STATE, "num_groups": {}}, tmp_path / "a.pth")
    contents = read_contents(str(tmp_path / "a.pth"))
    assert contents.ours
    assert contents.level == "model"
