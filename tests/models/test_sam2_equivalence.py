"""The `sam2` segmenter is SAM 2's memory: compared with the package's own tracking.

The oracles are `SAM2VideoPredictor`, built by the package's own builder, and `SAM2Base.track_step`.
Weights are random; what is zero or tiny at the start of training (position codes, time codes, the
embeddings that say "absent") is made large, so that an error in any of them would show.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from lib.models.sam2 import Sam2Options, Sam2Segmenter
from lib.models.sam2_memory import POINTER_STEP
from lib.models.sam2_network import CONFIGS, Sam2Network, build_module
from lib.types import FloatArray

EXACT = Sam2Options(pointer_distance=1.0, memory_dtype=torch.float32)
SMALL = 256
CODES = ("pos_embed", "maskmem_tpos_enc", "no_mem_", "no_obj_")


def lively_module(variant, size, *, object_score=10.0):
    """A random SAM 2 whose every learned code matters and whose object score has a known sign."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module = build_module(variant, size=size)
        for name, parameter in module.named_parameters():
            if any(code in name for code in CODES):
                parameter.normal_(std=0.5)
            if name.endswith("gamma"):
                parameter.fill_(0.5)
            if "cross_attn_image" in name:  # as initialised, attention is near uniform
                parameter.mul_(5)
        head = module.sam_mask_decoder.pred_obj_score_head.layers[-1]
        head.weight.zero_()
        head.bias.fill_(object_score)
    return module


def segmenter(module, size, options=EXACT, variant="sam2.1-tiny"):
    network = Sam2Network(module, variant, size, "test")
    return Sam2Segmenter(network, device="cpu", options=options)


def frame(seed, size):
    """A smooth picture (H, W, 3) in 0..1 with a bright disc that moves with the seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    picture[disc(seed, size).numpy()] = 0.9
    return picture


def disc(seed, size):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = size * (0.35 + 0.05 * seed)
    return (rows - centre) ** 2 + (columns - size / 2) ** 2 < (size / 6) ** 2


def features_for_tracking(module, image: FloatArray):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = ((torch.from_numpy(image) - mean) / std).permute(2, 0, 1)[None]
    _, features, positions, sizes = module._prepare_backbone_features(module.forward_image(batch))
    return {
        "current_vision_feats": features,
        "current_vision_pos_embeds": positions,
        "feat_sizes": sizes,
        "point_inputs": None,
    }


def tracked_reference(module, image, mask):
    return module.track_step(
        frame_idx=0,
        is_init_cond_frame=True,
        mask_inputs=mask[None, None].float(),
        output_dict={},
        num_frames=2,
        run_mem_encoder=True,
        **features_for_tracking(module, image),
    )


def tracked_query(module, image, *, conditioning, recent, index, frames):
    output = module.track_step(
        frame_idx=index,
        is_init_cond_frame=False,
        mask_inputs=None,
        output_dict={"cond_frame_outputs": conditioning, "non_cond_frame_outputs": recent},
        num_frames=frames,
        run_mem_encoder=False,
        **features_for_tracking(module, image),
    )
    return output["pred_masks_high_res"][0, 0]


def segment_by(ours, query, references, masks, **options):
    """Scores (S, S) of one label, from references with one mask each."""
    encoded = ours.encode([query, *references])
    memories = [
        ours.remember(features, mask[None])
        for features, mask in zip(encoded[1:], masks, strict=True)
    ]
    known = torch.ones(len(memories), 1, dtype=torch.bool)
    return ours.segment(encoded[0], memories, known, **options)


def largest_difference(a, b):
    assert torch.isfinite(a).all()
    assert a.std() > 0.05, "flat logits would prove nothing"
    return float((a - b).abs().max())


def predictor_of_the_package(module, size):
    """The package's own builder, which needs Hydra's global state; it is put back afterwards."""
    from sam2.build_sam import build_sam2_video_predictor

    GlobalHydra.instance().clear()
    initialize_config_module("sam2", version_base="1.2")
    try:
        predictor = build_sam2_video_predictor(
            CONFIGS["sam2.1-tiny"],
            device="cpu",
            apply_postprocessing=False,
            hydra_overrides_extra=[f"++model.image_size={size}"],
        )
    finally:
        GlobalHydra.instance().clear()
    predictor.load_state_dict(module.state_dict())
    return predictor


@torch.inference_mode()
def check_against_the_predictor(size, folder: Path):
    module = lively_module("sam2.1-tiny", size)
    for index in (0, 1):
        pixels = (frame(index, size) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=95)
    clip = [np.asarray(Image.open(folder / f"{index}.jpg"), np.float32) / 255 for index in (0, 1)]
    predictor = predictor_of_the_package(module, size)
    state = predictor.init_state(str(folder))
    predictor.add_new_mask(state, frame_idx=0, obj_id=1, mask=disc(0, size))
    expected = {index: masks for index, _, masks in predictor.propagate_in_video(state)}[1][0, 0]

    options = Sam2Options(pointer_distance=1.0, blur_masks=True)
    ours = segmenter(module, size, options)
    assert ours.options.memory_dtype == torch.bfloat16
    prediction = segment_by(ours, clip[1], clip[:1], [disc(0, size)])
    assert largest_difference(prediction.scores[0], expected) <= 1e-3
    # the memory is what decides: another mask gives something else
    other = segment_by(ours, clip[1], clip[:1], [disc(8, size)])
    assert largest_difference(other.scores[0], expected) > 1e-2


def test_a_reference_and_a_query_equal_the_video_predictor_on_two_frames_at_512(tmp_path):
    check_against_the_predictor(512, tmp_path)


@pytest.mark.slow
def test_a_reference_and_a_query_equal_the_video_predictor_on_two_frames_at_1024(tmp_path):
    check_against_the_predictor(1024, tmp_path)


@pytest.mark.parametrize("variant", ["sam2.1-tiny", "sam2-tiny"])
@torch.inference_mode()
def test_a_reference_and_a_query_equal_track_step_without_rounding(variant):
    module = lively_module(variant, SMALL)
    reference = tracked_reference(module, frame(0, SMALL), disc(0, SMALL))
    expected = tracked_query(
        module, frame(1, SMALL), conditioning={0: reference}, recent={}, index=1, frames=2
    )
    ours = segmenter(module, SMALL, variant=variant)
    prediction = segment_by(ours, frame(1, SMALL), [frame(0, SMALL)], [disc(0, SMALL)])
    assert largest_difference(prediction.scores[0], expected) <= 1e-4
    assert prediction.presence[0] == pytest.approx(1.0, abs=1e-3)
    assert 0 < float(prediction.quality[0]) < 1


@torch.inference_mode()
def test_several_references_one_of_them_empty_equal_conditioning_frames_of_track_step():
    module = lively_module("sam2.1-tiny", SMALL)
    nothing = torch.zeros(SMALL, SMALL, dtype=torch.bool)
    masks = [disc(0, SMALL), nothing, disc(2, SMALL)]
    references = [frame(seed, SMALL) for seed in range(3)]
    conditioning = {
        index: tracked_reference(module, image, mask)
        for index, (image, mask) in enumerate(zip(references, masks, strict=True))
    }
    module.use_obj_ptrs_in_encoder = False  # tracking's pointers know the order of frames
    expected = tracked_query(
        module, frame(5, SMALL), conditioning=conditioning, recent={}, index=3, frames=4
    )
    module.use_obj_ptrs_in_encoder = True
    ours = segmenter(module, SMALL, Sam2Options(pointer_distance=None, memory_dtype=torch.float32))
    prediction = segment_by(ours, frame(5, SMALL), references, masks)
    assert largest_difference(prediction.scores[0], expected) <= 1e-4
    # the empty reference is a memory like the others: without it the answer changes
    fewer = segment_by(ours, frame(5, SMALL), references[::2], masks[::2])
    assert largest_difference(fewer.scores[0], expected) > 1e-2


@torch.inference_mode()
def test_neighbors_take_the_slots_and_times_of_recent_frames():
    module = lively_module("sam2.1-tiny", SMALL)
    images = [frame(seed, SMALL) for seed in range(4)]
    masks = [disc(seed, SMALL) for seed in range(4)]
    outputs = [tracked_reference(module, *pair) for pair in zip(images, masks, strict=True)]
    # frames 0 (conditioning), 2 and 3 (recent) of a long clip; the query is frame 4
    expected = tracked_query(
        module,
        frame(6, SMALL),
        conditioning={0: outputs[0]},
        recent={2: outputs[2], 3: outputs[3]},
        index=4,
        frames=16,
    )
    options = Sam2Options(pointer_distance=4 * POINTER_STEP, memory_dtype=torch.float32)
    ours = segmenter(module, SMALL, options)
    near, far = (
        ours.remember(features, mask[None])
        for features, mask in zip(ours.encode([images[3], images[2]]), masks[:1:-1], strict=True)
    )
    prediction = segment_by(
        ours, frame(6, SMALL), images[:1], masks[:1], neighbors=[near, far, None]
    )
    assert largest_difference(prediction.scores[0], expected) <= 1e-4
    swapped = segment_by(ours, frame(6, SMALL), images[:1], masks[:1], neighbors=[far, near])
    assert largest_difference(swapped.scores[0], expected) > 1e-3


@torch.inference_mode()
def test_the_gate_of_an_absent_object_equals_track_step_and_can_be_opened():
    module = lively_module("sam2.1-tiny", SMALL, object_score=-3.0)
    reference = tracked_reference(module, frame(0, SMALL), disc(0, SMALL))
    expected = tracked_query(
        module, frame(1, SMALL), conditioning={0: reference}, recent={}, index=1, frames=2
    )
    shut = segment_by(
        segmenter(module, SMALL), frame(1, SMALL), [frame(0, SMALL)], [disc(0, SMALL)]
    )
    assert torch.equal(shut.scores[0], expected)
    assert float(expected.max()) == -1024
    # absence is reported as such, not hidden in an empty mask
    assert float(shut.presence[0]) == pytest.approx(1 / (1 + np.exp(3)), rel=1e-4)
    assert float(shut.quality[0]) == pytest.approx(1 - float(shut.presence[0]))
    options = Sam2Options(pointer_distance=1.0, absence_threshold=0.0)
    opened = segment_by(
        segmenter(module, SMALL, options), frame(1, SMALL), [frame(0, SMALL)], [disc(0, SMALL)]
    )
    assert float(opened.scores.max()) > -100
