"""Checkpoints are whole or not there, found again, thinned out, and written beside the training."""

import copy
import logging
import os
import random
import resource
import threading
import types
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import build_optimizer
from torch import nn

from gn_practical.training import ranks
from gn_practical.training.checkpoint import GroupsCheckpointer, files
from gn_practical.training.checkpoint import checkpointer as checkpointer_module
from gn_practical.training.checkpoint.files import (
    check_whole,
    newest_whole,
    remove_old,
    write_checkpoint,
    write_last,
)
from gn_practical.training.checkpoint.snapshot import Snapshot
from gn_practical.training.engine.hooks import BestCheckpoint


def state_of(iteration, size=50):
    weights = torch.arange(size, dtype=torch.float32) + iteration
    return {"model": {"weight": weights[None], "bias": weights[:1].clone()}, "iteration": iteration}


def name_of(iteration):
    return f"model_{iteration:07d}.pth"


def write_run(folder, iterations=(9, 19, 29)):
    for iteration in iterations:
        write_checkpoint(state_of(iteration), str(folder / name_of(iteration)))
        write_last(str(folder), name_of(iteration))


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, the last with 30 iterations."""
    write_run(tmp_path)
    return tmp_path


def truncate(data, rng):
    return data[: rng.randrange(1, len(data))]


def flip_one_bit(data, rng):
    return flip(data, [rng.randrange(len(data))], rng)


def flip_some_bytes(data, rng):
    start = rng.randrange(len(data))
    return flip(data, range(start, min(len(data), start + rng.randrange(2, 600))), rng)


def flip_the_end(data, rng):
    return flip(data, [rng.randrange(len(data) - 150, len(data))], rng)


def flip(data, places, rng):
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zero_a_page(data, rng):
    """As some file systems leave a file after a power cut."""
    start = rng.randrange(len(data) // 2)
    return data[:start] + bytes(len(data) // 2) + data[start + len(data) // 2 :]


def lengthen(data, rng):
    return data + rng.randbytes(rng.randrange(1, 100))


def cut_out(data, rng):
    start = rng.randrange(len(data) - 64)
    return data[:start] + data[start + rng.randrange(1, 64) :]


def empty(data, rng):
    return b""


def another_kind(data, rng):
    return rng.choice([b"\x89PNG\r\n", b"just words", b"<!DOCTYPE html>", b"PK\3\4 and more"]) * 20


def other_content(data, rng):
    """A whole file of torch.save that is no checkpoint of a training."""
    path = Path(os.environ["TMPDIR_OF_TEST"]) / "other"
    torch.save(rng.choice([[1], 3, "x", {"a": 1}, {"iteration": 1}, {"model": {}}]), path)
    return path.read_bytes()


DAMAGES = [truncate, flip_one_bit, flip_some_bytes, flip_the_end, zero_a_page, lengthen, cut_out]
DAMAGES += [empty, another_kind, other_content]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_whole_one_resumed(run, damage, caplog, monkeypatch):
    """20 seeded cases of each of 10 kinds: 200 damaged checkpoints."""
    monkeypatch.setenv("TMPDIR_OF_TEST", str(run))
    last, whole = run / name_of(29), (run / name_of(29)).read_bytes()
    rng = random.Random(damage.__name__)
    for _ in range(20):
        damaged = damage(whole, rng)
        assert damaged != whole
        last.write_bytes(damaged)
        caplog.clear()
        assert GroupsCheckpointer(nn.Linear(50, 1), str(run)).get_checkpoint_file() == str(
            run / name_of(19)
        )
        (warning,) = caplog.messages
        assert f"Damaged: {last} (" in warning
        assert f"Resuming from {run / name_of(19)}" in warning


def test_every_place_counts(tmp_path):
    """Nothing in the file, header, padding, data or checksum, may change unseen."""
    path = tmp_path / "a.pth"
    write_checkpoint({"model": {"weight": torch.arange(3.0)}, "iteration": 1}, str(path))
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 5), *range(len(whole) - 110, len(whole))]:
        path.write_bytes(flip(whole, [place], random.Random(place)))
        with pytest.raises(ValueError, match=r"."):
            check_whole(str(path))
    path.write_bytes(whole)
    check_whole(str(path))


def test_plain_checkpoints_are_compared_with_their_parts(tmp_path):
    """What Detectron2 itself wrote has no checksum of the whole."""
    path = tmp_path / name_of(9)
    torch.save(state_of(9), path)
    check_whole(str(path))
    whole = path.read_bytes()
    start = whole.index(torch.tensor([9.0, 10.0, 11.0]).numpy().tobytes())
    path.write_bytes(flip(whole, [start + 5], random.Random(0)))
    with pytest.raises(ValueError, match=r"its part .*data/\d differs"):
        check_whole(str(path))


def test_other_programs_read_our_checkpoints(run):
    path = run / name_of(29)
    assert torch.load(path, weights_only=True)["iteration"] == 29
    assert torch.load(path, weights_only=True, mmap=True)["iteration"] == 29
    assert zipfile.ZipFile(path).testzip() is None
    model = nn.Linear(50, 1)
    write_checkpoint({"model": nn.Linear(50, 1).state_dict(), "iteration": 39}, str(path))
    assert DetectionCheckpointer(model, str(run)).resume_or_load("")["iteration"] == 39


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must name a file of its folder, not ''"),
        (b"../elsewhere.pth", "must name a file of its folder, not '../elsewhere.pth'"),
        (b"/etc/passwd", "must name a file of its folder"),
        (b"sub/model.pth", "must name a file of its folder"),
        (b"..", "must name a file of its folder"),
        (b"model\0.pth", "must name a file of its folder"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"model_0000099.pth", "No such file"),
        (None, None),
    ],
)
def test_a_damaged_last_checkpoint_file(run, content, reason, caplog):
    """The file that names the last checkpoint is damaged, missing, or leads elsewhere."""
    write_checkpoint(state_of(99), str(run.parent / "elsewhere.pth"))
    last = run / "last_checkpoint"
    last.unlink() if content is None else last.write_bytes(content)
    found = GroupsCheckpointer(nn.Linear(50, 1), str(run)).get_checkpoint_file()
    assert found == str(run / name_of(29))
    if reason:
        assert reason in caplog.text


def test_the_checkpoint_that_last_checkpoint_names_is_taken_though_older(run):
    """Users edit that file to go back."""
    write_last(str(run), name_of(9))
    assert newest_whole(str(run)) == (str(run / name_of(9)), {})


def test_most_iterations_are_newest_whatever_the_name(run):
    write_checkpoint(state_of(24), str(run / "model_best.pth"))
    write_checkpoint(state_of(39), str(run / "model_final.pth"))
    (run / "last_checkpoint").unlink()
    assert newest_whole(str(run))[0] == str(run / "model_final.pth")
    (run / "model_final.pth").write_bytes(b"")
    assert newest_whole(str(run))[0] == str(run / name_of(29))


def test_all_damaged_is_an_error_that_names_them(run):
    for path in run.glob("*.pth"):
        path.write_bytes(b"gone")
    checkpointer = GroupsCheckpointer(nn.Linear(50, 1), str(run))
    with pytest.raises(
        ValueError, match=r"whole checkpoint, got 3 damaged: .*9\.pth \(not"
    ) as error:
        checkpointer.resume_or_load("", resume=True)
    assert all(name_of(iteration) in str(error.value) for iteration in (9, 19, 29))


def test_every_rank_takes_what_the_main_rank_found(run, monkeypatch):
    """Else two ranks could go on from two checkpoints, or one wait for the other for good."""
    for found, error in [(str(run / name_of(9)), None), ("", "all are damaged")]:
        for module, answer in ((checkpointer_module, found), (ranks, error)):
            comm = types.SimpleNamespace(
                is_main_process=lambda: False, all_gather=lambda mine, answer=answer: [answer, mine]
            )
            monkeypatch.setattr(module, "comm", comm)
        other_rank = GroupsCheckpointer(nn.Linear(50, 1), str(run))
        if found:
            assert other_rank.resume_or_load("")["iteration"] == 9
        else:
            with pytest.raises(ValueError, match="all are damaged"):
                other_rank.resume_or_load("")


def test_no_checkpoint_starts_from_the_weights(tmp_path):
    """Weights that lie in the folder are not a training to resume."""
    model = nn.Linear(2, 1)
    torch.save(model.state_dict(), tmp_path / "pretrained.pth")
    checkpointer = GroupsCheckpointer(nn.Linear(2, 1), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    extra = checkpointer.resume_or_load(str(tmp_path / "pretrained.pth"), resume=True)
    assert "iteration" not in extra
    assert torch.equal(checkpointer.model.weight, model.weight)


def test_damaged_weights_are_an_error(run):
    path = run / name_of(29)
    path.write_bytes(flip(path.read_bytes(), [900], random.Random(0)))
    with pytest.raises(
        ValueError, match=r"must be a whole file, got .*29\.pth: its checksum differs\. L"
    ):
        GroupsCheckpointer(nn.Linear(50, 1)).load(str(path))


@pytest.mark.parametrize("name", ["../model", "/tmp/model", "a/b", "", "..", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    checkpointer = GroupsCheckpointer(nn.Linear(2, 1), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="must be named without a folder, got name="):
        checkpointer.save(name)
    assert not any(tmp_path.iterdir())


def save(checkpointer, iteration):
    checkpointer.save(name_of(iteration)[:-4], iteration=iteration)


@pytest.fixture
def small_files():
    """A limit on the size of files, as a full disk sets it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))

    yield limit
    limit(None)


def test_a_full_disk_leaves_the_older_ones_and_the_training(tmp_path, small_files, caplog):
    checkpointer = GroupsCheckpointer(nn.Linear(64, 64), str(tmp_path), keep_last=1)
    save(checkpointer, 9)
    checkpointer.wait()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    small_files(5000)
    save(checkpointer, 19)
    save(checkpointer, 29)  # goes on, and tries again
    with pytest.raises(ValueError, match=r"must be written, got \[Errno 27\] File too large"):
        checkpointer.wait()
    assert caplog.text.count("could not be written") == 3
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    small_files(None)
    checkpointer.wait()  # room was made: the state is still there
    assert newest_whole(str(tmp_path)) == (str(tmp_path / name_of(29)), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", name_of(29)]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_is_broken_off_leaves_nothing(run, monkeypatch, step):
    before = {path: path.read_bytes() for path in run.iterdir()}

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="Input/output"):
        write_checkpoint(state_of(99), str(run / name_of(29)))
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_what_a_killed_write_left_is_cleared_away(run):
    (run / f"{name_of(39)}.tmp").write_bytes(b"half")
    checkpointer = GroupsCheckpointer(nn.Linear(2, 1), str(run))
    assert checkpointer.get_checkpoint_file() == str(run / name_of(29))
    save(checkpointer, 49)
    checkpointer.wait()
    assert not list(run.glob("*.tmp"))


def test_keep_last_spares_all_but_the_old_periodic_ones(tmp_path):
    for other in ("model_best.pth", "model_final.pth", name_of(999), "weights.pth"):
        write_checkpoint(state_of(1), str(tmp_path / other))
    checkpointer = GroupsCheckpointer(nn.Linear(2, 1), str(tmp_path), keep_last=2)
    for iteration in (9, 19, 29, 39):
        save(checkpointer, iteration)
    checkpointer.wait()
    kept = {path.name for path in tmp_path.glob("*.pth")}
    others = {"model_best.pth", "model_final.pth", name_of(999), "weights.pth"}
    assert kept == {name_of(29), name_of(39)} | others


def test_nothing_is_removed_for_a_damaged_one(run):
    (run / name_of(29)).write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        remove_old(str(run / name_of(29)), keep=1)
    assert len(list(run.glob("*.pth"))) == 3


def test_the_step_does_not_wait_for_the_write(tmp_path, monkeypatch):
    """What is written is the state at the time of the call, however late it is written."""
    may_write = threading.Event()
    write = files.write_checkpoint

    def wait_and_write(state, path):
        assert may_write.wait(30)
        write(state, path)

    monkeypatch.setattr(files, "write_checkpoint", wait_and_write)
    model = nn.Linear(2, 1)
    weight = model.weight.detach().clone()
    checkpointer = GroupsCheckpointer(model, str(tmp_path))
    save(checkpointer, 9)
    assert not list(tmp_path.iterdir())
    nn.init.zeros_(model.weight)
    may_write.set()
    checkpointer.wait()
    saved = torch.load(tmp_path / name_of(9), weights_only=True)
    assert torch.equal(saved["model"]["weight"], weight)
    assert (tmp_path / "last_checkpoint").read_text() == name_of(9)


def stepped_optimizer(model):
    """Detectron2's, which clips gradients in a class of its own, after a first step."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_the_optimizer_s_step_waits_for_the_copy_and_nothing_else_does(tmp_path, monkeypatch):
    may_copy = threading.Event()
    complete = Snapshot.complete

    def wait_and_complete(self):
        assert may_copy.wait(30)
        complete(self)

    monkeypatch.setattr(Snapshot, "complete", wait_and_complete)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = stepped_optimizer(model)
    checkpointer = GroupsCheckpointer(model, str(tmp_path), optimizer=optimizer)
    checkpointer.copy_beside(optimizer)
    before = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    save(checkpointer, 9)
    model(torch.ones(4, 2)).sum().backward()  # changes the running statistics
    optimizer.param_groups[0]["lr"] = 7.0
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(0.2)
    assert stepping.is_alive()
    assert torch.equal(model[0].weight, before["model"]["0.weight"])
    may_copy.set()
    stepping.join()
    assert not torch.equal(model[0].weight, before["model"]["0.weight"])
    checkpointer.wait()
    saved = torch.load(tmp_path / name_of(9), weights_only=True)
    for key, value in before["model"].items():
        assert torch.equal(saved["model"][key], value), key
    assert saved["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    for number, state in before["optimizer"]["state"].items():
        assert torch.equal(
            saved["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"]
        )


def test_weights_that_are_not_finite_stop_the_next_step(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = stepped_optimizer(model)
    checkpointer = GroupsCheckpointer(model, str(tmp_path))
    checkpointer.copy_beside(optimizer)
    nn.init.constant_(model.bias, torch.inf)
    save(checkpointer, 9)
    with pytest.raises(FloatingPointError, match=r"weights must be finite .* bias"):
        optimizer.step()
    assert files.newest_whole(str(tmp_path)) == ("", {})


def test_a_snapshot_is_the_same_and_shares_no_memory():
    base = torch.randn(4, 3)
    momentum = torch.randn(2, 5, 6).to(torch.bfloat16).transpose(0, 2)
    modules = OrderedDict(weight=base, tied=base, part=base[1:, :2], empty=torch.empty(0, 2))
    modules._metadata = {"": {"version": 2}}
    state = {
        "model": modules,
        "optimizer": {"state": {0: {"momentum_buffer": momentum}}, "groups": [{"lr": 0.1}]},
        "other": [
            1,
            (2.5, None, "x"),
            {3},
            np.float32(0.5),
            torch.Size([1, 2]),
            b"raw",
            Counter(a=2),
        ],
        "sparse": torch.eye(3).to_sparse(),
    }
    snapshot = Snapshot()
    copied = snapshot.take(state)
    assert copied["model"]._metadata == modules._metadata
    assert list(copied["model"]) == list(modules)
    taken = copied["optimizer"]["state"][0]["momentum_buffer"]
    assert taken.stride() == momentum.stride()
    assert torch.equal(taken, momentum)
    assert copied["other"] == state["other"]
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(3))
    before = base.clone()
    base.zero_()
    assert torch.equal(copied["model"]["part"], before[1:, :2])
    weight = copied["model"]["weight"]
    assert weight.data_ptr() == copied["model"]["tied"].data_ptr() != base.data_ptr()
    again = snapshot.take(state)["model"]["weight"]
    assert again.data_ptr() == weight.data_ptr()  # the memory is used again
    more = snapshot.take({**state, "more": torch.ones(400)})
    assert torch.equal(more["more"], torch.ones(400))
    assert torch.equal(more["model"]["weight"], torch.zeros(4, 3))


def test_a_snapshot_refuses_what_could_not_be_read_safely():
    with pytest.raises(ValueError, match=r"got ndarray in trainer\.hooks\.X\[\]\. Put numbers"):
        Snapshot().take({"trainer": {"hooks": {"X": [np.zeros(2)]}}})


class Loop(TrainerBase):
    """Trains nothing, and evaluates to what it is told."""

    def __init__(self, folder, values, max_iter=40, period=10, keep_last=0):
        super().__init__()
        self.model = nn.Linear(2, 1)
        weak = types.SimpleNamespace(
            state_dict=self.state_dict, load_state_dict=self.load_state_dict
        )
        self.checkpointer = GroupsCheckpointer(
            self.model, str(folder), keep_last=keep_last, trainer=weak
        )
        self.values, self.max_iter, self.start_iter = dict(values), max_iter, 0
        self.register_hooks(
            [
                PeriodicCheckpointer(self.checkpointer, period),
                EvalHook(period, self.evaluate),
                BestCheckpoint(self.checkpointer, "bbox/AP", period),
            ]
        )
        if self.checkpointer.resume_or_load("", resume=True):
            self.start_iter = self.iter + 1

    def evaluate(self):
        done = min(self.iter + 1, self.max_iter)
        return {"bbox": {"AP": self.values[done]}} if done in self.values else {}

    def run_step(self):
        nn.init.constant_(self.model.weight, self.iter)

    def train(self):
        super().train(self.start_iter, self.max_iter)
        self.checkpointer.wait()


def iterations(path):
    state = torch.load(path, weights_only=True)
    weight = int(state["model"]["weight"][0, 0])
    return state["iteration"], state["trainer"]["iteration"], weight


def test_the_best_is_kept_and_the_last_stays_the_last(tmp_path):
    """Over a resumed run: the best of the first part is not forgotten."""
    values = {10: 30.0, 20: 50.0, 30: float("nan"), 40: 40.0}
    Loop(tmp_path, values, keep_last=1).train()
    assert iterations(tmp_path / "model_best.pth") == (19, 19, 19)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    resumed = Loop(tmp_path, {50: 45.0, 60: 60.0}, max_iter=50)
    assert resumed.start_iter == 40
    resumed.train()
    assert iterations(tmp_path / "model_best.pth") == (19, 19, 19)


def test_the_best_of_the_final_evaluation_has_the_last_iteration(tmp_path):
    """Detectron2's BestCheckpointer saves one too many, and a resumed run starts one late."""
    Loop(tmp_path, {20: 1.0, 40: 2.0}).train()
    best = tmp_path / "model_best.pth"
    assert iterations(best) == (39, 39, 39)
    saved = torch.load(best, weights_only=True)
    assert saved["best"] == {"metric": "bbox/AP", "value": 2.0}
    write_last(str(tmp_path), best.name)
    assert Loop(tmp_path, {}, max_iter=50).start_iter == 40


def test_a_broken_off_training_has_no_final_best(tmp_path):
    loop = Loop(tmp_path, {40: 2.0})

    class Fail(HookBase):
        def before_step(self):
            if self.trainer.iter == 15:
                raise FloatingPointError

    loop.register_hooks([Fail()])
    with pytest.raises(FloatingPointError):
        loop.train()
    loop.checkpointer.wait()
    assert {path.name for path in tmp_path.glob("*.pth")} == {name_of(9)}


def test_a_metric_that_is_no_result_is_warned_of(tmp_path, caplog):
    loop = Loop(tmp_path, {10: 1.0})
    loop._hooks[-1]._metric = "bbox/ap"
    with caplog.at_level(logging.WARNING):
        loop.train()
    assert "must be a result of the evaluation, got bbox/ap. There are: bbox/AP." in caplog.text


def test_weights_that_are_not_finite_take_no_checkpoint_s_place(tmp_path):
    model = nn.Linear(2, 2)
    checkpointer = GroupsCheckpointer(model, str(tmp_path))
    save(checkpointer, 9)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"weights must be finite .* weight"):
        save(checkpointer, 19)
    with pytest.raises(FloatingPointError, match="weights must be finite"):
        checkpointer.wait()
    assert files.newest_whole(str(tmp_path))[0].endswith(name_of(9))


def test_the_final_checkpoint_of_a_periodic_step_is_not_written_twice(tmp_path, monkeypatch):
    checkpointer = GroupsCheckpointer(nn.Linear(2, 1), str(tmp_path), keep_last=1)
    for iteration in (9, 19):
        save(checkpointer, iteration)
    checkpointer.save("model_final", iteration=19)
    checkpointer.wait()
    assert (tmp_path / "model_final.pth").samefile(tmp_path / name_of(19))
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    check_whole(str(tmp_path / "model_final.pth"))

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.os, "link", no_links)
    save(checkpointer, 29)
    checkpointer.save("model_final", iteration=29)
    checkpointer.wait()
    check_whole(str(tmp_path / "model_final.pth"))
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 29
    assert not (tmp_path / "model_final.pth").samefile(tmp_path / name_of(29))


def test_a_final_checkpoint_of_another_step_is_written(tmp_path):
    model = nn.Linear(2, 1)
    checkpointer = GroupsCheckpointer(model, str(tmp_path))
    save(checkpointer, 9)
    nn.init.zeros_(model.weight)
    checkpointer.save("model_final", iteration=10)
    checkpointer.wait()
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 10
    assert not state["model"]["weight"].any()
