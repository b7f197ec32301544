"""Configs, weights and pickles that try to run code do not, and end with one clear error."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.engine import load_cfg
from gn_practical.weights.safe_loading import load_pickle


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def payload(tmp_path):
    """A call that would leave a file; after the test, it must not be there."""
    marker = tmp_path / "payload_ran"
    yield f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    assert not marker.exists()


# Each is a whole file; SHELL and CODE stand for the payload.
MALICIOUS_YAML = {
    "apply": 'SEED: !!python/object/apply:os.system ["SHELL"]',
    "apply eval": 'OUTPUT_DIR: !!python/object/apply:eval ["CODE"]',
    "new": 'SEED: !!python/object/new:os.system ["SHELL"]',
    "nested": 'MODEL:\n  MASK_ON: !!python/object/apply:subprocess.getoutput ["SHELL"]',
    "as a key": '? !!python/object/apply:os.system ["SHELL"]\n: 1',
    "in an anchor": 'X: &x !!python/object/apply:os.system ["SHELL"]\nSEED: *x',
    "in a merge": '<<: {SEED: !!python/object/apply:os.system ["SHELL"]}',
    "verbatim": 'SEED: !<tag:yaml.org,2002:python/object/apply:os.system> ["SHELL"]',
    "tag handle": "%TAG !p! tag:yaml.org,2002:python/\n---\n"
    'SEED: !p!object/apply:os.system ["SHELL"]',
    "name": "SEED: !!python/name:os.system ''",
    "module": "SEED: !!python/module:os ''",
    "state": "SEED: !!python/object/new:type {args: [z, [], {extend: !!python/name:exec }]}",
    "list of bases": '_BASE_: [!!python/object/apply:os.system ["SHELL"]]',
}


def malicious_yaml(name, payload):
    shell, code = payload
    return MALICIOUS_YAML[name].replace("SHELL", shell).replace("CODE", code)


@pytest.mark.parametrize("through_base", [False, True])
@pytest.mark.parametrize("name", MALICIOUS_YAML)
def test_yaml_runs_nothing(tmp_path, payload, name, through_base):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "\n" + malicious_yaml(name, payload)
        if name != "tag handle"
        else malicious_yaml(name, payload)
    )
    given = path
    if through_base:
        given = tmp_path / "sub.yaml"
        given.write_text("_BASE_: bad.yaml\nSEED: 1")
    with pytest.raises(ValueError, match=r"got a Python tag in .*bad\.yaml, line [1-4],"):
        load_cfg(str(given))


def test_a_trusted_config_runs(tmp_path):
    path = tmp_path / "trusted.yaml"
    path.write_text('SEED: !!python/object/apply:eval ["6 * 7"]')
    assert load_cfg(str(path), trusted=True).SEED == 42


def test_installed_configs_are_trusted_where_they_are_installed_alone(tmp_path):
    from detectron2 import model_zoo

    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    installed = model_zoo.get_config_file(name)
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {installed}\nSEED: 5")
    assert load_cfg(str(tmp_path / "mine.yaml")).SEED == 5
    base = os.path.join(os.path.dirname(installed), "../Base-RetinaNet.yaml")
    copied = tmp_path / "copied.yaml"
    copied.write_text(Path(base).read_text())
    with pytest.raises(ValueError, match=r"Python tag in .*copied\.yaml, line 8"):
        load_cfg(str(copied))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and values, got NoneType"),
        ("just words", "must hold keys and values, got str"),
        ("- 1", "must hold keys and values, got list"),
        ("SEED: &x [*x]", "must be a file of known keys"),
        ("MODEL: &x {BACKBONE: *x}", "must be a file of known keys|must exist"),
        ("1: 2", "must be a file of known keys"),
        ("SEED: [", "must be a readable YAML file"),
    ],
)
def test_what_is_no_config_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_cfg(str(tmp_path / "bad.yaml"))


def test_python_configs_are_not_run(tmp_path, payload):
    (tmp_path / "config.py").write_text(payload[1])
    with pytest.raises(ValueError, match=r"must be a YAML file, got .*config\.py"):
        load_cfg(str(tmp_path / "config.py"))


@pytest.mark.parametrize(
    "key_value",
    [
        ("OUTPUT_DIR.X", "1"),
        ("SEED", "__import__('os').system('SHELL')"),
        ("SEED", "!!python/object/apply:os.system ['SHELL']"),
        ("SEED", "(lambda: 0)()"),
        ("SEED", "{[]: 1}"),
        ("SEED", "(" * 5000),
        ("MODEL", "{'PGN': 1}"),
        ("__class__", "1"),
        ("MODEL.__init__", "1"),
    ],
)
def test_overrides_are_values_and_no_code(payload, key_value):
    with pytest.raises(ValueError, match="must"):
        load_cfg("", [word.replace("SHELL", payload[0]) for word in key_value])


def test_pickled_proposals_need_trust():
    with pytest.raises(ValueError, match=r"LOAD_PROPOSALS must be False.*--trust-config"):
        load_cfg("", ["MODEL.LOAD_PROPOSALS", "True"])


def opcodes(function, argument):
    """A pickle of protocol 0 that calls a function by its dotted name."""
    return f"c{function}\n(S{argument!r}\ntR.".encode()


def malicious_objects(shell, code):
    import functools

    state = {"weight": torch.zeros(2)}
    lazy = functools.partial(os.system, shell)
    return {
        "system": Call(os.system, shell),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "nested": {"model": {**state, "bias": Call(os.system, shell)}},
        "beside the model": {"model": state, "trainer": {"hooks": [Call(os.system, shell)]}},
        "partial": {"model": lazy},
        "called partial": Call(lazy),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "pickle in a pickle": Call(pickle.loads, pickle.dumps(Call(os.system, shell))),
        "file": Call(open, shell.split()[-1], "w"),
        "array of calls": np.array([Call(os.system, shell)], dtype=object),
        "module": Call(__import__, "antigravity"),
    }


MALICIOUS = list(malicious_objects("touch x", "x"))
BY_OPCODES = {
    "posix.system": "posix\nsystem",
    "nt.system": "nt\nsystem",
    "builtins": "__builtin__\neval",
    "numpy's shell": "numpy.testing._private.utils\nrunstring",
    "numpy's commands": "numpy.distutils.exec_command\nexec_command",
    "numpy's pickles": "numpy.core.multiarray\n_reconstruct.__globals__",
    "dotted": "collections\nOrderedDict.fromkeys.__self__",
    "torch hub": "torch.hub\nload",
    "ours": "gn_practical.weights.safe_loading\nos.system",
}


def as_zip(data):
    """A .pth file with any bytes for its pickle."""
    file = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(2)}}, file)
    out = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = data if name.endswith("data.pkl") else source.read(name)
            target.writestr(name, content)
    return out.getvalue()


def as_legacy(data):
    """The format of torch.save before PyTorch 1.6: pickles in a row."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + data


def as_tar(data):
    """The oldest format of torch.save."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def as_torchscript(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name in ("data.pkl", "constants.pkl", "code/x.py"):
            target.writestr(f"archive/{name}", data)
    return out.getvalue()


CONTAINERS = {
    ".pkl": [bytes],
    ".pth": [as_zip, as_legacy, as_tar, as_torchscript, bytes],
    ".pyth": [as_zip, bytes],
}


@pytest.mark.parametrize("name", ["system", "nested", "eval", "apply"])
def test_the_payloads_are_live(tmp_path, name):
    """A test that nothing runs says something only if what it tries would run."""
    marker = tmp_path / "payload_ran"
    payload = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    if name in MALICIOUS_YAML:
        yaml.unsafe_load(malicious_yaml(name, payload))
    else:
        pickle.loads(pickle.dumps(malicious_objects(*payload)[name]))
    assert marker.exists()


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("name", MALICIOUS + list(BY_OPCODES))
def test_weights_run_nothing(tmp_path, payload, suffix, name):
    if name in BY_OPCODES:
        data = [opcodes(BY_OPCODES[name], payload["eval" in BY_OPCODES[name]])]
    else:
        thing = malicious_objects(*payload)[name]
        data = [pickle.dumps(thing, protocol=protocol) for protocol in (2, 4)]
    for container in CONTAINERS[suffix]:
        for pickled in data:
            path = tmp_path / f"bad{suffix}"
            path.write_bytes(container(pickled))
            with pytest.raises(ValueError, match=r"must be a whole file .*bad\.p") as error:
                GroupsCheckpointer(nn.Linear(2, 2)).load(str(path))
            assert "\n" not in str(error.value)


def test_arrays_of_any_age_are_read(tmp_path):
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "b": np.array([1, 2], ">i4"),
        "s": np.float64(0.5),
        "e": np.zeros((0, 4)),
        "t": np.array(["a", "bc"]),
        "n": {"list": [np.int64(1), (np.bool_(True), None)], "text": "x", "raw": [b"\xff", b""]},
    }
    for protocol in range(6):
        path = tmp_path / "a.pkl"
        path.write_bytes(pickle.dumps(arrays, protocol=protocol))
        read = load_pickle(str(path))
        for key in "wfbet":
            np.testing.assert_array_equal(read[key], arrays[key])
        assert read["w"].dtype == np.float32
        assert read["f"].flags.writeable
        assert read["s"] == 0.5
        assert read["n"] == {"list": [1, (True, None)], "text": "x", "raw": [b"\xff", b""]}
        older = path.read_bytes().replace(b"numpy._core", b"numpy.core")
        path.write_bytes(older if protocol < 4 else pickle.dumps(arrays, protocol=protocol))
        np.testing.assert_array_equal(load_pickle(str(path))["w"], arrays["w"])


def test_python_2_strings_are_bytes_of_arrays(tmp_path):
    """What Detectron's zoo wrote: protocol 2 of Python 2, with array data as a `str`."""
    raw = np.array([1.5, -2.0], np.float32).tobytes()
    head = b"\x80\x02}U\x06conv_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    minus_one = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN" + 2 * minus_one + b"K\x00tb"
    data = head + b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85" + dtype + b"\x89U\x08" + raw + b"tbs."
    (tmp_path / "a.pkl").write_bytes(data)
    np.testing.assert_array_equal(load_pickle(str(tmp_path / "a.pkl"))["conv_w"], [1.5, -2.0])


def test_types_with_fields_outside_of_their_data_are_refused(tmp_path):
    array = np.zeros(2, dtype=[("a", "<f4"), ("b", "<f4")])
    for thing in (array, array[0], np.array([None]), np.dtype("O"), np.ndarray):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": thing}))
        with pytest.raises(ValueError, match=r"must hold numbers|no array or plain|dtype"):
            load_pickle(str(tmp_path / "a.pkl"))


def test_an_array_larger_than_its_data_is_refused(tmp_path):
    data = pickle.dumps(np.zeros(3, np.float32), protocol=2)
    assert data.count(b"K\x03\x85") == 1
    (tmp_path / "a.pkl").write_bytes(
        data.replace(b"K\x03\x85", b"J" + struct.pack("<i", 2**30) + b"\x85")
    )
    with pytest.raises(ValueError, match="cannot reshape"):
        load_pickle(str(tmp_path / "a.pkl"))


def test_a_list_that_holds_itself_is_refused(tmp_path):
    circle = []
    circle.append(circle)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(circle))
    with pytest.raises(ValueError, match="recursion"):
        load_pickle(str(tmp_path / "a.pkl"))


@pytest.mark.parametrize("kind", ["zoo", "caffe2", "imagenet"])
def test_zoo_files_load(tmp_path, kind):
    """Detectron2's zoo names an author; Caffe2's files have blobs, the ones for ImageNet none."""
    weight = np.arange(4, dtype=np.float32).reshape(2, 2)
    weights = {"weight": weight, "bias": weight[0]}
    contents = {
        "zoo": {"model": weights, "__author__": "somebody"},
        "caffe2": {"blobs": {**weights, "weight_momentum": weight}},
        "imagenet": weights,
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(contents[kind], protocol=2))
    model = nn.Linear(2, 2)
    GroupsCheckpointer(model).load(str(tmp_path / "a.pkl"))
    np.testing.assert_array_equal(model.weight.detach(), weight)


def test_files_of_pycls_load(tmp_path):
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    torch.save({"model_state": weights}, tmp_path / "a.pyth")
    model = nn.Linear(2, 2)
    GroupsCheckpointer(model).load(str(tmp_path / "a.pyth"))
    assert model.weight.eq(1).all()
    torch.save({"model": {}}, tmp_path / "b.pyth")
    with pytest.raises(ValueError, match=r"must hold tensors by name, got .*b\.pyth"):
        GroupsCheckpointer(model).load(str(tmp_path / "b.pyth"))
