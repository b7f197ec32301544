"""Files are replaced whole or not at all, and one rank's error is every rank's."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from detectron2.utils import comm

from gn_practical.atomic import replace_file, write_json
from gn_practical.training.ranks import raise_on_all_ranks


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    write_json(path, {"b": 2}, indent=1)
    assert json.loads(path.read_text()) == {"b": 2}
    assert os.listdir(tmp_path) == ["a.json"]


def _write_half(path):
    with open(path, "w") as file:
        file.write("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_write_leaves_what_was_there(tmp_path, durable):
    path = tmp_path / "a.txt"
    path.write_text("old")
    writing = replace_file(path, durable)
    with pytest.raises(KeyboardInterrupt), writing as temporary:
        _write_half(temporary)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_values_that_json_lacks_leave_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"), allow_nan=False)
    assert path.read_text() == "1\n"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_replaced_and_what_it_shares_is_not(tmp_path, link):
    (tmp_path / "source").write_text("source")
    link(tmp_path / "source", tmp_path / "link")
    link(tmp_path / "source", tmp_path / "link.tmp")
    with replace_file(tmp_path / "link") as temporary, open(temporary, "w") as file:
        file.write("new")
    assert (tmp_path / "source").read_text() == "source"
    assert (tmp_path / "link").read_text() == "new"


def test_the_folder_of_a_json_is_made(tmp_path):
    write_json(tmp_path / "a" / "b.json", 1)
    assert (tmp_path / "a" / "b.json").exists()


def test_one_rank_raises_as_before():
    with raise_on_all_ranks(ValueError):
        pass
    with pytest.raises(FileNotFoundError), raise_on_all_ranks(OSError):
        raise FileNotFoundError("a subclass stays what it is")
    with pytest.raises(KeyError), raise_on_all_ranks(OSError):
        raise KeyError("another kind goes through")


def test_an_error_of_one_rank_is_raised_on_all(monkeypatch):
    texts, barrier, local = [None, None], threading.Barrier(2, timeout=30), threading.local()

    def all_gather(text):
        texts[local.rank] = text
        barrier.wait()
        return texts

    def run(rank):
        local.rank = rank
        with raise_on_all_ranks(ValueError):
            if rank == 1:
                raise ValueError("only rank 1 saw it")

    monkeypatch.setattr(comm, "all_gather", all_gather)
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(run, rank) for rank in (0, 1)]
    assert [repr(each.exception()) for each in started] == ["ValueError('only rank 1 saw it')"] * 2
