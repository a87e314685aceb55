"""What the rest of RefSeg may rely on in the `sam2` segmenter."""

import logging
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib.errors import LabelError, RefSegError, RequestError, WeightsError
from lib.models.devices import choose_device, in_batches
from lib.models.sam2 import Sam2Options, Sam2Segmenter
from lib.models.sam2_network import build_module, load_network, random_network
from lib.models.sam2_tensors import join_values, split_values, square_masks
from lib.types import Memory

SIZE = 128
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def segmenter():
    network = random_network("sam2.1-tiny", size=SIZE, seed=3)
    torch.nn.init.constant_(network.module.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5)
    return Sam2Segmenter(
        network, device="cpu", options=Sam2Options(memory_dtype=torch.float32, absence_threshold=0)
    )


@pytest.fixture(scope="module")
def material(segmenter):
    """A query and four references with three labels each; the last reference lacks label 1."""
    rng = np.random.default_rng(5)
    images = [rng.random((90, 70), dtype=np.float32) for _ in range(4)]
    images.append(rng.random((60, 80, 3), dtype=np.float32))
    features = segmenter.encode(images)
    memories = []
    for number, image in enumerate(images[1:]):
        masks = torch.zeros(3, *image.shape[:2], dtype=torch.bool)
        for label in range(3):
            top = 5 + 10 * label + number
            masks[label, top : top + 20, 10 : 30 + 5 * number] = True
        masks[1] &= number < 3
        memories.append(segmenter.remember(features[number + 1], masks))
    known = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    return features[0], memories, known


def rows(memory: Memory, labels):
    return Memory(image=memory.image, labels=memory.labels[labels])


def test_no_step_keeps_what_only_training_needs(segmenter, material):
    query, memories, known = material
    answer = segmenter.segment(query, memories, known)
    tensors = [*query.maps, memories[0].labels, answer.scores, answer.presence, answer.quality]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert answer.scores.is_inference()  # a graph of memory attention would hold gigabytes


def test_a_batch_of_labels_equals_each_label_alone_from_the_references_that_know_it(
    segmenter, material
):
    query, memories, known = material
    together = segmenter.segment(query, memories, known)
    assert together.scores.shape == (3, SIZE, SIZE)
    for label in range(3):
        own = [
            rows(memory, [label])
            for memory, knows in zip(memories, known[:, label], strict=True)
            if knows
        ]
        alone = segmenter.segment(query, own, torch.ones(len(own), 1, dtype=torch.bool))
        torch.testing.assert_close(alone.scores[0], together.scores[label], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.quality[0], together.quality[label])
        torch.testing.assert_close(alone.presence[0], together.presence[label])
    assert float((together.scores[0] - together.scores[2]).abs().max()) > 1e-4


def test_the_order_of_the_references_is_of_no_consequence(segmenter, material):
    query, memories, known = material
    expected = segmenter.segment(query, memories, known)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        shuffled = segmenter.segment(query, [memories[i] for i in order], known[order])
        torch.testing.assert_close(shuffled.scores, expected.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(shuffled.scores > 0, expected.scores > 0)


def test_a_label_that_no_reference_shows_is_reported_as_absent(segmenter, material):
    query, memories, known = material
    only_negative = segmenter.segment(query, memories[3:], known[3:].new_ones(1, 3))
    assert float(only_negative.scores[1].max()) < 0
    assert float(only_negative.presence[1]) == pytest.approx(1 / 3)
    assert float(only_negative.scores[0].max()) > -100


def test_the_labels_of_a_small_budget_give_the_same_as_all_at_once(segmenter, material):
    query, memories, known = material
    expected = segmenter.segment(query, memories, known)
    budget = segmenter._token_budget
    segmenter._token_budget = 1
    try:
        single = segmenter.segment(query, memories, known)
    finally:
        segmenter._token_budget = budget
    torch.testing.assert_close(single.scores, expected.scores, atol=1e-5, rtol=1e-4)


def test_memories_of_bfloat16_lose_nothing_of_the_pointer_and_little_of_the_mask(
    segmenter, material
):
    query, memories, known = material
    exact = segmenter.segment(query, memories, known)
    rounded = [Memory(m.image, m.labels.bfloat16()) for m in memories]
    prediction = segmenter.segment(query, rounded, known)
    torch.testing.assert_close(prediction.scores, exact.scores, atol=5e-3, rtol=1e-2)
    values = torch.randn(4, 256) * torch.tensor([1e-6, 1.0, 1e3, 3.3])[:, None]
    parts = torch.cat([part.bfloat16() for part in split_values(values)], dim=1).float()
    assert torch.equal(join_values(parts), values)


def test_unknown_labels_and_foreign_features_are_refused(segmenter, material):
    query, memories, known = material
    with pytest.raises(LabelError, match="at least one reference"):
        segmenter.segment(query, memories, known & torch.tensor([True, False, True]))
    with pytest.raises(LabelError, match="bool"):
        segmenter.remember(query, torch.zeros(1, 4, 4))
    other = Sam2Segmenter.random("sam2.1-tiny", size=SIZE, seed=4, device="cpu")
    assert other.fingerprint != segmenter.fingerprint
    with pytest.raises(ValueError, match="encode again"):
        other.segment(query, memories, known)


def test_no_labels_make_an_empty_memory_and_no_images_no_features(segmenter, material):
    memory = segmenter.remember(material[0], torch.zeros(0, 9, 9, dtype=torch.bool))
    assert memory.labels.shape == (0, material[1][0].labels.shape[1])
    assert segmenter.encode([]) == []


def test_a_structure_thinner_than_the_grid_does_not_become_an_example_of_its_absence():
    masks = torch.zeros(2, 1000, 1000, dtype=torch.bool)
    masks[0, 500, 300:310] = True
    square = square_masks(masks, size=SIZE)
    assert 1 <= int(square[0].sum()) <= 12
    assert int(square[1].sum()) == 0
    rows_columns = torch.nonzero(square[0, 0]).float().mean(dim=0) / SIZE
    torch.testing.assert_close(rows_columns, torch.tensor([0.5, 0.305]), atol=0.01, rtol=0)


def test_threads_get_what_one_thread_gets(segmenter, material):
    query, memories, known = material
    expected = segmenter.segment(query, memories, known).scores
    found = {}

    def work(number):
        found[number] = segmenter.segment(query, memories, known).scores

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[n], expected, atol=1e-6) for n in range(3))


def test_no_autocast_stays_open_and_an_open_one_does_not_leak_in(segmenter, material):
    query, memories, known = material
    expected = segmenter.segment(query, memories, known).scores
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = segmenter.segment(query, memories, known).scores
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(inside, expected)
    half = Sam2Segmenter(
        random_network("sam2.1-tiny", size=SIZE, seed=3),
        device="cpu",
        options=Sam2Options(half=True),
    )
    half.encode([np.zeros((8, 8), np.float32)])
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == torch.float32


def test_hydra_is_left_as_it_was_found():
    script = """
        from hydra import initialize
        from hydra.core.global_hydra import GlobalHydra
        from lib.models.sam2_network import random_network
        random_network("sam2.1-tiny", size=128, seed=0)
        assert not GlobalHydra.instance().is_initialized()
        initialize(config_path=None, version_base="1.2")
        before = GlobalHydra.instance().hydra
        random_network("sam2-tiny", size=128, seed=0)
        assert GlobalHydra.instance().hydra is before
        print("as found")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "as found", done.stderr


def test_checkpoints_are_read_from_pt_and_safetensors_and_give_one_fingerprint(tmp_path):
    network = random_network("sam2-tiny", size=SIZE, seed=1)
    state = network.module.state_dict()
    torch.save({"model": state}, tmp_path / "a.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        loaded = load_network("sam2-tiny", tmp_path / name, size=SIZE)
        assert loaded.digest == network.digest
    with pytest.raises(WeightsError, match=r"does not fit SAM 2 variant sam2.1-tiny: .*missing"):
        load_network("sam2.1-tiny", tmp_path / "a.pt", size=SIZE)
    save_file({"vision_encoder.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="transformers"):
        load_network("sam2-tiny", tmp_path / "model.safetensors", size=SIZE)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:10_000])
    with pytest.raises(WeightsError, match="weights fetch"):
        load_network("sam2-tiny", tmp_path / "cut.pt", size=SIZE)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model": Bomb()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_network("sam2-tiny", tmp_path / "evil.pt", size=SIZE)
    assert not (tmp_path / "exploded").exists()


def test_the_fingerprint_knows_what_shapes_a_memory():
    network = random_network("sam2-tiny", size=SIZE, seed=1)
    plain = Sam2Segmenter(network, device="cpu").fingerprint
    for options in (Sam2Options(blur_masks=True), Sam2Options(memory_dtype=torch.float16)):
        assert Sam2Segmenter(network, device="cpu", options=options).fingerprint != plain
    query_only = Sam2Options(absence_threshold=0.1, pointer_distance=None)
    assert Sam2Segmenter(network, device="cpu", options=query_only).fingerprint == plain
    larger = Sam2Segmenter.random("sam2-tiny", size=256, seed=1, device="cpu")
    assert larger.fingerprint != plain


@pytest.mark.parametrize("size", [64, 500, 4096])
def test_impossible_sizes_and_variants_are_refused(size):
    with pytest.raises(RequestError, match="multiple of 32"):
        build_module("sam2.1-tiny", size=size)
    with pytest.raises(RequestError, match=r"sam2\.1-large"):
        build_module("sam3", size=512)


def test_batches_shrink_until_they_fit_and_then_say_so(caplog):
    calls = []

    def run(part: slice) -> int:
        calls.append(part.stop - part.start)
        if calls[-1] > 3:
            raise torch.OutOfMemoryError("too much")
        return sum(range(part.start, part.stop))

    with caplog.at_level(logging.WARNING):
        results, fitted = in_batches(run, 10, batch=8, hint="")
    assert sum(results) == sum(range(10))
    assert (fitted, calls) == (2, [8, 4, 2, 2, 2, 2, 2])
    assert "batches of 2" in caplog.text

    def never(part: slice) -> int:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(RefSegError, match="Buy more"):
        in_batches(never, 3, batch=2, hint="Buy more.")
    with pytest.raises(RuntimeError, match="size"):
        in_batches(lambda part: torch.zeros(2) @ torch.zeros(3), 1, batch=1, hint="")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(RequestError, match=r"Device"):
        choose_device(device)
    assert choose_device("cpu").type == "cpu"
