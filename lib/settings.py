"""RefSeg's one place for options: environment variables, then `--conf key value` on top."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lib.errors import RequestError

logger = logging.getLogger(__name__)

AXIS_NAMES = ("sagittal", "coronal", "axial")  # canonical axes 0, 1, 2 (Left, Posterior, Inferior)
PLATFORM_KEYS = frozenset(  # read by MONAI Label itself or by its sample apps: not ours, no error
    {"server_mode", "models", "preload", "auth_token", "zoo_source", "zoo_repo", "tracking"}
)

Names = Annotated[tuple[str, ...], NoDecode]
Window = Annotated[tuple[float, float] | None, NoDecode]


class RefSegSettings(BaseSettings):
    """All options of the server and of the command line; each may be `REFSEG_<NAME>`, too."""

    model_config = SettingsConfigDict(
        env_prefix="REFSEG_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    segmenter: Literal["auto", "sam2", "matchseg"] = Field(
        "auto", description="sam2 needs weights; auto takes it where weights and a GPU are present"
    )
    embedder: Literal["auto", "bundled", "dinov2-small", "dinov2-base", "dinov2-large", "clip"] = (
        Field("auto", description="what finds similar slices; auto is the bundled network's own")
    )
    sam2_variant: Literal["tiny", "small", "base", "large"] = Field(
        "tiny", description="size of SAM 2"
    )
    sam2_version: Literal["2", "2.1"] = Field("2.1", description="SAM 2 or SAM 2.1")
    sam2_size: Literal["512", "1024"] = Field("1024", description="SAM 2's working size in pixels")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    weights: Path | None = Field(None, description="folder that holds fetched weights")
    bank: Path | None = Field(None, description="folder of the memory banks")
    site_models: Path | None = Field(None, description="folder of the models trained here")
    site_average: bool = Field(
        False, description="average the model trained here with the other segmenter: slower"
    )
    train_after: int = Field(
        10,
        ge=0,
        le=100_000,
        description="a label starts a training when so many more images are labelled (0: never)",
    )

    labels: Names = Field((), description="label names to segment, comma-separated; else all seen")
    tags: Names = Field(("final",), description="label tags that count as references")
    annotation: Literal["partial", "complete"] = Field(
        "partial", description="whether a submitted label map may leave structures undrawn"
    )
    k: int = Field(8, ge=1, le=64, description="references for each slice")
    cap_per_case: int = Field(
        0, ge=0, le=64, description="at most so many of one case (0: no limit)"
    )
    own_labels: bool = Field(
        True, description="an image's own labelled slices are references and come back unchanged"
    )
    every_slice: bool = Field(
        False, description="segment all slices, also those whose two neighbors agree: slower"
    )
    window: Window = Field(None, description="intensity window low,high (CT), else percentiles")
    axis: Literal["auto", "sagittal", "coronal", "axial"] = Field(
        "auto", description="the plane in which volumes are cut; auto: the coarsest spacing"
    )
    batch: int = Field(8, ge=1, le=256, description="slices encoded at once")

    ohif: bool = Field(
        True, description="serve the strategy as `random`, too: OHIF asks for no other name"
    )
    seed: int = Field(0, description="of the strategy's first choice")
    lease: int = Field(
        600, ge=0, description="seconds for which an image given to one client is kept from others"
    )
    examine: int = Field(
        4,
        ge=0,
        le=1000,
        description="images whose masks are judged in the background after each next image",
    )
    history: int = Field(
        20, ge=1, le=1000, description="versions of each label that are kept when it is overwritten"
    )
    fetch_ahead: int = Field(
        32,
        ge=0,
        le=10000,
        description="series of a PACS fetched in the background to choose the next from",
    )
    warm_up: bool = Field(True, description="load the network in the background after the start")

    @field_validator("labels", "tags", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",")]
        return tuple(dict.fromkeys(name for name in names if name))

    @field_validator("window", mode="before")
    @classmethod
    def _split_window(cls, value: Any) -> Any:
        return parse_window(value) if isinstance(value, str) else value

    @field_validator("weights", "bank", "site_models", mode="after")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return value.expanduser().resolve() if value is not None else None

    @property
    def axis_index(self) -> int | None:
        """Canonical axis 0..2, or None for the coarsest."""
        return parse_axis(self.axis)


def parse_window(text: str) -> tuple[float, float] | None:
    """`"-160,240"` -> (-160.0, 240.0); empty -> None."""
    if not text.strip():
        return None
    parts = text.replace(";", ",").split(",")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        msg = f"window {text!r} is not two numbers; write it as low,high, such as -160,240."
        raise RequestError(msg) from None
    if not low < high:
        msg = f"window {text!r}: low must be below high; write it as -160,240."
        raise RequestError(msg)
    return low, high


def parse_axis(text: str) -> int | None:
    """`"axial"` -> 2; `"auto"` or empty -> None."""
    if text in ("", "auto"):
        return None
    if text not in AXIS_NAMES:
        msg = f"axis {text!r} is unknown; allowed are auto, {', '.join(AXIS_NAMES)}."
        raise RequestError(msg)
    return AXIS_NAMES.index(text)


def from_conf(conf: Mapping[str, str]) -> RefSegSettings:
    """Merge MONAI Label's `--conf key value` strings over the environment.

    Raises:
        RequestError: a key is unknown or a value is not allowed; the message lists what is.
    """
    known = RefSegSettings.model_fields
    ours = {key: value for key, value in conf.items() if key not in PLATFORM_KEYS}
    for key in conf.keys() - ours.keys() - {"server_mode"}:
        logger.info("--conf %s is MONAI Label's; RefSeg does not use it", key)
    unknown = sorted(ours.keys() - known.keys())
    if unknown:
        msg = f"--conf {', '.join(unknown)}: unknown; RefSeg knows {', '.join(sorted(known))}."
        raise RequestError(msg)
    try:
        return RefSegSettings(**ours)  # type: ignore[arg-type]  # strings, checked by pydantic
    except ValidationError as error:
        parts = [
            f"{'.'.join(str(place) for place in problem['loc'])} = {problem['input']!r}: "
            f"{problem['msg']}"
            for problem in error.errors()
        ]
        msg = f"an option is not allowed (--conf or REFSEG_...): {'; '.join(parts)}."
        raise RequestError(msg) from None
