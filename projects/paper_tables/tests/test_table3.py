import dataclasses

import pytest
import torch
from paper_tables import table3
from paper_tables.mnist import load_mnist
from paper_tables.table3 import Search, Setting, draw_settings, train

SETTING = Setting("adam", 1e-3, "cosine", 0.0, 3, 20, "default", "unit")


@pytest.fixture
def data():
    """Images of ten random prototypes with noise: ten classes that can be learned."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    prototypes = torch.rand(10, 784, generator=generator)
    images = (prototypes[labels] + 0.1 * torch.randn(200, 784, generator=generator)).clamp(0, 1)
    return images, labels, images, labels


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("start", ["he", "xavier"])
def test_the_mlp_learns(data, optimizer, start):
    setting = dataclasses.replace(SETTING, optimizer=optimizer, initialization=start)
    result = train(dataclasses.replace(setting, inputs="standardized"), 64, 0, data)
    assert result["error"] < 10
    assert result == train(dataclasses.replace(setting, inputs="standardized"), 64, 0, data)


def test_one_value_a_group_learns_nothing(data):
    assert train(SETTING, 512, 0, data)["error"] == pytest.approx(90, abs=1)


def test_settings_are_drawn_without_repetition():
    settings = draw_settings(60, 0)
    assert len(set(settings)) == 60
    assert settings != draw_settings(60, 1)


def test_a_search_goes_on_from_its_file(data, tmp_path, monkeypatch):
    few = [dataclasses.replace(SETTING, learning_rate=rate, epochs=1) for rate in (1e-3, 1e-2)]
    monkeypatch.setattr(table3, "draw_settings", lambda count, seed: few)
    runs = []
    monkeypatch.setattr(table3, "train", lambda *run: runs.append(run) or train(*run))
    path = tmp_path / "new" / "search.csv"
    best = Search(path, data).run(2, 0, finalists=1)
    assert len(runs) == 2 + 4 + 30
    again = Search(path, data)
    assert again.run(2, 0, finalists=1) == best
    assert len(runs) == 36
    rows = again.rows(best[0])
    assert [row["G"] for row in rows] == [2**i for i in range(10)]
    assert rows[0]["holds"] == "NO"
    path.write_text("G,error\n")
    with pytest.raises(ValueError, match="must have the columns optimizer"):
        Search(path, data)


def test_missing_mnist_is_named(tmp_path):
    with pytest.raises(ValueError, match="MNIST must be in MNIST/raw"):
        load_mnist(str(tmp_path))
