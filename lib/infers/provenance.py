"""Where a mask came from: what made it, from which references, with which settings, and when."""

from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from lib.runtime import Runtime
from lib.segmentation import Options
from lib.types import Study

RELEASE = "0.1.0"  # pyproject.toml has the same, which a test compares
SETTINGS = ("annotation", "window", "axis", "labels", "tags", "device")


def provenance_of(runtime: Runtime, options: Options, study: Study) -> dict[str, Any]:
    """All that the answer's other parameters do not say, as JSON.

    The fingerprints hold digests of the weights: another file of weights, another fingerprint.
    """
    engine, version = runtime.engine, runtime.bank.version
    chosen = runtime.settings.model_dump(mode="json", include=set(SETTINGS))
    return {
        "made_by": f"RefSeg {RELEASE}",
        "torch": str(torch.__version__),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "segmenter": {"name": engine.segmenter.name, "weights": engine.segmenter.fingerprint},
        "embedder": {"name": engine.embedder.name, "weights": engine.embedder.fingerprint},
        "bank": {"generation": version.generation, "fingerprint": version.fingerprint},
        "study": {
            "place": study.place,
            "aligned": study.aligned,
            "reach": study.reach,
            "shapes": {name: asdict(shape) for name, shape in study.shapes.items()},
            "looks": list(study.looks.corrected) if study.looks is not None else [],
        },
        "settings": {
            "k": options.k,
            "cap_per_case": options.cap_per_case,
            "own_labels": options.own_labels,
            "every_slice": options.every_slice,
            **chosen,
        },
    }
