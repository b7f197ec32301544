"""Python configs train, stop, resume and are evaluated as YAML configs are."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation import DatasetEvaluator
from tool_train_net import load, run

from gn_practical.training.data import DatasetError, ensure_scenes
from gn_practical.training.data.loader import TrainLoader
from gn_practical.training.evaluation.panoptic import PanopticEvaluator
from gn_practical.training.lazy import LazyTrainer, load_lazy_config
from gn_practical.weights import config_from_checkpoint, load_description

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests/lazy_tiny.py"
FILES = ("images/{}", "panoptic_{}", "panoptic_{}.json", "panoptic_stuff_{}", "instances_{}.json")
TOOL = load("lazyconfig_train_net")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    ensure_scenes(root, {"train": 5, "val": 2}, size=64)
    return [
        [f"few_{split}", *(str(root / name.format(split)) for name in FILES)]
        for split in ("train", "val")
    ]


@pytest.fixture
def words(scenes, tmp_path, catalogs_as_before, monkeypatch):
    """Overrides of a run of three iterations on these data."""
    monkeypatch.setattr("gn_practical.training.engine.setup.collect_env_info", lambda: "")
    monkeypatch.setattr("gn_practical.training.engine.hooks.plot_metrics", lambda *_: None)
    return [
        f"datasets.coco_panoptic={json.dumps(scenes)}",
        "dataloader.train.dataset.names=few_train_separated",
        "dataloader.test.dataset.names=few_val_separated",
        *("train.max_iter=3", "train.seed=5", "train.eval_period=0", "train.num_pictures=0"),
        f"train.output_dir={tmp_path / 'out'}",
    ]


def train(*words, config=TINY):
    torch.manual_seed(0)  # the same first weights
    return run("--config-file", config, *words, tool=TOOL)


def final(folder):
    state = torch.load(Path(folder) / "model_final.pth", weights_only=True)
    return {key: state[key] for key in ("model", "trainer", "iteration", "training_state")}


def equal(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_it_ends_with_the_bits_of_the_yaml_config(words, scenes, tmp_path):
    train(*words, "dataloader.evaluator=null", "lr_multiplier.warmup_length=0")
    yaml_words = [
        *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "DATASETS.COCO_PANOPTIC", scenes),
        *("DATASETS.TRAIN", "('few_train_separated',)", "DATASETS.TEST", "()", "SEED", 5),
        *("SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 0, "OUTPUT_DIR", tmp_path / "yaml"),
    ]
    torch.manual_seed(0)
    run("--config-file", ROOT / "configs/quickstart/tiny.yaml", *yaml_words)
    ours, theirs = final(tmp_path / "out"), final(tmp_path / "yaml")
    assert equal(ours["model"], theirs["model"])
    assert equal(ours["training_state"], theirs["training_state"])


def test_a_run_stopped_twice_ends_with_the_same_bits(words, tmp_path, monkeypatch):
    train(*words, "dataloader.evaluator=null")
    stops = iter([0, 1, None])
    words[-1] = f"train.output_dir={tmp_path / 'stopped'}"
    run_step = LazyTrainer.run_step

    def stopping(self):
        run_step(self)
        if self.iter == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LazyTrainer, "run_step", stopping)
    for stop in stops:
        monkeypatch.setattr(LazyTrainer, "stop_at", stop, raising=False)
        with pytest.raises(SystemExit) if stop is not None else nullcontext() as stopped:
            train("--resume", *words, "dataloader.evaluator=null", "dataloader.train.num_workers=1")
        assert stop is None or stopped.value.code == 75
    assert equal(final(tmp_path / "stopped"), final(tmp_path / "out"))


def test_a_checkpoint_knows_its_config_and_is_evaluated_with_pictures(words, tmp_path, capfd):
    once = [word for word in words if "max_iter" not in word and "num_pictures" not in word]
    train(*once, "train.max_iter=1", "train.num_pictures=1")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {"bbox", "segm", "sem_seg", "panoptic_seg"}
    assert len(list((tmp_path / "out/pictures").iterdir())) == 1
    weights = tmp_path / "out/model_final.pth"
    described = load_description(str(weights))
    assert described.lazy_config == (tmp_path / "out/config.yaml").read_text()
    assert described.config is None
    assert described.resize == {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 1333}
    assert described.class_names["thing"][0] == "disc"
    assert len(described.num_groups) == 70
    with pytest.raises(ValueError, match=r"trained by a Python config .*--config-file"):
        config_from_checkpoint(str(weights))

    # The saved config is one that can be run, and refers to the same model.
    evaluated = train(
        "--eval-only",
        *words,
        f"train.init_checkpoint={weights}",
        f"train.output_dir={tmp_path / 'evaluated'}",
        config=tmp_path / "out/config.yaml",
    )
    assert evaluated["sem_seg"]["mIoU"] == results["sem_seg"]["mIoU"] > 0
    assert "Results (" in capfd.readouterr().out
    other = [f"train.init_checkpoint={weights}", "pgn.num_groups=1"]
    with pytest.raises(SystemExit, match=r"as its weights were trained for evaluation"):
        train("--eval-only", *words, *other)


ZOO = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py": ["ws.enabled=True"],
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py": ["model.sem_seg_head.num_classes=5"],
    "COCO-Detection/retinanet_R_50_FPN_1x.py": ["model.num_classes=5", "+model.head.norm=PGN"],
    "new_baselines/mask_rcnn_R_50_FPN_50ep_LSJ.py": [
        *("model.roi_heads.box_head.conv_norm=PGN", "model.roi_heads.mask_head.conv_norm=PGN"),
        *("dataloader.train.mapper.augmentations.0.target_width=64", "train.amp.dtype=bfloat16"),
        *("dataloader.train.mapper.augmentations.0.target_height=64",),
        "dataloader.train.mapper.augmentations.1.crop_size=[64,64]",
    ],
}


@pytest.mark.parametrize("name", ZOO)
def test_configs_of_detectron2_train(words, name, tmp_path):
    small = [
        *("model.backbone.bottom_up.stages.depth=18", "model.backbone.bottom_up.freeze_at=0"),
        *("model.backbone.bottom_up.stages.norm=PGN", "model.backbone.bottom_up.stem.norm=PGN"),
        *("model.backbone.norm=PGN", "train.init_checkpoint=''", "train.device=cpu"),
        *("dataloader.train.mapper.instance_mask_format=bitmask", "dataloader.train.num_workers=0"),
        *("dataloader.train.total_batch_size=2", "dataloader.evaluator=null", "train.max_iter=2"),
    ]
    if "LSJ" not in name:
        small.append("dataloader.train.mapper.augmentations.0.short_edge_length=[64]")
    if "Detection" not in name:
        small += ["model.roi_heads.num_classes=5", "model.roi_heads.batch_size_per_image=8"]
        small += ["model.roi_heads.box_head.fc_dims=[8]", "model.roi_heads.mask_head.conv_dims=[8]"]
        small += ["model.roi_heads.box_predictor.input_shape.channels=8"]
    if "retinanet" in name:
        small.append("model.backbone.top_block.in_channels=512")
    config = tmp_path / "config.py"
    config.write_text(
        f"from detectron2 import model_zoo\n"
        f"globals().update(model_zoo.get_config({name!r}))\n"
        f"del model.backbone.bottom_up.stages.stride_in_1x1\n"
    )
    train(*words, *small, *ZOO[name], config=config)
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 1
    assert json.loads((tmp_path / "out/num_groups.json").read_text())
    assert (tmp_path / "out/model_final.pth").is_file()


class Endless:
    """A loader of somebody's own, without positions."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from build_detection_train_loader(
            self.dataset, mapper=lambda entry: entry, total_batch_size=1
        )


def test_loaders_and_evaluators_of_detectron2_are_replaced_and_others_left(words):
    cfg = load_lazy_config(str(TINY), words)
    assert isinstance(LazyTrainer.build_train_loader(cfg), TrainLoader)
    evaluators = LazyTrainer.build_evaluator(cfg, "few_val_separated")._evaluators
    assert isinstance(evaluators[2], PanopticEvaluator)
    cfg.lazy.dataloader.train._target_ = Endless
    for key in list(cfg.lazy.dataloader.train):
        if key not in ("_target_", "dataset"):
            del cfg.lazy.dataloader.train[key]
    assert isinstance(LazyTrainer.build_train_loader(cfg), Endless)
    cfg.lazy.dataloader.evaluator = {"_target_": DatasetEvaluator}
    assert type(LazyTrainer.build_evaluator(cfg, "few_val_separated")) is DatasetEvaluator


def test_a_file_that_cannot_be_read_is_named_and_may_be_skipped(words, scenes, tmp_path):
    broken = tmp_path / "images"
    shutil.copytree(scenes[0][1], broken)
    first = sorted(broken.iterdir())[0]
    first.write_bytes(first.read_bytes()[:200])
    words[0] = f"datasets.coco_panoptic={json.dumps([['cut', str(broken), *scenes[0][2:]]])}"
    words[1] = "dataloader.train.dataset.names=cut_separated"

    def images(*more):
        cfg = load_lazy_config(str(TINY), [*words, "dataloader.evaluator=null", *more])
        loader = iter(LazyTrainer.build_train_loader(cfg))
        return [sample["file_name"] for _ in range(5) for sample in next(loader)]

    with pytest.raises(DatasetError, match=rf"{first.name} must be a whole image"):
        images()
    (tmp_path / "out").mkdir()
    assert str(first) not in images("train.max_skipped_samples=1")
    skipped = json.loads((tmp_path / "out/skipped_samples.json").read_text())
    assert skipped["file_name"] == str(first)


def test_a_sampler_of_the_config_is_kept_and_follows_the_seed(words):
    frequency = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    sampler = LazyCall(RepeatFactorTrainingSampler)(
        repeat_factors=LazyCall(frequency)(
            dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.5
        )
    )

    def indices(seed):
        cfg = load_lazy_config(str(TINY), [*words, f"train.seed={seed}"])
        cfg.lazy.dataloader.train.sampler = sampler
        loader = LazyTrainer.build_train_loader(cfg)
        assert isinstance(loader.stream.sampler, RepeatFactorTrainingSampler)
        return [index for batch in islice(loader.stream, 8) for _, index in batch]

    assert indices(1) == indices(1) != indices(2)


def test_each_data_set_to_test_has_its_loader_evaluators_and_folders(words, tmp_path):
    words[2] = "dataloader.test.dataset.names=[few_val_separated,few_train_separated]"
    cfg = load_lazy_config(str(TINY), [*words, "train.num_pictures=1"])
    assert cfg.DATASETS.TEST == ("few_val_separated", "few_train_separated")
    assert [len(LazyTrainer.build_test_loader(cfg, name)) for name in cfg.DATASETS.TEST] == [2, 5]
    folders = {
        part._output_dir
        for name in cfg.DATASETS.TEST
        for part in LazyTrainer.build_evaluator(cfg, name)._evaluators
    }
    kinds = [tmp_path / "out" / kind for kind in ("inference", "pictures")]
    assert folders == {str(kind / name) for kind in kinds for name in cfg.DATASETS.TEST}
    assert list(cfg.lazy.dataloader.test.dataset.names) == list(cfg.DATASETS.TEST)


def test_losses_are_written_as_often_and_logs_in_the_words_of_the_config(words, tmp_path):
    train(*words, "dataloader.evaluator=null", "train.log_period=1", "train.best_metric=no/AP")
    log = (tmp_path / "out/log.txt").read_text()
    assert "train.best_metric must be a result of the evaluation, got no/AP" in log
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]
