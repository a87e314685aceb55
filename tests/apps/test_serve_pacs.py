"""`serve` in front of a PACS, as OHIF uses it; `test_orthanc` does the same at a real one."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import requests

from scenes.patients import NAMES, SHAPE, draw_elsewhere, draw_on_grid, organs, write_patient
from tests.apps.phantoms import dice
from tests.apps.serve_process import ServeProcess
from tests.small_pacs import SmallPacs, running_pacs

pytestmark = pytest.mark.server

OHIF = {
    "result_extension": ".nrrd",
    "result_dtype": "uint8",
    "result_compress": False,
    "restore_label_idx": False,
}


@dataclass
class Ward:
    """A PACS of two patients, the first with a SEG, and a server in front of it."""

    pacs: SmallPacs
    server: ServeProcess
    series: list[str]
    folder: Path

    def infer(self, output: str, **params: object) -> requests.Response:
        return requests.post(
            f"{self.server.url}/infer/refseg",
            params={"image": self.series[1], "output": output},
            files={"params": (None, json.dumps({**OHIF, **params}))},
            timeout=300,
        )


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("ward")
    with running_pacs() as pacs:
        series = [write_patient(folder / f"p{n}", n) for n in range(2)]
        for n in range(2):
            pacs.add(folder / f"p{n}")
        draw_elsewhere(folder / "p0", organs(0), folder / "seg")
        pacs.add(folder / "seg")
        server = ServeProcess(folder, pacs.url, "--conf", "warm_up=false")
        try:
            yield Ward(pacs, server.wait(), series, folder)
        finally:
            server.stop()


def test_a_seg_is_a_reference_and_ohif_gets_a_mask_in_the_order_of_the_series(ward: Ward) -> None:
    answer = ward.infer("image")
    assert answer.status_code == 200, answer.text
    body = answer.content[answer.content.index(b"\n\n") + 2 :]
    mask = np.frombuffer(body, np.uint8).reshape(SHAPE, order="F")
    models = requests.get(f"{ward.server.url}/info/", timeout=60).json()["models"]
    numbers = models["refseg"]["labels"]
    assert dice(mask == numbers["liver"], organs(1) == 1) > 0.6
    assert dice(mask == numbers["spleen"], organs(1) == 2) > 0.6


def test_a_result_as_dicom_seg_needs_no_tool(ward: Ward) -> None:
    answer = ward.infer("dicom_seg", label_info=[{"name": "liver"}, {"name": "spleen"}])
    assert answer.status_code == 200, answer.text
    seg = pydicom.dcmread(io.BytesIO(answer.content))
    assert [entry.SegmentLabel for entry in seg.SegmentSequence] == ["liver", "spleen"]
    assert "dcmqi" not in ward.server.log


def test_a_label_on_slicers_grid_is_stored_and_refused_when_the_pacs_refuses(ward: Ward) -> None:
    file = ward.folder / "label.nii.gz"
    draw_on_grid(ward.folder / "p1", organs(1), file)
    # 3D Slicer may write another order of axes: the same voxels at the same places
    turned = nibabel.as_closest_canonical(nibabel.load(file))
    nibabel.save(turned, file)

    def submit() -> requests.Response:
        info = [{"name": name, "idx": number} for number, name in NAMES.items()]
        return requests.put(
            f"{ward.server.url}/datastore/label",
            params={"image": ward.series[1]},
            files={
                "label": (file.name, file.read_bytes()),
                "params": (None, json.dumps({"label_info": info})),
            },
            timeout=300,
        )

    ward.pacs.fault = "fails"
    refused = submit()
    assert refused.status_code == 503
    assert "did not store" in refused.json()["detail"]
    ward.pacs.fault = ""
    before = len(ward.pacs.stored)
    assert submit().status_code == 200
    assert len(ward.pacs.stored) == before + 1
    seg = ward.pacs.sets(SOPInstanceUID=ward.pacs.stored[-1])[0]
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == ward.series[1]
    held = requests.get(
        f"{ward.server.url}/datastore/label",
        params={"label": ward.series[1], "tag": "final"},
        timeout=60,
    )
    (ward.folder / "held.nii.gz").write_bytes(held.content)
    got = np.asarray(nibabel.load(ward.folder / "held.nii.gz").dataobj)
    np.testing.assert_array_equal(got, organs(1))


def test_what_ohif_asks_the_pacs_goes_through_with_its_query(ward: Ward) -> None:
    found = requests.get(
        f"{ward.server.url}/proxy/dicom/qido/series", params={"Modality": "SEG"}, timeout=60
    )
    assert {row["00080060"]["Value"][0] for row in found.json()} == {"SEG"}
