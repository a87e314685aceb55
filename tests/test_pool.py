"""The pool of embeddings over real files: what is read when, and what is computed again."""

import os
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from lib.errors import ImageError
from lib.imaging.io import read_image
from lib.imaging.slices import cut, through_plane_axis
from lib.memory.pool import EmbeddingPool
from lib.pool import Pool
from lib.runtime import Runtime
from lib.settings import RefSegSettings
from lib.types import FloatArray, HalfArray, LabelledImage


class Encoder:
    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, path: Path) -> tuple[FloatArray, range]:
        self.read.append(path.name)
        text = path.read_text()
        if text == "broken":
            raise ImageError(path.name)
        vectors = np.full((len(text), 2), float(text[0]), np.float32)
        return vectors, range(0, 3 * len(text), 3)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def pool(tmp_path: Path, encoder: Encoder) -> Pool:
    return Pool(lambda: EmbeddingPool(tmp_path / "bank", "one"), encoder)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    files = {f"image {number}": tmp_path / f"{number}.png" for number in range(6)}
    for number, path in enumerate(files.values()):
        path.write_text(str(number) * (number + 1))
    return files


def in_the_end(pool: Pool, paths: dict[str, Path], count: int) -> int:
    """How many are known after at most a minute, without any work in a call but one image."""
    deadline = time.monotonic() + 60
    while (known := len(pool.embeddings(paths, seconds=0))) < count:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return known


def test_each_image_gets_its_own_rows(pool: Pool, paths: dict[str, Path]) -> None:
    found = pool.embeddings(paths, seconds=60)
    assert found.keys() == paths.keys()
    for number, image_id in enumerate(paths):
        np.testing.assert_array_equal(found[image_id], np.full((number + 1, 2), number))


def test_a_view_knows_the_slices_of_what_is_stored(pool: Pool, paths: dict[str, Path]) -> None:
    pool.advance(paths, seconds=60)
    view = pool.view(["image 4", "image 1", "unknown"])
    assert view.ids == ("image 1", "image 4")
    assert view.slices.tolist() == [0, 3, 0, 3, 6, 9, 12]
    assert view.starts.tolist() == [0, 2, 7]
    new = paths["image 1"].with_name("new.png")
    assert "new" in pool.missing({**paths, "new": new})


def test_a_view_sees_regions_where_slices_have_several_rows(
    tmp_path: Path, paths: dict[str, Path]
) -> None:
    rng = np.random.default_rng(0)
    stored = {path: rng.uniform(2, 3, (2, 16, 40)).astype(np.float16) for path in paths.values()}

    def regions_of(path: Path) -> tuple[HalfArray, list[int]]:
        return stored[path].reshape(32, 40), [4] * 16 + [9] * 16

    pool = Pool(lambda: EmbeddingPool(tmp_path / "bank", "regions"), regions_of)
    pool.advance(paths, seconds=60)
    view = pool.view(list(paths))
    assert view.regions == 16
    assert view.slices.tolist() == ([4] * 16 + [9] * 16) * 6
    assert view.vectors.shape == (6 * 32, 36)
    np.testing.assert_allclose(np.linalg.norm(view.vectors, axis=1), 1, atol=1e-5)
    alike = view.vectors @ view.vectors.T
    assert alike[~np.eye(len(alike), dtype=bool)].max() < 0.98
    assert np.median(np.abs(alike)) < 0.9  # though what is stored is all alike
    raw = np.concatenate([one.reshape(32, 40) for one in stored.values()]).astype(np.float32)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.median(raw @ raw.T) > 0.98
    again = pool.view(list(paths)[:3]).part(list(paths))
    assert again.ids == tuple(list(paths)[:3])


def test_what_the_pool_keeps_of_a_volume_is_told_by_its_slices(tmp_path: Path) -> None:
    """The bundled network; five slices of a volume whose brightness tells which slice it is."""
    depth, place = 10, tmp_path / "steps.nii.gz"
    voxels = np.random.default_rng(0).normal(0, 0.1, (64, 64, depth)).astype(np.float32)
    for n in range(depth):
        voxels[: 4 + 5 * n, :32, n] += 5
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1, 4, 1])), place)
    settings = RefSegSettings(segmenter="matchseg", embedder="bundled", device="cpu")
    runtime = Runtime(settings, bank_root=tmp_path / "bank", studies="here")
    rows, numbers = runtime.embed_file(place)
    assert rows.dtype == np.float16
    assert numbers == [n for n in (1, 3, 5, 7, 9) for _ in range(16)]
    image = read_image(place)
    (alone,) = runtime.engine.embedder.regions([cut(image, through_plane_axis(image))[7]])
    np.testing.assert_allclose(rows[3 * 16 : 4 * 16], alone, atol=2e-3)
    runtime.pool.advance({"steps": place}, seconds=60)
    view = runtime.pool.view(["steps"])
    assert view.regions == 16
    assert view.whole().slices.tolist() == [1, 3, 5, 7, 9]


def test_there_may_be_no_images(pool: Pool) -> None:
    assert pool.embeddings({}, seconds=0) == {}


def test_files_that_only_look_new_are_read_within_the_time_of_the_call(
    pool: Pool, paths: dict[str, Path], encoder: Encoder
) -> None:
    pool.embeddings(paths, seconds=60)
    for path in paths.values():
        os.utime(path, ns=(1, 1))  # as a folder that was copied or restored
    with pool.busy():  # the background waits
        assert len(pool.embeddings(paths, seconds=0)) == 1
    assert in_the_end(pool, paths, 6) == 6
    assert len(encoder.read) == 6  # the bytes are the same: computed once


def test_a_broken_image_is_tried_once_and_stops_nobody(
    pool: Pool, paths: dict[str, Path], encoder: Encoder
) -> None:
    paths["image 0"].write_text("broken")
    assert pool.embeddings(paths, seconds=60).keys() == paths.keys() - {"image 0"}
    pool.embeddings(paths, seconds=60)
    assert encoder.read.count("0.png") == 1
    paths["image 0"].write_text("7")
    os.utime(paths["image 0"], ns=(5, 5))
    np.testing.assert_array_equal(pool.embeddings(paths, seconds=60)["image 0"], [[7, 7]])


def test_who_works_behind_requests_waits_for_them_but_not_for_ever(pool: Pool) -> None:
    pool.wait_until_idle()
    with pool.busy():
        start = time.monotonic()
        pool.wait_until_idle(0.2)  # requests may come without end
        assert time.monotonic() - start >= 0.2
        waiting = threading.Thread(target=pool.wait_until_idle, args=(60,))
        waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()


def test_looks_are_learned_when_no_request_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.runtime.PATIENCE", 60)
    labels = []
    for name in "ab":
        paths = [tmp_path / f"{name}{kind}.png" for kind in ("", "-label")]
        picture = np.zeros((64, 64), np.uint8)
        picture[16:40, 16:40] = 1
        for path, factor in zip(paths, (200, 1), strict=True):
            Image.fromarray(picture * factor).save(path)
        labels.append(LabelledImage(name, paths[0], paths[1], {1: "square"}))
    settings = RefSegSettings(device="cpu", segmenter="matchseg")
    runtime = Runtime(settings, bank_root=tmp_path / "bank", studies=str(tmp_path))
    runtime.sync(lambda: labels)
    with runtime.pool.busy():
        runtime.engine.study(runtime.bank, wait=False)
        time.sleep(3)
        assert runtime.engine._learning.locked()  # it takes no second, where none is busy
    end = time.monotonic() + 60
    while runtime.engine._learning.locked():
        assert time.monotonic() < end
        time.sleep(0.05)
