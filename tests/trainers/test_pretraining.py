"""Pretraining on a small pack of its own making: packing, tasks, episodes, losses, resuming."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.models.matchseg import load_weights
from lib.models.network import Output
from lib.trainers.pretraining.episodes import EpisodeMaker
from lib.trainers.pretraining.loop import TrainingPlan, train
from lib.trainers.pretraining.losses import episode_loss, soft_dice
from lib.trainers.pretraining.pack import Pack, pack
from lib.trainers.pretraining.tasks import Task, TaskSource


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of discs on noise; only one of them may be trained on."""
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    index = {}
    for name, allowed in (("discs", True), ("forbidden", False)):
        (data / name / "labels" / "final").mkdir(parents=True)
        keys = []
        for i in range(8):
            y, x = np.mgrid[:80, :100]
            disc = (x - rng.integers(30, 70)) ** 2 + (y - rng.integers(30, 50)) ** 2 < 300
            picture = (40 + 150 * disc + rng.normal(0, 10, disc.shape)).clip(0, 255)
            Image.fromarray(picture.astype(np.uint8)).save(data / name / f"{i}.png")
            Image.fromarray(disc.astype(np.uint8)).save(
                data / name / "labels" / "final" / f"{i}.png"
            )
            keys.append(str(i))
        index[name] = {
            "train_ok": allowed,
            "labels": {"1": "disc"},
            "bank": keys[:5],
            "targets": keys[5:],
        }
    (data / "index.json").write_text(json.dumps(index))
    target = data / "pack.zip"
    assert pack(data, target) == ["discs"]
    return target


def test_a_pack_holds_only_what_may_be_trained_on_and_keeps_the_split(packed: Path) -> None:
    (only,) = Pack(packed).sets
    assert (only.name, only.labels) == ("discs", (1,))
    assert only.train == ("0", "1", "2", "3", "4")
    assert only.held_out == ("5", "6", "7")
    picture, labels = Pack(packed).read("discs", "train", "0")
    assert picture.shape == labels.shape == (80, 100)
    assert picture[labels == 1].mean() > picture[labels == 0].mean() + 100


@pytest.mark.parametrize(("synthetic", "regions"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_every_family_gives_images_in_range_and_labels_to_find(
    packed: Path, synthetic: float, regions: float
) -> None:
    source = TaskSource(Pack(packed), size=64, seed=1)
    maker = EpisodeMaker(size=64, seed=1)
    found = 0
    for _ in range(12):
        task = source.draw(4, synthetic=synthetic, regions=regions)
        side = 80 if synthetic else source.side
        assert task.images.shape == (4, 3, side, side)
        assert float(task.images.min()) >= 0
        assert float(task.images.max()) <= 1.0001
        episode = maker.make(task, most_supports=3, queries=2)
        assert episode.images.shape == (4, 3, 64, 64)
        assert bool(torch.isfinite(episode.images).all())
        assert bool((episode.masks.sum(1) <= 1).all())  # labels exclude each other
        assert bool(episode.known.any(1).all())  # each label is known to a reference
        for query, supports in enumerate(episode.supports.tolist()):
            assert query not in supports
        found += int(episode.masks.any())
    assert found >= 9


def test_the_same_seed_draws_the_same_tasks(packed: Path) -> None:
    draws = []
    for _ in range(2):
        source, maker = TaskSource(Pack(packed), size=64, seed=7), EpisodeMaker(size=64, seed=7)
        for _ in range(3):
            task = source.draw(4, synthetic=0.4, regions=0.2)
        draws.append(maker.make(task, most_supports=3, queries=2))
    torch.testing.assert_close(draws[0].images, draws[1].images)
    assert bool((draws[0].masks == draws[1].masks).all())


def test_in_one_place_what_is_bright_stays_bright() -> None:
    images = torch.full((4, 3, 64, 64), 0.3)
    labels = torch.zeros(4, 64, 64, dtype=torch.long)
    images[:, :, 24:44, 20:48], labels[:, 24:44, 20:48] = 0.7, 1

    def stays(seed: int, *, one_place: float) -> bool:
        maker = EpisodeMaker(size=64, seed=seed, one_place=one_place)
        made = maker.make(Task(images, labels, 0.5, False, "bars"), most_supports=3, queries=4)
        grey, masks = made.images.mean(1), made.masks[:, 0] > 0
        shown = [i for i in range(4) if bool(masks[i].any())]
        return all(bool(grey[i][masks[i]].mean() > grey[i][~masks[i]].mean()) for i in shown)

    assert all(stays(seed, one_place=1.0) for seed in range(30))
    never, half = (sum(stays(seed, one_place=share) for seed in range(30)) for share in (0.0, 0.5))
    assert never < half < 30


def perfect(masks: torch.Tensor, gain: float) -> Output:
    small = torch.nn.functional.avg_pool2d(masks, 8)
    votes = torch.cat([small, 1 - small.sum(1, keepdim=True)], 1)[:, None]
    there = masks.amax((2, 3)) * 2 - 1
    return Output(gain * (masks * 2 - 1), votes, small, gain * there, gain * torch.ones_like(there))


def test_a_perfect_prediction_has_next_to_no_loss_and_its_opposite_much() -> None:
    masks = torch.zeros(2, 2, 64, 64)
    masks[:, 0, 8:32, 8:32] = 1
    masks[0, 1, 40:56, 16:48] = 1
    good, dice = episode_loss(perfect(masks, 20.0), masks)
    bad, _ = episode_loss(perfect(masks, -20.0), masks)
    assert float(good) < 0.02
    assert float(dice) > 0.999
    assert float(bad) > 5


def test_soft_dice_by_hand() -> None:
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    half = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert float(soft_dice(half, mask)) == pytest.approx((2 * 1.0 + 1) / (2.0 + 2.0 + 1))


def test_a_stopped_run_goes_on_where_it_was(packed: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(minutes=0.03, total_minutes=1, size=64, images=3, queries=2, episodes=1)
    weights = train(Pack(packed), tmp_path, plan, encoder=None, start=None)
    first = load_weights(weights).state_dict()
    with (tmp_path / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, len(steps) + 1))
    train(Pack(packed), tmp_path, plan, encoder=None, start=None)
    with (tmp_path / "log.csv").open() as file:
        again = [int(row["step"]) for row in csv.DictReader(file)]
    assert len(again) > len(steps)
    assert again == list(range(1, len(again) + 1))
    second = load_weights(weights).state_dict()
    assert any(bool((second[k] != first[k]).any()) for k in first)


def test_held_out_pictures_are_scored_and_drawn(packed: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(minutes=0.03, total_minutes=1, size=64, images=3, queries=2, episodes=1)
    train(Pack(packed), tmp_path, plan, encoder=None, start=None)
    with (tmp_path / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["set"] for row in rows] == ["discs"]
    assert 0 <= float(rows[0]["dice"]) <= 1
    page = (tmp_path / "progress.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_a_run_that_is_told_to_stop_saves_what_it_has(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lib.trainers.pretraining", "train", "--data", str(packed)]
    command += ["--out", str(tmp_path), "--size", "64", "--images", "3", "--minutes", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log.csv"
    deadline = time.monotonic() + 90
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step == len(log.read_text().splitlines()) - 1
