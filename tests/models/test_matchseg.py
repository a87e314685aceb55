"""The bundled network behind the protocol, with random weights: structure, not quality."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.errors import RefSegError, WeightsError
from lib.models.matchseg import (
    REGIONS,
    BundledEmbedder,
    MatchSegSegmenter,
    load_weights,
    save_weights,
    standardize,
)
from lib.models.network import Encoded, MatchSegNet, NetworkConfig, Output, Remembered, grid
from lib.types import Memory


@pytest.fixture(scope="module")
def segmenter() -> MatchSegSegmenter:
    torch.manual_seed(0)
    net = MatchSegNet(NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8))
    torch.nn.init.normal_(net.head.weight, std=0.3)  # the decoder must have a say in these tests
    return MatchSegSegmenter(net, digest="0" * 64, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.random((50 + 7 * i, 40, 3) if i == 2 else (50 + 7 * i, 40)).astype(np.float32)
        for i in range(5)
    ]


def references(
    segmenter: MatchSegSegmenter, pictures: list[np.ndarray], n_labels: int
) -> list[Memory]:
    generator = torch.Generator().manual_seed(1)
    return [
        segmenter.remember(f, torch.rand(n_labels, *p.shape[:2], generator=generator) > 0.6)
        for f, p in zip(segmenter.encode(pictures[1:]), pictures[1:], strict=True)
    ]


def test_at_most_the_papers_number_of_parameters() -> None:
    assert sum(p.numel() for p in MatchSegNet(NetworkConfig()).parameters()) <= 7_800_000


def test_no_step_keeps_what_only_training_needs(segmenter, pictures) -> None:
    query = segmenter.encode(pictures[:1])[0]
    memories = references(segmenter, pictures, 2)
    answer = segmenter.segment(query, memories, torch.ones(4, 2, dtype=torch.bool))
    tensors = [*query.maps, memories[0].image, answer.scores, answer.presence, answer.quality]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert answer.scores.is_inference()


def test_grey_and_rgb_of_any_size_give_scores_on_the_working_grid(segmenter, pictures) -> None:
    query = segmenter.encode(pictures[:1])[0]
    answer = segmenter.segment(
        query, references(segmenter, pictures, 3), torch.ones(4, 3, dtype=torch.bool)
    )
    assert answer.scores.shape == (3, 64, 64)
    assert answer.scores.dtype == torch.float32
    assert answer.presence.shape == answer.quality.shape == (3,)
    assert bool(torch.isfinite(answer.scores).all())


def test_order_of_references_does_not_matter(segmenter, pictures) -> None:
    query = segmenter.encode(pictures[:1])[0]
    memories = references(segmenter, pictures, 2)
    known = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    order = [2, 0, 3, 1]
    a = segmenter.segment(query, memories, known)
    b = segmenter.segment(query, [memories[i] for i in order], known[order])
    torch.testing.assert_close(a.scores, b.scores, atol=2e-4, rtol=1e-4)


def test_a_reference_that_does_not_know_a_label_has_no_say_on_it(segmenter, pictures) -> None:
    query = segmenter.encode(pictures[:1])[0]
    memories = references(segmenter, pictures, 2)
    known = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]], dtype=torch.bool)
    scrambled = Memory(memories[3].image, memories[3].labels.clone())
    scrambled.labels[1] = 7.0
    a = segmenter.segment(query, memories, known)
    b = segmenter.segment(query, [*memories[:3], scrambled], known)
    torch.testing.assert_close(a.scores, b.scores)
    c = segmenter.segment(query, [*memories[:3], scrambled], torch.ones_like(known))
    assert not torch.allclose(a.scores, c.scores)


def test_vote_equals_the_formula_computed_position_by_position(segmenter) -> None:
    net = segmenter._net
    generator = torch.Generator().manual_seed(3)
    side, n_refs, n_labels = 4, 2, 2
    unit = torch.nn.functional.normalize
    query = unit(torch.randn(1, 152, side, side, generator=generator), dim=1)
    refs = unit(torch.randn(1, n_refs, side * side, 152, generator=generator), dim=-1)
    labels = torch.randint(0, n_labels + 1, (n_refs, side * side), generator=generator)
    values = (
        torch.nn.functional.one_hot(labels, n_labels + 1)[..., 1:].permute(0, 2, 1)[None].float()
    )
    with torch.no_grad():
        trust = torch.tensor([[0.0, -1.5]])
        known = torch.ones(1, n_refs, n_labels, dtype=torch.bool)
        votes = net.vote(query, refs, values, known, trust)
        tau, weight = net.log_tau[0].exp(), net.place_weight[0].exp()
    places = grid(side, torch.device("cpu"))
    for p in range(side * side):
        total, share = 0.0, torch.zeros(n_labels + 1)
        for r in range(n_refs):
            for s in range(side * side):
                near = query[0, :, p // side, p % side] @ refs[0, r, s]
                far = ((places[p] - places[s]) ** 2).sum()
                vote = torch.exp(tau * (near - weight * far) + trust[0, r])
                share[(labels[r, s] - 1) % (n_labels + 1)] += vote
                total += vote
        expected = share / total
        torch.testing.assert_close(
            votes[0, 0, :, p // side, p % side], expected, atol=1e-4, rtol=1e-3
        )


def test_an_empty_mask_is_remembered_as_absence(segmenter, pictures) -> None:
    features = segmenter.encode(pictures[:2])
    empty = segmenter.remember(features[1], torch.zeros(1, *pictures[1].shape, dtype=torch.bool))
    answer = segmenter.segment(features[0], [empty], torch.ones(1, 1, dtype=torch.bool))
    with torch.inference_mode():
        votes = segmenter._net.vote(
            features[0].maps[0][None],
            empty.image[:64].float()[None, None],
            torch.zeros(1, 1, 1, 64),
            torch.ones(1, 1, 1, dtype=torch.bool),
            torch.zeros(1, 1),
        )
    assert float(votes[:, :, 0].max()) == 0.0
    assert answer.scores.shape == (1, 64, 64)


def test_gradient_reaches_every_parameter(pictures) -> None:
    from lib.trainers.pretraining.losses import episode_loss

    torch.manual_seed(0)
    net = MatchSegNet(NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8))
    torch.nn.init.normal_(net.head.weight, std=0.1)
    encoded = net.encode(standardize(torch.rand(3, 3, 64, 64)))
    masks = torch.zeros(3, 2, 64, 64)
    masks[:, 0, 10:40, 10:40] = 1
    masks[:2, 1, 45:60, 20:60] = 1
    m = net.remember(encoded, masks)
    pick = torch.tensor([[1, 2], [0, 2], [0, 1]])
    memory = Remembered(
        m.descriptor[pick], m.mask8[pick], m.tokens[pick], m.sums4[pick], m.sums2[pick]
    )
    similarity = torch.tensor([[0.9, 0.8], [0.7, 0.9], [0.8, 0.5]])
    known = torch.ones(3, 2, 2, dtype=torch.bool)
    loss, _ = episode_loss(net.segment(encoded, memory, known, similarity), masks)
    loss.backward()
    without = [
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()
    ]
    assert not without


def test_a_reference_that_looks_like_the_query_is_trusted_more(segmenter, pictures) -> None:
    """The same masks on like and unlike pictures: the like one's share of the vote grows."""
    net, known = segmenter._net, torch.ones(1, 2, 1, dtype=torch.bool)
    features = segmenter.encode(pictures[:2])
    descriptors = torch.stack([f.maps[0].flatten(1).T for f in features])[None]
    cells = descriptors.shape[2]
    values = torch.stack([torch.ones(1, cells), torch.zeros(1, cells)])[None]
    with torch.inference_mode():
        query = features[0].maps[0][None]
        shares = [
            float(
                net.vote(query, descriptors, values, known, torch.tensor([[0.0, t]]))[
                    :, :, 0
                ].mean()
            )
            for t in (3.0, 0.0, -3.0)
        ]
    assert shares[0] < shares[1] < shares[2]
    memories = [
        segmenter.remember(f, torch.ones(1, *p.shape[:2], dtype=torch.bool))
        for f, p in zip(features, pictures, strict=False)
    ]
    width = len(features[0].embedding)
    kept = memories[1].image[64:].flatten()[:width].float().numpy()
    np.testing.assert_allclose(kept, features[1].embedding, atol=1e-3)


def test_embedding_is_a_unit_vector_taken_from_the_features(segmenter, pictures) -> None:
    embedder = BundledEmbedder(segmenter)
    features = segmenter.encode(pictures)
    vectors = embedder.embed(pictures, features)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors, embedder.embed(pictures), atol=1e-5)


def test_regions_are_means_of_the_descriptors_row_by_row(segmenter, pictures) -> None:
    embedder = BundledEmbedder(segmenter)
    features = segmenter.encode(pictures)
    rows = embedder.regions(pictures, features)
    maps = features[1].maps[0].float()
    step = maps.shape[-1] // REGIONS
    assert rows.shape == (len(pictures), REGIONS**2, maps.shape[0])
    for row, column in ((0, 0), (0, REGIONS - 1), (2, 1)):
        part = maps[:, row * step : (row + 1) * step, column * step : (column + 1) * step]
        np.testing.assert_allclose(
            rows[1, row * REGIONS + column], part.mean((1, 2)).numpy(), atol=1e-5
        )
    np.testing.assert_allclose(rows, embedder.regions(pictures), atol=1e-5)


class CrampedNet(MatchSegNet):
    """On a device that has room for `room` images at once, and none for `segment`."""

    room = 2

    def encode(self, images: torch.Tensor) -> Encoded:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().encode(images)

    def segment(
        self,
        query: Encoded,
        memory: Remembered,
        known: torch.Tensor,
        similarity: torch.Tensor,
        place: float = 1.0,
        moves: torch.Tensor | None = None,
    ) -> Output:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_device_that_is_too_small_gets_fewer_images_or_a_sentence(segmenter, pictures) -> None:
    net = CrampedNet(segmenter._net.config)
    net.load_state_dict(segmenter._net.state_dict())
    cramped = MatchSegSegmenter(net, digest="0" * 64, device="cpu")
    for ours, theirs in zip(cramped.encode(pictures), segmenter.encode(pictures), strict=True):
        for one, other in zip(ours.maps, theirs.maps, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    memories = references(segmenter, pictures, 3)
    query, known = segmenter.encode(pictures[:1])[0], torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(RefSegError, match=r"3 label.* and 4 reference.*device=cpu"):
        cramped.segment(query, memories, known)
    net.room = 0
    with pytest.raises(RefSegError, match="device=cpu"):
        cramped.encode(pictures)


def test_weights_survive_the_file_and_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    net = MatchSegNet(NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8))
    path = tmp_path / "net.safetensors"
    digest = save_weights(net, path)
    again = load_weights(path, sha256=digest)
    assert again.config == net.config
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, net.state_dict()[name].half().float())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(WeightsError, match="damaged"):
        load_weights(path, sha256=digest)
    path.write_bytes(bytes(raw)[: len(raw) // 2])
    with pytest.raises(WeightsError, match="not a file of network weights"):
        load_weights(path)


def test_absent_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="restore it with git"):
        load_weights(tmp_path / "nothing.safetensors")
