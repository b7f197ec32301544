"""A run holds what it holds: files, threads and objects stay, and no worker outlives it."""

import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from detectron2.engine import HookBase

from gn_practical.training.engine import Trainer, load_cfg

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("leak", ROOT / "benchmarks/leak.py")
sys.modules["leak"] = leak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leak)


class CountObjects(HookBase):
    """Counts Python's objects and tensors between two evaluations, after all other hooks."""

    def __init__(self, period):
        self.period = period
        self.objects, self.tensors = [], []

    def after_step(self):
        if (self.trainer.iter + 1) % self.period == 0:
            gc.collect()
            found = gc.get_objects()
            self.objects.append(len(found))
            self.tensors.append(sum(issubclass(type(o), torch.Tensor) for o in found))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_evaluations_and_checkpoints_leave_nothing_behind(tmp_path, one_thread):
    """Four rounds of steps, an evaluation and a checkpoint; benchmarks/leak.py is the long form.

    TensorBoard's writer starts its thread at the 20th iteration, in the second round.
    """
    arguments = ["OUTPUT_DIR", str(tmp_path)]
    arguments += leak.tiny_data(str(tmp_path / "scenes"))
    arguments += ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "45", "TEST.EVAL_PERIOD", "11"]
    arguments += ["SOLVER.CHECKPOINT_PERIOD", "11", "DATALOADER.NUM_WORKERS", "0"]
    arguments += ["TEST.NUM_PICTURES", "1"]
    trainer = Trainer(load_cfg(str(leak.CONFIG), arguments))
    watch, counts = leak.Watch(11), CountObjects(11)
    trainer.register_hooks([watch, counts])
    trainer.train()
    _, second, _, fourth = watch.usages
    assert fourth.files <= second.files
    assert fourth.threads <= second.threads
    assert counts.tensors[3] <= counts.tensors[1]
    # What is logged is kept for a while: some 40 scalars an iteration, of two objects at most.
    assert counts.objects[3] - counts.objects[1] < 22 * 40 * 2


def test_the_long_form_finds_what_grows(capsys):
    def usages(**growth):
        steady = {"memory": 1000, "workers_memory": 500, "files": 9, "threads": 4, "workers": 2}
        rows = [
            leak.Usage(n, **{k: v + int(growth.get(k, 0) * n) for k, v in steady.items()})
            for n in range(101)
        ]
        return [*rows[:-1], leak.Usage(100, **{**steady, "workers": growth.get("workers", 0)})]

    assert leak.problems(usages()) == []
    assert "memory grew by 4" in leak.problems(usages(memory=0.8))[0]
    assert "files: " in leak.problems(usages(files=0.1))[0]
    assert leak.problems(usages(workers=2)) == ["2 workers outlived the run"]


EXITS = """
import os, sys
import torch
sys.path.insert(0, "tests")
from tool_train_net import run
from gn_practical.training.engine import setup

torch.set_num_threads(1)
setup.collect_env_info = lambda: ""
arguments, folders = sys.argv[1:-3], sys.argv[-3:]
for folder in folders:  # one import for three runs
    if os.fork() == 0:
        os.makedirs(folder)
        log = os.open(folder + "/printed", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        with open(folder + "/pid", "w") as file:
            file.write(str(os.getpid()))
        run(*arguments, "OUTPUT_DIR", folder)
        sys.exit()
for _ in folders:
    os.wait()
"""


def test_no_worker_outlives_any_exit(tmp_path):
    """Of a run that is asked to stop, one that is killed, and one that meets a broken image."""
    arguments = ["--config-file", str(leak.CONFIG), *leak.tiny_data(str(tmp_path / "scenes"))]
    arguments += ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "2", "DATASETS.TEST", "()"]
    arguments += ["SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000"]
    folders = [tmp_path / name for name in ("asked", "killed", "broken")]
    (tmp_path / "exits.py").write_text(EXITS)
    command = [sys.executable, tmp_path / "exits.py", *arguments, *folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as parent:
        try:
            runs = [psutil.Process(int(wait_for(folder / "pid"))) for folder in folders]
            workers = [started_workers(run) for run in runs]
            wait_for(folders[0] / "metrics.json")
            runs[0].send_signal(signal.SIGTERM)
            runs[1].kill()
            for image in (tmp_path / "scenes/images/train").iterdir():
                image.write_bytes(b"no image")
            parent.wait(timeout=120)
            _, alive = psutil.wait_procs([w for some in workers for w in some], timeout=10)
            assert not alive
        finally:
            if parent.poll() is None:
                for process in (*psutil.Process(parent.pid).children(recursive=True), parent):
                    process.kill()
    assert "must be a whole image" in (folders[2] / "printed").read_text()


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.1)
    return path.read_text()


def started_workers(run, seconds=120):
    end = time.monotonic() + seconds
    while len(run.children()) < 2:
        assert time.monotonic() < end, "no workers"
        time.sleep(0.05)
    return run.children()
