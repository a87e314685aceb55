import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.memory.pool import EmbeddingPool


@pytest.fixture
def pool(tmp_path):
    return EmbeddingPool(tmp_path / "bank", "dino small")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"voxels")
    return path


VECTORS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def test_what_was_put_is_got_until_the_image_changes(pool, image):
    assert pool.get("scan", image) is None
    pool.put("scan", image, VECTORS)
    np.testing.assert_array_equal(pool.get("scan", image), VECTORS)
    times = image.stat()
    image.write_bytes(b"VOXELS")
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert pool.get("scan", image) is None
    image.unlink()
    assert pool.get("scan", image) is None


def test_half_precision_takes_half_the_place_and_comes_back_as_float32(pool, image):
    pool.put("scan", image, VECTORS.astype(np.float16))
    back = pool.get("scan", image)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, VECTORS.astype(np.float16).astype(np.float32))


def test_the_same_bytes_are_known_under_another_name_and_time(pool, image, tmp_path):
    pool.put("scan", image, VECTORS)
    moved = image.rename(tmp_path / "other.nii.gz")
    moved.touch()
    np.testing.assert_array_equal(pool.get("other", moved), VECTORS)


def test_known_answers_without_reading_the_images(pool, image, tmp_path):
    pool.put("scan", image, VECTORS)
    fresh = pool.known({"scan": image})
    assert fresh <= {"scan"}
    time.sleep(2.1)
    pool.get("scan", image)
    missing = tmp_path / "gone.png"
    assert pool.known([("scan", image), ("gone", missing)]) == {"scan"}
    image.touch()
    assert pool.known({"scan": image}) == set()


def test_many_are_gathered_in_one_go(pool, tmp_path):
    ids = [f"image{i}" for i in range(7)]
    for number, image_id in enumerate(ids):
        path = tmp_path / f"{image_id}.png"
        path.write_text(image_id)
        pool.put(image_id, path, np.full((number % 3, 2), number, dtype=np.float16))
    asked = ["image5", "unknown", "image1", "image3"]
    vectors, groups = pool.gather(asked)
    assert groups.tolist() == [0, 0, 2]
    assert vectors[:, 0].tolist() == [5, 5, 1]
    pool.forget(["image5"])
    assert pool.gather(asked)[1].tolist() == [2]
    assert len(pool) == 6
    assert pool.gather(["unknown"])[1].shape == (0,)


def test_other_types_are_refused(pool, image):
    with pytest.raises(ValueError, match="float64"):
        pool.put("scan", image, VECTORS.astype(np.float64))


def test_a_damaged_file_starts_empty_and_another_fingerprint_is_another_pool(tmp_path, pool, image):
    pool.put("scan", image, VECTORS)
    assert EmbeddingPool(tmp_path / "bank", "dino base").get("scan", image) is None
    (file,) = (tmp_path / "bank").glob("dino-small*/regions.sqlite")
    file.write_bytes(b"garbage" * 1000)
    assert pool.get("scan", image) is None
    pool.put("scan", image, VECTORS)
    again = EmbeddingPool(tmp_path / "bank", "dino small")
    np.testing.assert_array_equal(again.get("scan", image), VECTORS)


def test_threads_put_and_get_at_once(pool, tmp_path):
    paths = {f"image{i}": tmp_path / f"image{i}.png" for i in range(12)}
    for image_id, path in paths.items():
        path.write_text(image_id)

    def work(number: int) -> None:
        for image_id in list(paths)[number::3]:
            pool.put(image_id, paths[image_id], np.full((1, 2), 1.0, dtype=np.float32))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pool) == 12
    assert all(pool.get(i, p) is not None for i, p in paths.items())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5))
def test_shapes_come_back(tmp_path_factory, slices, size):
    folder = tmp_path_factory.mktemp("pool")
    (folder / "a.png").write_bytes(b"x")
    pool = EmbeddingPool(folder, "f")
    array = np.ones((slices, size), dtype=np.float32)
    pool.put("a", folder / "a.png", array)
    assert pool.get("a", folder / "a.png").shape == (slices, size)
