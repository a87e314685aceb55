"""DINOv2 and CLIP as embedders: tiny random networks, saved and loaded as real ones are."""

import json

import numpy as np
import pytest
import torch

from lib.errors import RequestError, WeightsError
from lib.models.encoders import TransformersEmbedder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2-small")
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    torch.manual_seed(1)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    vision = {**small, "image_size": 64, "patch_size": 32, "projection_dim": 20}
    text = {**small, "vocab_size": 50, "projection_dim": 20}
    torch.manual_seed(2)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    CLIPModel(config).save_pretrained(folder)  # the whole CLIP, as published
    return folder


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    shapes = [(40, 30), (64, 64, 3), (17, 90), (33, 33, 3), (40, 30)]
    return [rng.random(shape, dtype=np.float32) for shape in shapes]


@pytest.mark.parametrize(("network", "width"), [("dinov2", 24), ("clip", 20)])
def test_embeddings_are_unit_vectors_that_do_not_depend_on_the_batch(
    network, width, images, request
):
    embedder = TransformersEmbedder(
        request.getfixturevalue(network), name=network, size=None, device="cpu"
    )
    together = embedder.embed(images)
    assert together.shape == (5, width)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([embedder.embed([image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[0] - together[4]).max() > 1e-4
    grey = np.repeat(images[0][..., None], 3, axis=2)
    np.testing.assert_allclose(embedder.embed([grey])[0], together[0], atol=1e-5)
    assert embedder.embed([]).shape == (0, width)


def test_dinov2_equals_the_network_and_processor_of_transformers(dinov2):
    from PIL import Image
    from transformers import BitImageProcessorPil, Dinov2Model

    pixels = np.random.default_rng(3).integers(0, 255, (70, 70, 3), dtype=np.uint8)
    processor = BitImageProcessorPil(
        size={"height": 70, "width": 70},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    batch = processor(Image.fromarray(pixels), return_tensors="pt")
    with torch.inference_mode():
        output = Dinov2Model.from_pretrained(dinov2)(**batch)
    for pooling, expected in (
        ("cls", output.pooler_output[0]),
        ("mean", output.last_hidden_state[0, 1:].mean(dim=0)),
    ):
        embedder = TransformersEmbedder(
            dinov2, name="dinov2-small", size=70, pooling=pooling, device="cpu"
        )
        found = embedder.embed([pixels.astype(np.float32) / 255])[0]
        np.testing.assert_allclose(found, expected / expected.norm(), atol=1e-5)


def test_clip_equals_the_image_features_of_the_whole_clip(clip):
    from transformers import CLIPModel

    pixels = np.random.default_rng(4).random((64, 64, 3), dtype=np.float32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    batch = ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1)[None]
    whole = CLIPModel.from_pretrained(clip)
    with torch.inference_mode():
        expected = whole.visual_projection(whole.vision_model(batch).pooler_output)[0]
    found = TransformersEmbedder(clip, name="clip", device="cpu").embed([pixels])[0]
    np.testing.assert_allclose(found, expected / expected.norm(), atol=1e-5)


def test_the_fingerprint_changes_with_weights_pooling_and_size(dinov2, tmp_path):
    from transformers import Dinov2Model

    def fingerprint(folder=dinov2, **options):
        return TransformersEmbedder(folder, name="d", device="cpu", **options).fingerprint

    assert fingerprint() == fingerprint(size=224, pooling="cls")
    module = Dinov2Model.from_pretrained(dinov2)
    module.layernorm.bias.data[3] += 1e-3
    module.save_pretrained(tmp_path)
    others = {fingerprint(size=70), fingerprint(pooling="mean"), fingerprint(tmp_path)}
    assert len(others | {fingerprint()}) == 4


def test_impossible_sizes_and_poolings_are_refused(dinov2, clip):
    with pytest.raises(RequestError, match=r"multiple of its patch, 14 pixels, for instance 224"):
        TransformersEmbedder(dinov2, name="d", size=225, device="cpu")
    with pytest.raises(RequestError, match="64 pixels only"):
        TransformersEmbedder(clip, name="clip", size=224, device="cpu")
    with pytest.raises(RequestError, match="does not go with clip"):
        TransformersEmbedder(clip, name="clip", pooling="cls", device="cpu")


def test_incomplete_and_foreign_folders_are_refused(dinov2, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(WeightsError, match="cannot be read"):
        TransformersEmbedder(tmp_path, name="d", device="cpu")
    config = json.loads((dinov2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="weights fetch d"):
        TransformersEmbedder(tmp_path, name="d", device="cpu")
    state = load_file(dinov2 / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, for instance layernorm\.weight"):
        TransformersEmbedder(tmp_path, name="d", device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError, match="'bert'"):
        TransformersEmbedder(tmp_path, name="d", device="cpu")


def test_weights_in_pytorch_format_are_read(clip, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    torch.save(load_file(clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
    image = np.random.default_rng(5).random((50, 50), dtype=np.float32)
    one, other = (
        TransformersEmbedder(folder, name="clip", device="cpu") for folder in (clip, tmp_path)
    )
    np.testing.assert_allclose(one.embed([image]), other.embed([image]), atol=1e-6)
    assert one.fingerprint == other.fingerprint
