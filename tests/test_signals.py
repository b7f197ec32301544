"""What a process does with the signals that ask it to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gn_practical.training.engine.launch import _exit_code
from gn_practical.training.engine.signals import (
    EXIT_INTERRUPTED,
    STOP_SIGNALS,
    Interrupted,
    StopSignals,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stop():
    signals = StopSignals()
    with signals.handled():
        yield signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_nothing_until_it_is_asked_for(stop, number, capfd):
    stop.check()
    send(number)
    assert stop.received is number
    assert f"{number.name}: stopping where nothing is lost" in capfd.readouterr().err
    with pytest.raises(Interrupted) as stopped:
        stop.check()
    assert stopped.value.code == EXIT_INTERRUPTED == 75


def test_an_error_of_a_stopped_run_counts_as_stopped():
    """As when a rank that was stopped too is waited for."""
    stop = StopSignals()

    def fail(stopped):
        with stop.handled():
            if stopped:
                send(signal.SIGTERM)
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(Interrupted):
        fail(stopped=True)
    with pytest.raises(RuntimeError, match="reset"):
        fail(stopped=False)


def test_what_came_before_the_training_began_is_kept(stop):
    send(signal.SIGUSR1)
    with stop.handled():  # as Trainer.train, within the run
        assert stop.received is signal.SIGUSR1


def test_a_signal_of_one_run_does_not_stop_the_next():
    stop = StopSignals()
    with stop.handled():
        send(signal.SIGTERM)
    stop.check()


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals().handled():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def fork(body):
    """Run a function in a forked process, signals held; return its id. Its code at the end is 3."""
    child = os.fork()
    if child:
        return child
    signals = StopSignals()
    try:
        with signals.handled():
            body()
    finally:
        os._exit(3)


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_ends_the_process():
    ready, tell = os.pipe()

    def wait():
        os.write(tell, b"ready")
        while True:
            time.sleep(0.1)

    child = fork(wait)
    assert os.read(ready, 5) == b"ready"
    os.kill(child, signal.SIGTERM)
    time.sleep(1.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert code_of(child) == EXIT_INTERRUPTED


def test_the_same_request_by_way_of_terminal_and_launcher_counts_once():
    def receive_both():
        send(signal.SIGINT)
        send(signal.SIGTERM)

    assert code_of(fork(receive_both)) == 3


def test_a_worker_leaves_signals_to_its_rank(stop):
    child = os.fork()
    if not child:
        send(signal.SIGTERM)
        os._exit(int(stop.received is not None))
    assert code_of(child) == 0


def test_launcher_tells_by_its_exit_code_what_ended_a_rank(capsys):
    from torch.multiprocessing import ProcessExitedException

    def code(exit_code, passed_on=(), name=None):
        error = ProcessExitedException("", 1, 4321, exit_code, name)
        return _exit_code(error, set(passed_on))

    assert code(EXIT_INTERRUPTED) == EXIT_INTERRUPTED
    assert code(1) == 1
    assert code(-15, passed_on=[15]) == EXIT_INTERRUPTED
    assert code(-9, name="SIGKILL") == 137
    assert "rank 1 was killed by SIGKILL" in capsys.readouterr().err


SET_UP = """
import os, random, signal, sys, threading, time
sys.path.insert(0, "tests")
import torch
from tool_train_net import run
from gn_practical.training.engine import hooks, setup, signals

torch.set_num_threads(1)
setup.collect_env_info = lambda: ""
hooks.plot_metrics = lambda *paths: None
output, tries, longest = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for number in range(tries):
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    parent, delay = os.getpid(), longest * (number + random.random()) / tries
    handled = signals.stop_signals_to

    def stop_signals_to(handler):
        # The clock starts with the handlers: before them Python's own end the process.
        threading.Timer(delay, os.kill, (parent, signal.SIGTERM)).start()
        return handled(handler)

    signals.stop_signals_to = stop_signals_to
    log = os.open(output + "/printed", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 0
    try:
        run(*sys.argv[4:], "OUTPUT_DIR", f"{output}/{number}")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else print(end.code) or 1
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


def test_a_signal_at_any_moment_of_set_up_stops_the_run_and_loses_nothing(tmp_path):
    """Ten signals, spread over set-up and the first steps: every one ends with 75."""
    (tmp_path / "set_up.py").write_text(SET_UP)
    config = [*("--config-file", ROOT / "configs/quickstart/tiny.yaml", "MODEL.DEVICE", "cpu")]
    config += ["DATASETS.TRAIN", "('scenes_val_panoptic_separated',)", "DATASETS.TEST", "()"]
    config += ["SOLVER.MAX_ITER", 10**6, "DATALOADER.NUM_WORKERS", 0]
    command = [sys.executable, tmp_path / "set_up.py", tmp_path, 10, 1.0, *config]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    printed = (tmp_path / "printed").read_text()
    assert done.stdout.split() == ["75"] * 10, printed[-3000:] + done.stderr[-3000:]
    assert "error:" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (EXIT_INTERRUPTED, True)])
def test_slurm_script_requeues_what_was_stopped(tmp_path, code, requeued):
    srun = f'#!/bin/sh\nshift\necho "$SLURM_NODEID: $*" > {tmp_path}/command\nexit {code}\n'
    scontrol = f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho node1\n'
    for name, text in {"srun": srun, "scontrol": scontrol}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "0"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ROOT / "tools/slurm/train.sh"
    done = subprocess.run(["sh", script, "--config-file", "a.yaml"], env=environment, check=False)
    assert done.returncode == code
    assert (tmp_path / "command").read_text().endswith("train_net --config-file a.yaml\n")
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == requeued
