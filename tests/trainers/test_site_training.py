"""Training of a site's own model: packed cases, split, episodes, the loop; on discs in noise."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from lib.errors import RequestError, TrainingError
from lib.models.matchseg import BUNDLED, MatchSegSegmenter, load_weights, save_weights
from lib.models.network import MatchSegNet, NetworkConfig
from lib.settings import RefSegSettings
from lib.site.serving import SiteModel
from lib.site.store import ModelCard, ModelStore
from lib.trainers.matchseg import parse_options
from lib.trainers.pretraining.loop import forward
from lib.trainers.site.blending import blend, mix
from lib.trainers.site.distributed import Ranks, run_on
from lib.trainers.site.episodes import EpisodePlan, SiteEpisodes
from lib.trainers.site.fitting import TrainOptions, fit, refit
from lib.trainers.site.loop import BEST, CHECKPOINT, LAST, SiteJob, SitePlan, _step, train_site
from lib.trainers.site.packing import (
    MOST_SLICES,
    SIDE,
    PackedCase,
    Rules,
    pack_cases,
    pack_unlabelled,
)
from lib.trainers.site.progress import LOG, PROGRESS, read_epochs
from lib.trainers.site.split import groups_of, split
from lib.trainers.site.training import train_model
from lib.trainers.site.validation import Validation, Validator, volume_of
from lib.types import LabelledImage

SMALL = NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8)
CPU = torch.device("cpu")
PLAN = EpisodePlan(size=64, images=3, queries=2, most_supports=2)


def disc(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:72, :90]
    return (x - rng.integers(25, 65)) ** 2 + (y - rng.integers(25, 47)) ** 2 < 200


def write_case(folder: Path, seed: int, *, like: int | None = None, name: str = "disc") -> Any:
    """A picture and its label; `like`: nearly the same picture as that of another seed."""
    source = seed if like is None else like
    rng = np.random.default_rng(100 + source)
    picture = 40 + 150 * disc(source) + rng.normal(0, 10, (72, 90))
    smooth = np.kron(rng.normal(0, 30, (9, 9)), np.ones((8, 10)))  # each has its own background
    picture = picture + smooth + np.random.default_rng(seed).normal(0, 1, picture.shape)
    image, label = folder / f"{seed}.png", folder / f"{seed}.label.png"
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(image)
    Image.fromarray(disc(source).astype(np.uint8)).save(label)
    return LabelledImage(str(seed), image, label, {1: name})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledImage]:
    folder = tmp_path_factory.mktemp("site")
    return [write_case(folder, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def cases(
    labelled: list[LabelledImage], tmp_path_factory: pytest.TempPathFactory
) -> list[PackedCase]:
    return pack_cases(labelled, tmp_path_factory.mktemp("packed"), Rules())


def job(folder: Path, cases: Sequence[PackedCase], **plan: Any) -> SiteJob:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    start = folder.parent / "start.safetensors"
    if not start.exists():
        save_weights(MatchSegNet(SMALL), start)
    return SiteJob(
        folder=folder,
        start=start,
        config=SMALL,
        training=tuple(cases[:4]),
        validation=tuple(cases[4:]),
        unlabelled=None,
        plan=SitePlan(**{"steps": 2, "images": 3, "epochs": 2, **plan}),
        settings=RefSegSettings(device="cpu"),
        mark="the same",
        process="nobody:0",
        total=2,
    )


# -- packing --------------------------------------------------------------------------------------


def test_a_sparsely_labelled_volume_gives_its_annotated_slices_alone(tmp_path: Path) -> None:
    image, label = tmp_path / "v.nii.gz", tmp_path / "l.nii.gz"
    values = np.zeros((40, 30, 90), np.uint8)
    values[5:20, 5:20, 7] = 3
    values[5:20, 5:20, 9] = 5
    voxels = np.random.default_rng(0).normal(0, 1, values.shape).astype(np.float32)
    affine = np.diag([-1, -1, 4, 1])
    nib.save(nib.Nifti1Image(voxels, affine), image)
    nib.save(nib.Nifti1Image(values, affine), label)
    one = LabelledImage("v", image, label, {3: "liver", 5: "kidney"})
    (case,) = pack_cases([one], tmp_path / "packed", Rules())
    assert len(case) == 2
    assert case.labels == ("kidney", "liver")
    assert sorted(map(tuple, case.present.tolist())) == [(False, True), (True, False)]
    assert case.picture(0).shape == (SIDE, SIDE, 1)
    assert {0, 1, 2} == {int(v) for row in (0, 1) for v in np.unique(case.label_map(row))}
    # one is from slice 7 and one from slice 9: measured side by side they are no neighbors
    assert not volume_of(case, [0, 1]).adjacent
    share = float((case.label_map(0) > 0).mean())
    assert share == pytest.approx(15 * 15 / (40 * 30), rel=0.05)
    (whole,) = pack_cases([one], tmp_path / "packed", Rules("complete"))
    assert len(whole) == MOST_SLICES


def test_a_damaged_image_is_left_out_and_files_of_gone_labels_are_deleted(
    labelled: list[LabelledImage], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = LabelledImage("broken", broken, labelled[0].label_path, {})
    gone = LabelledImage("gone", labelled[2].image_path, tmp_path / "gone.png", {})
    found = pack_cases([*labelled[:2], bad, gone], tmp_path / "packed", Rules())
    assert [case.image_id for case in found] == ["0", "1"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    pack_cases(labelled[:1], tmp_path / "packed", Rules())
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    assert len(before) == 4
    assert len(after) == 2
    assert after.items() <= before.items()  # what is there is used as it is


# -- split ----------------------------------------------------------------------------------------


def test_pictures_that_look_the_same_are_never_on_both_sides(tmp_path: Path) -> None:
    pairs = [(seed, None) for seed in range(5)] + [(10 + seed, seed) for seed in range(5)]
    rows = [write_case(tmp_path, seed, like=like) for seed, like in pairs]
    twins = pack_cases(rows, tmp_path / "packed", Rules())
    assert sorted(map(sorted, groups_of(twins))) == [[i, i + 5] for i in range(5)]
    for seed in range(8):
        found = split(twins, share=0.3, seed=seed)
        assert {i % 5 for i in found.training} & {i % 5 for i in found.validation} == set()
        assert len(found.validation) >= 2
        assert sorted(found.training + found.validation) == list(range(10))


def test_one_image_to_measure_by_is_kept_of_four_alone(cases: list[PackedCase]) -> None:
    kept = {n: len(split(cases[:n], share=0.2, seed=0).validation) for n in range(4, 7)}
    assert kept == {4: 1, 5: 2, 6: 2}


def test_what_an_earlier_model_learned_from_is_never_measured_on(cases: list[PackedCase]) -> None:
    for seed in range(8):
        found = split(cases, share=0.5, seed=seed, learned={"0", "1", "2"})
        assert set(found.validation) <= {3, 4, 5}
    with pytest.raises(TrainingError, match="learned from by the model in use"):
        split(cases, share=0.5, seed=0, learned={str(n) for n in range(6)})


def test_a_label_that_one_image_alone_shows_is_learned_from(tmp_path: Path) -> None:
    rows = [write_case(tmp_path, seed, name="rare" if seed == 2 else "disc") for seed in range(6)]
    found = pack_cases(rows, tmp_path / "packed", Rules())
    assert all(2 in split(found, share=0.5, seed=seed).training for seed in range(8))


def test_fewer_than_four_labelled_images_are_refused_with_a_sentence(
    labelled: list[LabelledImage], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="3 images are labelled; training needs 4"):
        fit(labelled[:3], tmp_path, TrainOptions(), RefSegSettings(device="cpu"))


def test_labels_that_show_nothing_are_refused_with_a_sentence(tmp_path: Path) -> None:
    rows = [write_case(tmp_path, seed) for seed in range(4)]
    for row in rows:
        Image.fromarray(np.zeros((72, 90), np.uint8)).save(row.label_path)
    with pytest.raises(TrainingError, match="No label is drawn"):
        fit(rows, tmp_path / "room", TrainOptions(), RefSegSettings(device="cpu"))


def test_a_full_disk_is_said_before_anything_is_trained(
    labelled: list[LabelledImage], tmp_path: Path
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(room)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(TrainingError, match="Make room"):
            fit(labelled, room, TrainOptions(), RefSegSettings(device="cpu"))
        assert not list(room.rglob("*.part"))
    finally:
        subprocess.run(["umount", str(room)], check=True)


# -- episodes -------------------------------------------------------------------------------------


def test_an_episode_is_the_same_for_the_same_number_and_seed(cases: list[PackedCase]) -> None:
    one, other = SiteEpisodes(cases, PLAN), SiteEpisodes(cases, PLAN)
    other.make(3)  # what was made before does not matter
    for number in range(4):
        first, second = one.make(number), other.make(number)
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.masks, second.masks)
        assert torch.equal(first.supports, second.supports)
    assert not torch.equal(one.make(0).images, one.make(1).images)
    query, supports = first.masks.shape[0], first.supports
    assert all(int(row) not in supports[row].tolist() for row in range(len(supports)))
    assert query <= PLAN.images


def test_labels_are_taught_by_those_alone_who_annotated_them(tmp_path: Path) -> None:
    names = ["disc", "disc", "disc", "other", "other", "other"]
    rows = [write_case(tmp_path, seed, name=name) for seed, name in enumerate(names)]
    packed = pack_cases(rows, tmp_path / "packed", Rules())
    episodes = SiteEpisodes(packed, EpisodePlan(size=64, images=6, regions=0))
    seen = set()
    for number in range(6):
        rng = np.random.default_rng((0, number))
        rng.integers(2**31), rng.random()
        task = episodes._labelled(rng)
        assert task is not None
        seen.add(len(task.images))
    assert seen == {3}  # never one who did not say anything of the label


def test_unlabelled_images_give_regions_to_find(
    cases: list[PackedCase], labelled: list[LabelledImage], tmp_path: Path
) -> None:
    paths = [one.image_path for one in labelled]
    extra = pack_unlabelled(paths, tmp_path / "unlabelled.npy", Rules())
    assert extra is not None
    plan = EpisodePlan(size=64, images=3, queries=2, most_supports=2, regions=1)
    made = [SiteEpisodes(cases, plan, unlabelled=extra).make(n) for n in range(4)]
    assert {episode.family for episode in made} == {"regions"}
    assert any(bool(episode.masks.any()) for episode in made)


# -- loop -----------------------------------------------------------------------------------------


def test_the_gradient_of_an_episode_reaches_every_parameter(cases: list[PackedCase]) -> None:
    torch.manual_seed(0)
    net = MatchSegNet(SMALL)
    torch.nn.init.normal_(net.head.weight, std=0.1)  # zero at first, so nothing behind it moves
    episodes = map(SiteEpisodes(cases, PLAN).make, range(30))
    # two references at least: how much more the similar one counts is learned, too
    episode = next(e for e in episodes if e.supports.shape[1] > 1 and bool(e.masks.any()))
    loss, _ = forward(net, episode, CPU)
    loss.backward()
    still = {n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert still == set()


def test_one_case_is_learned_by_heart(cases: list[PackedCase]) -> None:
    torch.manual_seed(0)
    net = load_weights(BUNDLED).train()
    episode = next(
        episode
        for number in range(20)
        if (episode := SiteEpisodes(cases[:2], PLAN).make(number)).family == "site"
        and float(episode.masks.mean()) > 0.02
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    achieved = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, dice = forward(net, episode, CPU)
        loss.backward()
        optimizer.step()
        achieved.append(float(dice))
    assert achieved[-1] > 0.97
    assert achieved[-1] > achieved[0]


class Interrupted(Ranks):
    """Stops, as Ctrl-C does, before the given step of all."""

    left = 0

    def agreed(self, flag: bool) -> bool:
        Interrupted.left -= 1
        if not Interrupted.left:
            raise KeyboardInterrupt
        return flag


def test_a_stopped_training_goes_on_to_the_very_same_weights(
    cases: list[PackedCase], tmp_path: Path
) -> None:
    def trained(name: str) -> dict[str, torch.Tensor]:
        train_site(Ranks(CPU), job(tmp_path / name, cases, minutes=0))
        saved = torch.load(tmp_path / name / CHECKPOINT, weights_only=True)
        assert saved["epoch"] == 2
        return saved["averaged"]

    whole, again = trained("whole"), trained("again")
    Interrupted.left = 6  # asked once an epoch and once a step: in the middle of the second epoch
    with pytest.raises(KeyboardInterrupt):
        train_site(Interrupted(CPU), job(tmp_path / "parts", cases, minutes=0))
    assert torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)["epoch"] == 1
    parts = trained("parts")
    rows = (tmp_path / "parts" / LOG).read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2"]
    for name, value in whole.items():
        assert torch.equal(value, again[name])  # same seed, same result
        assert torch.equal(value, parts[name])


def test_of_the_networks_between_two_the_best_is_kept(
    cases: list[PackedCase], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    net = load_weights(BUNDLED)
    with torch.no_grad():
        for value in net.parameters():
            value += 2.0 * value.abs().mean() * torch.randn(value.shape, generator=generator)
    spoiled, good = tmp_path / "spoiled.safetensors", tmp_path / "good.safetensors"
    good.write_bytes(BUNDLED.read_bytes())
    save_weights(net, spoiled)
    validator = Validator(cases[:4], cases[4:], RefSegSettings(device="cpu"), room=tmp_path)

    alone = blend(None, spoiled, spoiled, validator, learned=8, device="cpu")
    assert (alone.trained, alone.trained_share) == (spoiled, 1.0)
    too_far = blend(BUNDLED, spoiled, spoiled, validator, learned=8, device="cpu")
    assert (too_far.trained, too_far.trained_share) == (spoiled, 0.25)
    assert too_far.measured.beats(alone.measured)
    kept, old = load_weights(too_far.weights).state_dict(), load_weights(BUNDLED).state_dict()
    for name, value in load_weights(spoiled).state_dict().items():
        assert torch.allclose(kept[name], 0.75 * old[name] + 0.25 * value, rtol=2e-3, atol=1e-4)
    level = blend(BUNDLED, good, good, validator, learned=8, device="cpu")
    assert (level.trained, level.trained_share) == (good, pytest.approx(0.75))
    many = blend(BUNDLED, good, good, validator, learned=64, device="cpu")
    assert many.trained_share == pytest.approx(0.875)
    earlier = blend(BUNDLED, spoiled, good, validator, learned=8, device="cpu")
    assert earlier.trained == good
    without = blend(None, spoiled, good, validator, learned=8, device="cpu")
    assert (without.trained, without.trained_share) == (good, 1.0)
    trained = tmp_path / "no room" / "trained.safetensors"
    (trained.parent / "blended.safetensors" / "in the way").mkdir(parents=True)
    save_weights(net, trained)
    with pytest.raises(TrainingError, match=r"cannot write to .* Make room"):
        blend(None, trained, trained, validator, learned=8, device="cpu")


def test_what_a_training_comes_to_is_the_blend_and_was_measured(
    labelled: list[LabelledImage], tmp_path: Path
) -> None:
    plan = SitePlan(epochs=1, steps=4, images=3, size=64, rate=0.1, encoder_rate=0.01)  # too fast
    settings = RefSegSettings(device="cpu")
    found = fit(labelled, tmp_path, TrainOptions(plan), settings)
    assert found.trained_share < 1
    assert (found.job.plan.epochs, found.job.total, found.job.schedule) == (1, 1, (0, 1))
    new, old = load_weights(found.trained).state_dict(), load_weights(BUNDLED).state_dict()
    for name, value in load_weights(found.weights).state_dict().items():
        assert torch.equal(value, old[name].lerp(new[name], found.trained_share).half().float())
    validator = Validator(found.job.training, found.job.validation, settings, room=tmp_path)
    again = validator.measure(MatchSegSegmenter.load(found.weights, device="cpu"))
    assert again == found.measured


def test_at_last_it_learns_from_all_images_as_long_and_as_far(
    labelled: list[LabelledImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SitePlan(epochs=3, steps=2, images=3, size=64, minutes=60)
    options = TrainOptions(plan, all_images=True)
    seen: set[str] = set()
    monkeypatch.setattr(SiteEpisodes, "__init__", _noting(SiteEpisodes.__init__, seen))
    found = fit(labelled, tmp_path, options, RefSegSettings(device="cpu"))
    found = replace(found, trained_share=0.75)
    assert (found.job.plan.epochs, found.job.plan.minutes) == (2, 30)
    measured = found.weights.read_bytes()
    told = json.loads((tmp_path / PROGRESS).read_text())
    assert (told["epoch"], told["total_epochs"]) == (2, 3)

    kept = {case.image_id for case in found.job.validation}
    assert kept
    assert seen == {one.image_id for one in labelled} - kept
    refit(found, options)
    final = tmp_path / "all" / "final.safetensors"
    assert seen == {one.image_id for one in labelled}
    assert found.weights.read_bytes() == measured
    told = json.loads((tmp_path / PROGRESS).read_text())
    assert (told["epoch"], told["total_epochs"]) == (3, 3)
    assert told["best_metric"] == pytest.approx(found.end.best, abs=1e-4)
    new, old = load_weights(final.parent / LAST).state_dict(), load_weights(BUNDLED).state_dict()
    first = load_weights(found.trained).state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in new.items())
    for name, value in load_weights(final).state_dict().items():
        assert torch.equal(value, old[name].lerp(new[name], 0.75).half().float())
    assert len(read_epochs(tmp_path)) == 2  # those that were measured

    state = torch.load(final.parent / CHECKPOINT, weights_only=True)
    assert state["epoch"] == 1
    refit(found, options)  # nothing is left to be done
    again = torch.load(final.parent / CHECKPOINT, weights_only=True)
    assert again["spent"] == state["spent"]


def test_the_second_training_goes_on_where_it_was_but_not_for_another_first_one(
    labelled: list[LabelledImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RefSegSettings(device="cpu")
    options = TrainOptions(
        SitePlan(epochs=4, steps=2, images=3, size=64, minutes=0), all_images=True
    )
    refit(fit(labelled, tmp_path / "whole", options, settings), options)
    whole = tmp_path / "whole" / "all" / "final.safetensors"

    room = tmp_path / "parts"
    found = fit(labelled, room, options, settings)
    with monkeypatch.context() as patch:
        patch.setattr("lib.trainers.site.loop._step", _ending_with(KeyboardInterrupt(), after=3))
        with pytest.raises(KeyboardInterrupt):
            refit(found, options)  # in the middle of its second epoch
    checkpoint = room / "all" / CHECKPOINT
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    again = fit(labelled, room, options, settings)
    assert again.end == found.end  # nothing of it was trained anew
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    with monkeypatch.context() as patch:  # no more than the second epoch is left
        patch.setattr("lib.trainers.site.loop._step", _ending_with(AssertionError(), after=2))
        refit(again, options)
    parts = room / "all" / "final.safetensors"
    assert parts.read_bytes() == whole.read_bytes()

    fewer = replace(options, plan=replace(options.plan, epochs=2), resume=False)
    shorter = fit(labelled, room, fewer, settings)  # and killed, before `refit`
    now = replace(fewer, resume=True)
    refit(shorter, now)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    told = json.loads((room / PROGRESS).read_text())
    assert (told["epoch"], told["total_epochs"]) == (2, 2)


def _ending_with(error: BaseException, *, after: int) -> Any:
    taken = []

    def take(*args: Any) -> float:
        if len(taken) == after:
            raise error
        taken.append(args)
        return _step(*args)

    return take


def test_a_disk_that_is_full_from_the_start_is_said_in_both_trainings(
    labelled: list[LabelledImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RefSegSettings(device="cpu")
    options = TrainOptions(SitePlan(epochs=2, steps=1, images=3, size=64), all_images=True)
    found = fit(labelled, tmp_path, options, settings)
    progress = tmp_path / PROGRESS
    progress.unlink()
    (progress / "in the way").mkdir(parents=True)
    with pytest.raises(TrainingError, match="Make room"):
        refit(found, options)
    with pytest.raises(TrainingError, match="Make room"):
        fit(labelled, tmp_path, options, settings)


def test_what_learning_from_all_images_spoils_is_not_published(
    labelled: list[LabelledImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RefSegSettings(device="cpu")
    site = SiteModel(
        ModelStore(tmp_path / "models"),
        settings,
        bank_root=tmp_path / "banks",
        studies="here",
        list_labels=lambda: labelled,
    )
    torch.manual_seed(0)
    weak = MatchSegNet(SMALL)
    torch.nn.init.normal_(weak.head.weight, std=0.5)
    card = site.store.add(weak, ModelCard(0.1, 0.0, "scratch", ("disc",), (), ()))
    site.store.use(card.version)

    def spoiled(start: Path, trained: Path, share: float, target: Path) -> Path:
        net = load_weights(mix(start, trained, share, target))
        torch.nn.init.normal_(net.head.weight, std=5)
        save_weights(net, target)
        return target

    monkeypatch.setattr("lib.trainers.site.fitting.mix", spoiled)
    options = TrainOptions(SitePlan(epochs=2, steps=1, images=3, size=64), all_images=True)
    report = train_model(site, settings, labelled, options)
    assert report.published
    assert report.card is not None
    assert "learned from these" not in report.message
    assert report.card.sha256_measured == ""
    assert report.card.learned == report.card.training
    net = load_weights(site.store.folder / "0002" / "weights.safetensors")
    assert float(net.head.weight.detach().abs().max()) < 1


def _noting(make: Any, seen: set[str]) -> Any:
    def noted(episodes: SiteEpisodes, cases: Sequence[PackedCase], *args: Any, **more: Any) -> None:
        seen.update(case.image_id for case in cases)
        make(episodes, cases, *args, **more)

    return noted


def test_it_ends_early_when_nothing_gets_better(cases: list[PackedCase], tmp_path: Path) -> None:
    one = job(tmp_path / "room", cases, epochs=50, steps=1, patience=1, rate=1e-9, encoder_rate=0)
    train_site(Ranks(CPU), one)
    rows = (tmp_path / "room" / LOG).read_text().splitlines()
    assert 2 <= len(rows) - 1 <= 6
    assert (tmp_path / "room" / BEST).exists()


def average(ranks: Ranks, folder: str) -> None:
    net = torch.nn.Linear(3, 1)
    net(torch.full((1, 3), float(ranks.rank + 1))).sum().backward()
    ranks.average_gradients(net)
    flag = ranks.agreed(ranks.rank == 0)
    assert net.weight.grad is not None
    told = f"{net.weight.grad.tolist()} {flag}"
    Path(folder, f"{ranks.rank}.{os.getpid()}").write_text(told)


def test_two_processes_take_the_same_step(tmp_path: Path) -> None:
    run_on(["cpu", "cpu"], average, str(tmp_path))
    told = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 2
    assert told == {"[[1.5, 1.5, 1.5]] True"}


def fail(ranks: Ranks, message: str) -> None:
    if ranks.rank == 1:
        raise ValueError(message)
    ranks.agreed(True)


@pytest.mark.slow
def test_when_one_process_fails_all_end_with_its_reason() -> None:
    with pytest.raises(TrainingError, match="no room on the second one"):
        run_on(["cpu", "cpu"], fail, "no room on the second one")


# -- options --------------------------------------------------------------------------------------


def test_options_are_read_as_clients_send_them() -> None:
    options = parse_options({"start": ["scratch", "bundled"], "max_epochs": 3.0, "minutes": "0.5"})
    assert options.start == "scratch"
    assert options.plan.epochs == 3
    assert options.plan.minutes == 0.5
    assert options.plan.rate == 1e-3
    assert parse_options({"model": "matchseg", "gpus": "all"}).start == "bundled"
    assert [parse_options(one).all_images for one in ({}, {"all_images": True})] == [False, True]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("start", "imagenet", "bundled, scratch"),
        ("max_epochs", 0, "from 1 to"),
        ("max_epochs", 1.5, "whole number"),
        ("val_split", 0.9, "0.05 to 0.5"),
        ("size", 100, "multiple of 32"),
        ("resume", "perhaps", "true or false"),
        ("seed", True, "whole number"),
    ],
)
def test_an_option_out_of_range_is_refused_with_what_is_allowed(
    key: str, value: object, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        parse_options({key: value})


def test_a_gain_that_chance_would_give_is_no_better_network() -> None:
    none = float("nan")
    before = Validation((0.5, 0.6, 0.7, 0.8), {})
    assert Validation((0.6, 0.7, 0.8, 0.9), {}).beats(before)
    assert not Validation((0.54, 0.64, 0.74, 0.84), {}).beats(before)  # four: less than .05
    assert not Validation((0.9, 0.3, 0.9, 0.8), {}).beats(before)  # +.075 on average, by chance
    assert not before.beats(before)
    assert Validation((0.8,), {}).beats(Validation((0.55,), {}))
    assert not Validation((0.7,), {}).beats(Validation((0.55,), {}))
    many = Validation((0.5,) * 20, {})
    assert Validation((0.53,) * 20, {}).beats(many)
    assert not Validation((0.515,) * 20, {}).beats(many)
    # where there is nothing, nothing found is right
    assert Validation((0.8, none), {}).beats(Validation((0.7, 0.0), {})) is False  # +.1, +1
    assert Validation((0.8, none), {}).beats(Validation((0.1, 0.0), {}))
    assert not Validation((0.8, 0.0), {}).beats(Validation((0.81, none), {}))
    assert not Validation((none, none), {}).beats(Validation((none, none), {}))


def test_a_gain_is_the_mean_over_the_images_where_there_is_something_to_compare() -> None:
    none = float("nan")
    before = Validation((0.5, 0.6, none, none), {})
    after = Validation((0.9, 0.3, 0.0, none), {})  # it paints what is rightly not there
    assert after.gain_over(before) == pytest.approx((0.4 - 0.3 - 1.0) / 3)
    assert before.gain_over(after) == pytest.approx(-after.gain_over(before))
    assert Validation((none,), {}).gain_over(Validation((none,), {})) == 0.0
