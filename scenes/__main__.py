"""`python -m scenes`: OHIF in a browser, in front of RefSeg, in front of Orthanc."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import requests
import SimpleITK

from demo.server import REPOSITORY
from scenes.orthanc import PACKAGES, program, running_orthanc
from scenes.patients import NAMES, bone, draw_elsewhere, draw_on_grid, organs, write_patient
from tests.apps.serve_process import ServeProcess

WORK = REPOSITORY / "build" / "scenes"
PACKAGE = WORK / "node"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Play the scene, and print what was seen."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), "")
    lacking = [
        *([] if program() else [PACKAGES]),
        *([] if browser else ["chromium"]),
        *([] if shutil.which("node") else ["nodejs"]),
        *([] if (PACKAGE / "node_modules" / "playwright-core").is_dir() else ["playwright-core"]),
    ]
    if lacking:
        print(f"Not installed: {', '.join(lacking)}. `make scenes` installs them.")
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="refseg-scenes-") as folder:
        return _play(Path(folder), browser)


def _play(folder: Path, browser: str) -> int:
    with running_orthanc(folder / "orthanc") as orthanc:
        studies = [f"1.2.826.0.1.3680043.10.1.{n + 1}" for n in range(3)]
        series = [write_patient(folder / f"p{n}", n, study=studies[n]) for n in range(3)]
        for n in range(3):
            orthanc.send(folder / f"p{n}")
        draw_elsewhere(folder / "p0", organs(0), folder / "seg")
        orthanc.send(folder / "seg")

        draw_on_grid(folder / "p2", _with_bone(2), folder / "submit.nii.gz")
        names = [*NAMES.values(), "vertebra"]
        server = ServeProcess(folder, orthanc.dicomweb).wait()
        try:
            scene = {
                "url": server.url,
                "out": str(WORK),
                "packages": str(PACKAGE),
                "chromium": browser,
                "patient": "Phantom, 1",
                "study": studies[1],
                "labelled": studies[0],
                "submit": {
                    "image": series[2],
                    "file": str(folder / "submit.nii.gz"),
                    "params": {
                        "label_info": [{"name": n, "idx": i} for i, n in enumerate(names, 1)]
                    },
                },
            }
            (WORK / "scene.json").write_text(json.dumps(scene))
            (WORK / "ohif.json").unlink(missing_ok=True)
            script = Path(__file__).with_name("ohif.mjs")
            subprocess.run(
                ["node", str(script), str(WORK / "scene.json")], check=False, timeout=400
            )
            corrected = _held(server.url, series[0], series[1], folder)
        finally:
            server.stop()
            shutil.copy(folder / "serve.log", WORK / "serve.log")
        segs = len(orthanc.find(Modality="SEG"))
    told = json.loads((WORK / "ohif.json").read_text())
    return _judge(told, studies, segs, corrected)


def _held(url: str, image: str, other: str, folder: Path) -> npt.NDArray[np.uint8]:
    """The label that the server learns from, after the next request: (columns, rows, slices)."""
    time.sleep(6)  # it looks at the PACS every five seconds
    asked = {"params": (None, "{}")}
    requests.post(
        f"{url}/infer/refseg?image={other}&output=json", files=asked, timeout=300
    ).raise_for_status()
    answer = requests.get(f"{url}/datastore/label?label={image}&tag=final", timeout=60)
    (folder / "held.nii.gz").write_bytes(answer.content)
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "held.nii.gz"))).T


def _judge(
    told: dict[str, Any], studies: list[str], segs: int, corrected: npt.NDArray[np.uint8]
) -> int:
    drawn = organs(0)
    added = (corrected == 2) & (drawn == 0)
    nothing: dict[str, Any] = {"names": {}}
    truth, first, second = _with_bone(1), told.get("first", nothing), told.get("second", nothing)
    organs_shown = [_dice(first, "liver", truth == 1), _dice(first, "spleen", truth == 2)]
    seen = {
        "nothing went wrong in the browser": not told["problems"],
        "OHIF shows liver and spleen where they are": min(organs_shown) > 0.6,
        "next sample opens the other patient": studies[2] in told.get("opened", "")
        and studies[2] in told.get("next", ""),
        "a submitted label is one more DICOM SEG in the PACS": told.get("stored") == 200
        and segs == (3 if "listed" in told else 2),
        "after it OHIF shows the vertebra, too": "vertebra" not in first["names"]
        and _dice(second, "vertebra", truth == 3) > 0.6,
        "OHIF opens a DICOM SEG of RefSeg by its names": told.get("listed") == ["liver", "spleen"],
        "what is corrected in OHIF and uploaded is the label that RefSeg learns from": added.sum()
        > 100
        and bool((corrected == drawn)[~added].all()),
    }
    for what, is_so in seen.items():
        print(f"{'seen' if is_so else 'NOT SEEN'}: {what}")
    for name, shown in (("first", first), ("second", second)):
        for number, label in ((1, "liver"), (2, "spleen"), (3, "vertebra")):
            if label in shown["names"]:
                print(f"{name} {label}: Dice {_dice(shown, label, truth == number):.2f}")
    for problem in told["problems"]:
        print(f"problem: {problem}")
    print(f"Pictures and logs: {WORK.relative_to(REPOSITORY)}")
    return 0 if all(seen.values()) else 1


def _with_bone(seed: int) -> npt.NDArray[np.uint8]:
    labels = organs(seed)
    labels[bone()] = 3
    return labels


def _dice(shown: dict[str, Any], label: str, truth: npt.NDArray[np.bool_]) -> float:
    """Of what OHIF holds; its voxels are in the order of the series, columns first."""
    if label not in shown["names"]:
        return 0.0
    voxels = np.array(shown["voxels"], np.uint8).reshape(shown["dimensions"], order="F")
    mask = voxels == shown["names"][label]
    return float(2 * (mask & truth).sum() / max(1, mask.sum() + truth.sum()))


if __name__ == "__main__":
    sys.exit(main())
