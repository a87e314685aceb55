"""Plays an annotator over REST: asks for the next image, submits its label, looks at the others."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.client import MONAILabelClient

from demo.study import Study, dice, read, same_grid

STRATEGY = "refseg"
MODEL = "refseg"
# What 3D Slicer sends with each request for a segmentation.
PARAMS = {"result_dtype": "uint8", "result_compress": False}


@dataclass(frozen=True)
class Answer:
    """What RefSeg said about one image.

    Attributes:
        image_id: the image.
        mask: file of the label map, kept for the picture.
        values: label name -> value in the file.
        dice: label name -> Dice against the truth.
        seconds: from the request to the answer.
        params: what the server says of its answer.
    """

    image_id: str
    mask: Path
    values: Mapping[str, int]
    dice: Mapping[str, float]
    seconds: float
    params: Mapping[str, Any]

    @property
    def mean_dice(self) -> float:
        """Mean over the labels."""
        return float(np.mean(list(self.dice.values())))


@dataclass(frozen=True)
class Round:
    """One look at all images that have no label yet."""

    labelled: tuple[str, ...]
    answers: Mapping[str, Answer]


def rounds(study: Study, url: str, work: Path, on_step: Callable[[str], None]) -> Iterator[Round]:
    """Play the annotator; yields a round after each number of labels that the study names.

    Args:
        study: the images and their truth.
        url: of the server.
        work: folder for the answers.
        on_step: called before each request with what is about to happen.
    """
    received = work / "received"
    received.mkdir(parents=True, exist_ok=True)
    # Its own folder: the client keeps the server's file names, and the server deletes its own.
    client = MONAILabelClient(url, tmpdir=str(received), client_id="demo")
    labelled: list[str] = []
    for number, wanted in enumerate(study.rounds, start=1):
        while len(labelled) < wanted:
            on_step("which image next?")
            image_id = client.next_sample(STRATEGY, {})["id"]
            on_step(f"submit the label of {image_id}")
            submit(client, study, image_id)
            labelled.append(image_id)
        answers = {}
        for image_id in sorted(set(study.truth) - set(labelled)):
            on_step(f"segment {image_id} by reference to {', '.join(labelled)}")
            answers[image_id] = segment(client, study, image_id, work / f"round_{number}")
        yield Round(tuple(labelled), answers)


def steps(study: Study) -> int:
    """How many times `rounds` will call `on_step`."""
    looks = sum(len(study.truth) - labelled for labelled in study.rounds)
    return looks + 2 * max(study.rounds)


def submit(client: MONAILabelClient, study: Study, image_id: str) -> None:
    """Submit the true label as 3D Slicer does: the k-th name belongs to value k."""
    names = [study.label_names[value] for value in sorted(study.label_names)]
    info = [{"name": name, "idx": index} for index, name in enumerate(names, start=1)]
    client.save_label(image_id, str(study.truth[image_id]), "", {"label_info": info})


def segment(client: MONAILabelClient, study: Study, image_id: str, folder: Path) -> Answer:
    """Ask for one image's segmentation and measure it."""
    started = time.perf_counter()
    received, params = client.infer(MODEL, image_id, {**PARAMS, "result_extension": study.suffix})
    seconds = time.perf_counter() - started
    if received is None:
        msg = f"The server sent no mask for {image_id}: {params}"
        raise RuntimeError(msg)
    folder.mkdir(exist_ok=True)
    mask = Path(received).replace(folder / f"{image_id}{study.suffix}")
    if not same_grid(mask, study.truth[image_id]):
        msg = f"The mask of {image_id} is not on the image's own grid: {mask}"
        raise RuntimeError(msg)
    values = label_values(params)
    found, true = read(mask), read(study.truth[image_id])
    scores = {
        name: dice(found == values.get(name, -1), true == value)
        for value, name in study.label_names.items()
    }
    return Answer(image_id, mask, values, scores, seconds, params)


def label_values(params: Mapping[str, Any]) -> dict[str, int]:
    """Label name -> value, from the answer's `label_names`."""
    names = params.get("label_names") or {}
    if isinstance(names, Mapping):
        return {str(name): int(value) for name, value in names.items()}
    return {str(name): index for index, name in enumerate(names, start=1)}
