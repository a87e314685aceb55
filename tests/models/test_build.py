"""Which network is used, and that a person is told why."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.errors import RequestError, WeightsError
from lib.models.build import build_embedder, build_segmenter, plan_embedder, plan_segmenter
from lib.models.sam2_network import random_network


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def weights(tmp_path):
    """A weights folder with a random SAM 2.1 tiny, as `weights fetch` would lay it out."""
    folder = tmp_path / "weights"
    (folder / "sam2.1-tiny").mkdir(parents=True)
    state = random_network("sam2.1-tiny", size=128, seed=0).module.state_dict()
    torch.save({"model": state}, folder / "sam2.1-tiny" / "sam2.1_hiera_tiny.pt")
    return folder


def test_auto_on_a_cpu_takes_the_bundled_network_and_says_what_is_lacking(weights, tmp_path):
    plan = plan_segmenter("auto", weights=weights, device="cpu")
    assert (plan.name, plan.weights) == ("matchseg", None)
    assert plan.reason == "the bundled network: the device is the CPU"
    plan = plan_segmenter("auto", weights=tmp_path, device="cpu", sam2_variant="base")
    assert "sam2.1-base-plus are not on this machine and the device is the CPU" in plan.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU changes: no CUDA device")
def test_auto_with_weights_and_a_gpu_takes_sam2(weights):
    assert plan_segmenter("auto", weights=weights).name == "sam2"


def test_sam2_is_built_from_the_weights_folder_at_the_size_asked_for(weights):
    plan = plan_segmenter("sam2", weights=weights, device="cpu")
    assert plan.path == weights / "sam2.1-tiny" / "sam2.1_hiera_tiny.pt"
    segmenter = build_segmenter("sam2", weights=weights, device="cpu", sam2_size=128)
    assert (segmenter.name, segmenter.size) == ("sam2", 128)
    features = segmenter.encode([np.zeros((20, 30), np.float32)])
    memory = segmenter.remember(features[0], torch.ones(1, 20, 30, dtype=torch.bool))
    prediction = segmenter.segment(features[0], [memory], torch.ones(1, 1, dtype=torch.bool))
    assert prediction.scores.shape == (1, 128, 128)


def test_weights_that_are_not_here_are_one_message_with_the_command(tmp_path):
    with pytest.raises(WeightsError, match=r"main\.py weights fetch sam2-large"):
        build_segmenter(
            "sam2", weights=tmp_path, device="cpu", sam2_variant="large", sam2_version="2"
        )
    with pytest.raises(WeightsError, match=r"main\.py weights fetch dinov2-base"):
        build_embedder("dinov2-base", None, weights=tmp_path, device="cpu")


def test_unknown_options_are_refused():
    with pytest.raises(RequestError, match="allowed are auto, sam2, matchseg"):
        plan_segmenter("unet")
    with pytest.raises(RequestError, match="sam2_variant"):
        plan_segmenter("sam2", sam2_variant="huge")
    with pytest.raises(RequestError, match="dinov2-small"):
        plan_embedder("dinov3")
    with pytest.raises(RequestError, match="cuda:77"):
        plan_segmenter("auto", device="cuda:77")


def test_the_bundled_network_serves_as_segmenter_and_as_embedder_of_any_segmenter(weights):
    segmenter = build_segmenter("auto", weights=weights, device="cpu")
    assert segmenter.name == "matchseg"
    images = [np.random.default_rng(0).random((40, 50), dtype=np.float32)]
    own = build_embedder("auto", segmenter, device="cpu")
    sam2 = build_segmenter("sam2", weights=weights, device="cpu", sam2_size=128)
    other = build_embedder("bundled", sam2, device="cpu")
    assert own.fingerprint == other.fingerprint
    np.testing.assert_allclose(
        own.embed(images, segmenter.encode(images)),
        other.embed(images, sam2.encode(images)),
        atol=1e-5,
    )


def test_planning_imports_nothing_heavy():
    script = (
        "import sys; from lib.models.build import plan_segmenter, plan_embedder; "
        "plan_segmenter('auto', device='cpu'); plan_embedder('clip'); "
        "print([m for m in ('sam2', 'hydra', 'transformers', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
