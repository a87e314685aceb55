"""SAM 2's network from the `sam2` package's own YAML, without Hydra's global state."""

import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.errors import RequestError, WeightsError
from lib.models.weights import state_digest

CONFIGS = {
    f"{release}-{size}": f"configs/{release}/{release}_hiera_{letter}.yaml"
    for release in ("sam2.1", "sam2")
    for size, letter in (("tiny", "t"), ("small", "s"), ("base-plus", "b+"), ("large", "l"))
}
STRIDE = 16  # of the feature map that memories live on
_hydra_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Sam2Network:
    """A SAM 2 network ready for inference.

    Attributes:
        module: `sam2.modeling.sam2_base.SAM2Base` in evaluation mode, on the CPU.
        variant: one of `CONFIGS`.
        size: side of the square input in pixels.
        digest: SHA-256 over the names and values of all weights.
    """

    module: Any
    variant: str
    size: int
    digest: str


def build_module(variant: str, *, size: int, overrides: dict[str, Any] | None = None) -> Any:
    """Instantiate the package's YAML with random weights, for inputs of `size` pixels.

    The package is written for 1,024 pixels. Three settings carry that number: `image_size`, and
    the grids of the rotary position codes of self- and cross-attention. All three are set here,
    so that nothing is recomputed (and no module changed) during inference at another size.

    Importing `sam2` initialises Hydra's global state for the whole process; whoever initialises
    Hydra after that fails. It is cleared again if it was not there before.

    Args:
        variant: one of `CONFIGS`.
        size: side of the square input, a multiple of 32 (the encoder's coarsest stride).
        overrides: dotted keys under `model` and their values, as `build_sam` sets them.

    Raises:
        RequestError: unknown variant or impossible size.
    """
    if variant not in CONFIGS:
        msg = f"SAM 2 variant {variant!r} is unknown; choose one of {', '.join(CONFIGS)}."
        raise RequestError(msg)
    if size % 32 or not 128 <= size <= 2048:
        msg = (
            f"SAM 2's working size is {size}; it must be a multiple of 32 in 128..2048. "
            "Use 1024 (what it was trained with), or 512 for speed."
        )
        raise RequestError(msg)
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(_package_folder() / CONFIGS[variant])
    grid = [size // STRIDE, size // STRIDE]
    settings: dict[str, Any] = {
        "image_size": size,
        "memory_attention.layer.self_attention.feat_sizes": grid,
        "memory_attention.layer.cross_attention.feat_sizes": grid,
    }
    for key, value in {**settings, **(overrides or {})}.items():
        OmegaConf.update(config.model, key, value, force_add=True)
    OmegaConf.resolve(config)
    with _hydra_lock:
        initialised = GlobalHydra.instance().is_initialized()
        try:
            module = instantiate(config.model, _recursive_=True)
        finally:
            if not initialised:
                GlobalHydra.instance().clear()
    return module.eval().requires_grad_(False)


def load_network(variant: str, checkpoint: Path, *, size: int) -> Sam2Network:
    """Build a variant and load its checkpoint.

    Args:
        variant: one of `CONFIGS`.
        checkpoint: `.pt` as Meta publishes it (read with `weights_only`), or `.safetensors` with
            the same names.
        size: side of the square input in pixels.

    Raises:
        WeightsError: the file cannot be read or belongs to another network.
    """
    state = _read_state(checkpoint)
    module = build_module(variant, size=size)
    _check_fit(state, module.state_dict(), variant=variant, checkpoint=checkpoint)
    module.load_state_dict(state)
    return Sam2Network(module, variant, size, state_digest(module.state_dict()))


def random_network(variant: str, *, size: int, seed: int) -> Sam2Network:
    """A network with random weights, equal for equal seeds: for tests and timings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_module(variant, size=size)
    return Sam2Network(module, variant, size, state_digest(module.state_dict()))


def _package_folder() -> Path:
    """The folder of the `sam2` package, found without importing it."""
    spec = importlib.util.find_spec("sam2")
    if spec is None or not spec.submodule_search_locations:
        msg = (
            "The Python package sam2 is not installed. Run `make setup`, or use "
            "`--conf segmenter matchseg`."
        )
        raise WeightsError(msg)
    return Path(spec.submodule_search_locations[0])


def _read_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by name; never unpickles code."""
    try:
        if checkpoint.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(checkpoint)
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"{checkpoint} cannot be read as a SAM 2 checkpoint ({type(error).__name__}: {error}). "
            "Fetch it again with `python apps/refseg/main.py weights fetch NAME`."
        )
        raise WeightsError(msg) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        msg = f"{checkpoint} holds no state_dict; a SAM 2 checkpoint is {{'model': state_dict}}."
        raise WeightsError(msg)
    return state


def _check_fit(
    state: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    *,
    variant: str,
    checkpoint: Path,
) -> None:
    """Raise with the reason if a checkpoint is not this network's."""
    missing = sorted(wanted.keys() - state.keys())
    surplus = sorted(state.keys() - wanted.keys())
    shapes = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    if not (missing or surplus or shapes):
        return
    if any(name.startswith("vision_encoder.") for name in surplus):
        reason = "it is in the layout of the transformers library; the original one is needed"
    else:
        counts = f"{len(missing)} missing, {len(surplus)} unknown, {len(shapes)} of another shape"
        first = (missing + surplus + shapes)[0]
        reason = f"tensors: {counts}, for instance {first}"
    msg = (
        f"{checkpoint} does not fit SAM 2 variant {variant}: {reason}. Choose the variant that the "
        f"file was made for, or run `python apps/refseg/main.py weights fetch {variant}`."
    )
    raise WeightsError(msg)
