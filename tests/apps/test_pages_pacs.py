"""The pages where the studies are in a PACS: to look at them fetches nothing."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.apps.serve_process import ServeProcess
from tests.dicom_series import write_series
from tests.small_pacs import SmallPacs, running_pacs

pytestmark = pytest.mark.server
SERIES = 4


@dataclass
class Ward:
    """A PACS of a few series, and a server in front of it that fetches one ahead."""

    pacs: SmallPacs
    server: ServeProcess
    ids: list[str]

    def page(self, path: str) -> str:
        answer = self.server.request("GET", f"/refseg/{path}")
        assert answer.status_code == 200, answer.text
        return answer.text

    def fetched(self) -> int:
        """How many times a series was asked for whole."""
        return sum(bool(re.search(r"/series/[\d.]+/?$", path)) for _, path, _ in self.pacs.asked)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder: Path = tmp_path_factory.mktemp("ward")
    with running_pacs() as pacs:
        ids = []
        for n in range(SERIES):
            voxels = np.random.default_rng(n).integers(0, 900, (40, 36, 3)).astype(np.uint16)
            ids.append(write_series(folder / f"s{n}", voxels, spacing_mm=(1, 1, 4), modality="CT"))
            pacs.add(folder / f"s{n}")
        conf = ("--conf", "fetch_ahead=1")
        server = ServeProcess(folder, pacs.url, *conf)
        try:
            yield Ward(pacs, server.wait(), ids)
        finally:
            server.stop()


def listed(ward: Ward) -> str:
    """The list, as soon as the server has asked the PACS and holds the one that it fetches."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        page = ward.page("images?show=all&order=name")
        if f"{SERIES} images." in page and page.count("in the PACS") < SERIES:
            return page
        time.sleep(0.3)
    raise AssertionError(page)


def test_looking_fetches_no_series_and_the_button_does(ward: Ward) -> None:
    page = listed(ward)
    assert all(one in page for one in ward.ids)
    assert page.count("in the PACS") == SERIES - 1
    before = ward.fetched()
    assert before == 1
    away = [one for one in ward.ids if "was not fetched yet" in ward.page(f"image?image={one}")]
    assert len(away) == SERIES - 1
    for one in away:
        answer = ward.server.request("GET", f"/refseg/picture?image={one}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "image/svg+xml"
    assert ward.fetched() == before
    answer = ward.server.request("POST", "/refseg/image", data={"image": away[0]})
    assert answer.status_code == 200
    assert ward.fetched() == before + 1
    assert "slice 1 of 0 to 2" in ward.page(f"image?image={away[0]}&slice=1")
    picture = ward.server.request("GET", f"/refseg/picture?image={away[0]}&slice=1&large=1")
    assert picture.headers["content-type"] == "image/jpeg"
