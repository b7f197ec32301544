"""What a process does with the signals that ask it to stop."""

import os
import signal
import subprocess
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


@pytest.fixture
def stop():
    signals = StopSignals()
    with signals.handled():
        yield signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_where_nothing_is_lost_a_signal_stops_at_once(stop, number):
    with pytest.raises(Interrupted) as stopped:
        send(number)
    assert stopped.value.code == EXIT_INTERRUPTED == 75
    assert stop.received is number


def test_a_step_is_finished_first(stop, capfd):
    with stop.held():
        send(signal.SIGUSR1)
        assert stop.received is signal.SIGUSR1
    assert "SIGUSR1: stopping after this step" in capfd.readouterr().err


def test_an_evaluation_within_training_is_left_at_once(stop):
    with stop.held():
        with pytest.raises(Interrupted), stop.held(False):
            send(signal.SIGTERM)
        with pytest.raises(Interrupted), stop.held(False):
            raise AssertionError("not reached: the signal has come before")
        stop.received = None
        send(signal.SIGTERM)  # held again


def test_an_evaluation_that_fails_for_a_stopped_rank_counts_as_stopped(stop):
    def fail(received):
        with stop.held(False):
            stop.received = received
            raise RuntimeError("Connection reset by peer")

    with stop.held(), pytest.raises(Interrupted):
        fail(signal.SIGTERM)
    stop.received = None
    with pytest.raises(RuntimeError, match="reset"):
        fail(None)


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
        with signals.handled(), signals.held():
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
    with stop.held():
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
    assert "rank 1 was killed by SIGKILL" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (EXIT_INTERRUPTED, True)])
def test_slurm_script_requeues_what_was_stopped(tmp_path, code, requeued):
    srun = f'#!/bin/sh\nshift\necho "$SLURM_NODEID: $*" > {tmp_path}/command\nexit {code}\n'
    scontrol = f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho node1\n'
    for name, text in {"srun": srun, "scontrol": scontrol}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "0"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = Path(__file__).parent.parent / "tools/slurm/train.sh"
    done = subprocess.run(["sh", script, "--config-file", "a.yaml"], env=environment, check=False)
    assert done.returncode == code
    assert (tmp_path / "command").read_text().endswith("train_net --config-file a.yaml\n")
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == requeued
