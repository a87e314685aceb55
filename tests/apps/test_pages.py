"""The pages at /refseg/ of a real server: what they say, refuse, and leave alone."""

import html
import io
import json
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from apps.refseg.server.page_login import LONGEST_S, MOST, Sessions
from apps.refseg.server.page_parts import Shelf
from lib.campaign.atlas import chart, survey
from lib.machine import identity
from lib.models.matchseg import BUNDLED, load_weights
from lib.retrieval.ranking import PoolView
from lib.site.store import ModelCard, ModelStore
from tests.apps import browser
from tests.apps.phantoms import (
    SHAPE,
    ball,
    box,
    write_labels,
    write_picture,
    write_picture_labels,
    write_volume,
)
from tests.apps.serve_process import ServeProcess

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
needs_browser = pytest.mark.skipif(
    browser.FOUND is None, reason="no Chromium or Chrome to open the pages in"
)

TOKEN = "a token of more than 16 characters"
NASTY = "<script>alert(1)<!-- &amp; \"'x' %2e ü"
PICTURES, LABELLED = 30, 5
PAGES = ("", "images", "images?show=all&order=name", "status", "image?image=picture+00")


def make_studies(folder: Path) -> Path:
    studies = folder / "studies"
    (studies / "labels" / "final").mkdir(parents=True)
    for seed in range(PICTURES):
        write_picture(studies / f"picture {seed:02}.png", seed, color=seed % 7 == 0)
    for seed in range(LABELLED):
        write_picture_labels(studies / "labels" / "final" / f"picture {seed:02}.png", seed)
    for seed in range(2):
        write_volume(studies / f"volume {seed}.nii.gz", seed)
    truth = 1 * ball(0) + 2 * box()
    write_labels(
        studies / "labels" / "final" / "volume 0.nii.gz", truth, studies / "volume 0.nii.gz"
    )
    write_picture(studies / f"{NASTY}.png", 40)
    return studies


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServeProcess]]:
    """An open server and one with a token, started together."""
    folder = tmp_path_factory.mktemp("pages")
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    servers = {}
    locked = ("--token-file", str(token), "--conf", "examine=0")
    for name, options in (("ours", ("--conf", "examine=3")), ("locked", locked)):
        room = folder / name
        room.mkdir()
        servers[name] = ServeProcess(
            room, make_studies(room), "--conf", f"site_models={room / 'models'}", *options
        )  # fmt: skip
    try:
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="module")
def ours(started: dict[str, ServeProcess]) -> ServeProcess:
    """Asked for one next sample, so that all images are compared."""
    server = started["ours"]
    assert server.request("POST", "/activelearning/refseg", json={"client_id": "first"}).ok
    until(server, "", lambda page: order_of(page) and f"{PICTURES + 3} of {PICTURES + 3}" in page)
    return server


@pytest.fixture(scope="module")
def locked(started: dict[str, ServeProcess]) -> ServeProcess:
    return started["locked"]


def get(server: ServeProcess, path: str, **more: Any) -> requests.Response:
    return server.request("GET", f"/refseg/{path}", **more)


def until(server: ServeProcess, path: str, holds: Any, seconds: float = 150, **more: Any) -> str:
    """The page as soon as something is so; it is drawn anew when there is time for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page = get(server, path, **more).text
        if holds(page):
            return page
        time.sleep(0.2)
    raise AssertionError(f"not so after {seconds} s:\n{page}")


def order_of(page: str) -> list[str]:
    """What comes next, as the page of the pool lists it."""
    part = page.partition('id="next"')[2].partition("</ol>")[0]
    return [html.unescape(name) for name in re.findall(r'place">\d+</span> ([^<]*)</span>', part)]


def pixels(answer: requests.Response) -> Any:
    """(H, W, 3) in 0..255."""
    assert answer.headers["content-type"] == "image/jpeg"
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), dtype=float)


def outline(one: Any, other: Any, grid: tuple[int, int]) -> Any:
    """(N, 2) rows and columns, on the image's own grid, at which two pictures differ."""
    return np.argwhere(np.abs(one - other).max(2) > 80) / one.shape[:2] * grid


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"  # of the table, which every request takes
    }


# -- what they say ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_script_nothing_from_elsewhere_and_says_so_to_the_browser(
    ours: ServeProcess, path: str
) -> None:
    answer = get(ours, path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy
    assert answer.headers["cache-control"] == "no-store"
    assert not re.search(r"<script|\son\w+=|\sstyle=|https?://|//[a-z]", answer.text, re.I)
    assert answer.text.count("<h1>") == 1


def test_the_page_without_a_slash_leads_to_it(ours: ServeProcess) -> None:
    assert ours.request("GET", "/refseg").url.endswith("/refseg/")


def test_what_comes_next_on_the_page_is_what_next_sample_gives(locked: ServeProcess) -> None:
    """There no masks are judged in the background, which would change the order in between."""
    told = {"Authorization": f"Bearer {TOKEN}"}

    def ask(client: str) -> str:
        answer = locked.request(
            "POST", "/activelearning/refseg", json={"client_id": client}, headers=told
        )
        return str(answer.json()["id"])

    whole = f"{PICTURES + 3} of {PICTURES + 3}"
    given = [ask("first")]
    until(locked, "", lambda page: whole in page, headers=told)
    given.append(ask("second"))  # of all images, now that all are compared
    for number in range(3):
        page = until(
            locked,
            "",
            lambda page: order_of(page) and not {*given} & {*order_of(page)},
            headers=told,
        )
        given.append(ask(f"client {number}"))
        assert given[-1] == order_of(page)[0]
    until(locked, "", lambda page: "5 in somebody" in page, headers=told)


def test_looking_takes_no_lease_and_writes_nothing_into_the_studies(ours: ServeProcess) -> None:
    held = re.search(r"(\d+) in somebody", get(ours, "").text)
    before, labels = files_of(ours.studies), ours.request("GET", "/datastore/?output=all").json()
    for path in (*PAGES, "map.svg", "picture?image=picture+20", "image?image=volume+1"):
        assert get(ours, path).status_code == 200, path
    after = re.search(r"(\d+) in somebody", get(ours, "").text)
    assert held is not None
    assert after is not None
    assert after.group(1) == held.group(1)
    assert files_of(ours.studies) == before
    assert ours.request("GET", "/datastore/?output=all").json() == labels


def test_the_list_is_paged_filtered_and_ordered(ours: ServeProcess) -> None:
    whole = get(ours, "images?show=all&order=name").text
    assert f"{PICTURES + 3} images." in whole
    assert "Page 1 of 2" in whole
    assert len(re.findall("<li><a", whole)) == 24
    second = get(ours, "images?show=all&order=name&page=2").text
    names = re.findall(r'"name">([^<]*)<', whole + second)
    assert [html.unescape(name) for name in names] == sorted(
        path.stem if path.suffix == ".png" else path.name.removesuffix(".nii.gz")
        for path in ours.studies.iterdir()
        if path.suffix in (".png", ".gz")
    )
    labelled = get(ours, "images?show=labelled").text
    assert len(re.findall("■</span> labelled", labelled)) == LABELLED + 1
    found = get(ours, "images?show=all&find=VOLUME").text
    assert len(re.findall("<li><a", found)) == 2
    assert "Nothing is here" in get(ours, "images?find=unheard+of").text


def test_masks_that_were_looked_at_are_listed_first_with_their_expected_dice(
    ours: ServeProcess,
) -> None:
    page = until(ours, "images", lambda page: "expected Dice" in page.partition("<ul")[2])
    told = re.findall(r"expected Dice (\d\.\d\d)", page)
    assert told == sorted(told)
    first = page.partition("<li>")[2].partition("</li>")[0]
    assert "<meter" in first


def test_a_flagged_image_is_named_so_and_does_not_come_next(ours: ServeProcess) -> None:
    flagged = "picture 29"
    answer = ours.request(
        "PUT",
        f"/datastore/image/info?image={flagged}",
        data={"info": json.dumps({"flagged": True})},
    )
    assert answer.ok, answer.text
    page = until(ours, "images?show=flagged", lambda page: flagged in page)
    assert "▲</span> set aside" in page
    assert flagged not in order_of(until(ours, "", lambda page: "1 set aside" in page))


# -- pictures --------------------------------------------------------------------------------------


def test_a_labels_outline_is_where_the_label_is(ours: ServeProcess) -> None:
    query = "picture?image=picture+01&large=1"
    plain, drawn = pixels(get(ours, query)), pixels(get(ours, query + "&over=label"))
    truth = ball(1)[:, :, 0].T  # rows, columns
    changed = outline(plain, drawn, truth.shape)
    inside = np.argwhere(truth)
    assert np.abs(changed.min(0) - inside.min(0)).max() < 1.5
    assert np.abs(changed.max(0) - inside.max(0) - 1).max() < 1.5


def test_a_volumes_slices_are_each_its_own(ours: ServeProcess) -> None:
    page = get(ours, "image?image=volume+1&slice=1").text
    assert "slice 1 of 0 to 2" in page
    shown = [
        pixels(get(ours, f"picture?image=volume+1&slice={number}&large=1")) for number in range(3)
    ]
    bright = [float((one > 150).mean()) for one in shown]
    # they are counted from the head down, which in this file is from the last to the first
    truth = [float(ball(1)[:, :, number].mean()) for number in (2, 1, 0)]
    assert np.allclose(bright, truth, atol=0.03)


def test_the_button_makes_a_mask_and_shows_the_references_that_it_came_from(
    ours: ServeProcess,
) -> None:
    before = files_of(ours.studies)
    assert "Segment this image" in get(ours, "image?image=volume+1").text
    answer = ours.request("POST", "/refseg/image", data={"image": "volume 1"})
    assert answer.history[0].status_code == 303
    page = answer.text
    assert "Segment again" in page
    references = page.partition('id="references"')[2]
    labelled = {f"picture {seed:02}" for seed in range(LABELLED)} | {"volume 0"}
    told = set(re.findall(r'"name">([^<]*)<', references))
    assert told
    assert told <= labelled
    assert re.search(r"similarity (0\.\d\d|1\.00)", references)
    query = "picture?image=volume+1&slice=1&large=1"
    plain, drawn = pixels(get(ours, query)), pixels(get(ours, query + "&over=mask"))
    changed = outline(plain, drawn, (SHAPE[1], SHAPE[0]))
    truth = np.argwhere(ball(1)[:, :, 1].T)
    assert np.abs(changed.max(0) - truth.max(0) - 1).max() < 3  # the box lies above and left of it
    assert files_of(ours.studies) == before  # nothing was stored as a label


def test_the_button_asks_the_sites_own_model_once_there_is_one(ours: ServeProcess) -> None:
    address = "image?image=volume+1"
    ours.request("POST", "/refseg/image", data={"image": "volume 1"})
    assert "by matchseg, model" not in get(ours, address).text
    room = next(path for path in (ours.studies.parent / "bank").iterdir()).name
    store = ModelStore(ours.studies.parent / "models" / room)
    card = ModelCard(0.8, 0.7, "bundled", ("label_1",), ("picture 00",), ("picture 01",))
    net = load_weights(BUNDLED)
    with torch.no_grad():
        net.head.weight.mul_(1.01)  # or it would be the same network with the same memories
    try:
        damaged = store.use(store.add(net, card).version)
        (store.folder / "0001" / "weights.safetensors").write_bytes(b"no weights")
        page = ours.request("POST", "/refseg/image", data={"image": "volume 1"}).text
        assert "The weights of model 1 are damaged" in page
        assert f", model {damaged.version}" not in page  # `refseg` has answered
        store.rollback()
        store.use(store.add(net, card).version)
        assert ours.request("GET", "/info/").ok  # clients ask for it, and the model is loaded
        until(ours, address, lambda page: "labels or models have changed since" in page)
        page = ours.request("POST", "/refseg/image", data={"image": "volume 1"}).text
        assert "by matchseg, model 2," in page
        assert "have changed since" not in page
        store.rollback()
        assert "labels or models have changed since" in get(ours, address).text
        page = ours.request("POST", "/refseg/image", data={"image": "volume 1"}).text
        assert "by matchseg, " in page
        assert ", model 2" not in page
        assert "have changed since" not in page
    finally:
        shutil.rmtree(store.folder)


@pytest.mark.parametrize("sound", [True, False])
def test_a_mask_that_a_batch_stored_is_shown_with_its_references(
    ours: ServeProcess, tmp_path: Path, sound: bool
) -> None:
    image = "picture 27" if sound else "picture 28"
    row = {"image": "picture 03", "axis": 2, "slice": 0, "similarity": 0.87, "slices": 1}
    params = {
        "label_names": {"label_1": 1},
        "references": {"label_1": [row if sound else {"image": [], "slice": "x"}]},
        "confidence": {"label_1": 0.63},
    }
    file = write_picture_labels(tmp_path / "mask.png", 27)
    with file.open("rb") as opened:
        answer = ours.request(
            "PUT",
            "/datastore/label",
            params={"image": image, "tag": "original"},
            data={"params": json.dumps({"params": params})},
            files={"label": (file.name, opened)},
        )
    assert answer.ok, answer.text
    page = get(ours, "image", params={"image": image}).text
    assert ("similarity 0.87" in page) == sound
    assert ("0.63</meter>" in page) == sound
    assert ("Segment this image" in page) != sound


def test_a_broken_image_is_explained_and_has_a_blank_picture(ours: ServeProcess) -> None:
    broken = ours.studies / "broken.png"
    broken.write_bytes(b"no picture")
    try:
        page = until(ours, "image?image=broken", lambda page: "cannot be shown" in page)
        assert "broken.png" in page
        answer = get(ours, "picture?image=broken")
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "image/svg+xml"
    finally:
        broken.unlink()
    until(ours, "image?image=broken", lambda page: "Not found" in page)


# -- names, numbers and addresses that people make up ----------------------------------------------


def test_a_name_that_looks_like_a_script_is_shown_as_text(ours: ServeProcess) -> None:
    query = requests.models.PreparedRequest()
    query.prepare_url(f"{ours.url}/refseg/image", {"image": NASTY})
    for answer in (requests.get(str(query.url), timeout=60), get(ours, "images?find=script")):
        assert answer.status_code == 200
        assert "<script" not in answer.text
        assert NASTY in html.unescape(answer.text)
    link = html.unescape(re.search(r'href="(/refseg/image\?[^"]*script[^"]*)"', answer.text)[1])
    assert ours.request("GET", link).status_code == 200
    assert pixels(get(ours, "picture", params={"image": NASTY})).shape[0] > 50


@pytest.mark.parametrize(
    "path",
    [
        "image?image=nobody", "image", "image?image=..%2F..%2Fetc%2Fpasswd", "image?image=%00",
        "image?image=%ED%A0%80", "image?image=volume+1&slice=3", "image?image=volume+1&slice=-1",
        "image?image=volume+1&slice=%C2%B2", "picture?image=nobody", "images?page=99",
        "images?page=x", "images?show=%3Cscript%3E", "images?order=1;drop", "nothing/here",
        "picture?image=volume+1&over=../x", "picture?image=volume+1&axis=7", "training.svg",
        "picture?image=volume+1&slice=99999999999999999999",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found_and_says_so(ours: ServeProcess, path: str) -> None:
    answer = get(ours, path)
    assert answer.status_code == 404
    assert "<script" not in answer.text
    if answer.headers["content-type"].startswith("text/html"):
        assert re.search(r'class="problem">[A-Z].*\.</p>', answer.text, re.I), answer.text


def test_a_mask_of_an_image_that_is_not_there_is_not_made(ours: ServeProcess) -> None:
    assert ours.request("POST", "/refseg/image", data={"image": "nobody"}).status_code == 404
    assert ours.request("POST", "/refseg/image").status_code == 404
    other = {"Origin": "https://elsewhere.example"}
    refused = ours.request("POST", "/refseg/image", data={"image": "volume 1"}, headers=other)
    assert refused.status_code == 403


# -- memory, models, training ----------------------------------------------------------------------


def test_the_memory_is_counted(ours: ServeProcess) -> None:
    page = get(ours, "status").text
    slices = LABELLED + SHAPE[2]
    assert f"{slices} references of {LABELLED + 1} labelled images" in page
    rows = dict(re.findall(r'<th scope="row">(label_\d)</th><td>(\d+)</td>', page))
    assert rows == {"label_1": str(slices), "label_2": str(SHAPE[2])}


def test_a_trainings_progress_is_told(ours: ServeProcess) -> None:
    assert "Nothing was trained here yet" in get(ours, "status").text
    room = next(path for path in (ours.studies.parent / "bank").iterdir()).name
    folder = ours.studies.parent / "models" / room / "training"
    folder.mkdir(parents=True)
    told = {"epoch": 3, "total_epochs": 40, "best_metric": 0.71, "best_epoch": 2, "seconds": 90}
    progress = folder / "progress.json"
    progress.write_text(json.dumps({**told, "process": identity()}))
    outcome = folder / "outcome.json"
    under_way = {"message": "", "failed": False, "process": identity()}
    outcome.write_text(json.dumps(under_way))
    rows = ["epoch,loss,dice,seconds", "1,0.9,0.5,30", "2,0.5,0.71,60", "3,0.4,0.70,90", "4,0."]
    (folder / "log.csv").write_text("\n".join(rows))
    page = get(ours, "status").text
    assert "Running: epoch 3 of at most 40" in page
    assert '<progress id="epochs" max="40" value="3">' in page
    assert "0.710, in epoch 2" in page
    assert "http-equiv" not in page
    assert 'http-equiv="refresh"' in get(ours, "status?follow=1").text
    assert get(ours, "training.svg").content.startswith(b"<svg")
    assert "was ended before it was done" not in page
    assert "learns from all images" not in page
    progress.write_text(json.dumps({**told, "process": identity(), "measures": False}))
    assert "learns from all images now" in get(ours, "status").text
    progress.write_text(json.dumps({**told, "process": f"{os.getpid()}:1"}))  # the one before
    page = get(ours, "status?follow=1").text
    assert "the labelled images are being read" in page
    assert "epoch 3" not in page
    assert 'http-equiv="refresh"' in page
    assert "Stop that" in page
    outcome.write_text(json.dumps({**under_way, "process": f"{os.getpid()}:1"}))  # it was killed
    page = get(ours, "status").text
    assert "Not running" in page
    assert "was ended before it was done" in page
    assert "failed" not in page
    outcome.write_text(json.dumps({**under_way, "message": "The disk is full.", "failed": True}))
    page = get(ours, "status").text
    assert "The last training failed: The disk is full." in page
    assert "was ended before it was done" not in page
    outcome.write_text(json.dumps({**under_way, "message": "Published as 1."}))
    page = get(ours, "status").text
    assert "Published as 1." in page
    assert "failed" not in page
    progress.write_text(json.dumps(told))  # of a version that did not tell whose it is
    assert "Not running; the last one that began came to: epoch 3" in get(ours, "status").text
    outcome.write_text(json.dumps(under_way))
    progress.unlink()
    assert "the labelled images are being read" in get(ours, "status").text
    outcome.write_text("{half")
    progress.write_text("{half")
    assert "Nothing was trained here yet" in get(ours, "status").text


def test_the_server_answers_others_while_pages_are_made(ours: ServeProcess) -> None:
    """Pictures are drawn by the hundred, none of which is kept yet."""
    stop = threading.Event()
    failed: list[int] = []

    def look(first: int) -> None:
        for number in range(first, PICTURES, 3):
            for over in ("", "label"):
                if stop.is_set():
                    return
                answer = get(ours, f"picture?image=picture+{number:02}&large=1&over={over}")
                failed.extend([answer.status_code] * (not answer.ok))

    idle = [ours.request("GET", "/info/").elapsed.total_seconds() for _ in range(10)]
    lookers = [threading.Thread(target=look, args=(n,)) for n in range(3)]
    for looker in lookers:
        looker.start()
    seconds = []
    while any(looker.is_alive() for looker in lookers):
        start = time.perf_counter()
        assert ours.request("GET", "/info/").ok
        seconds.append(time.perf_counter() - start)
    stop.set()
    assert not failed
    assert statistics.median(seconds) < max(0.1, 4 * statistics.median(idle))


# -- the log-in ------------------------------------------------------------------------------------


def log_in(server: ServeProcess, token: str = TOKEN) -> requests.Session:
    session = requests.Session()
    session.post(f"{server.url}/refseg/login", data={"token": token}, timeout=60)
    return session


def test_without_a_token_every_page_leads_to_the_log_in(locked: ServeProcess) -> None:
    for path in (*PAGES, "map.svg", "picture?image=picture+00", "nothing"):
        answer = get(locked, path, allow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/refseg/login")
    answer = locked.request(
        "POST", "/refseg/image", data={"image": "volume 1"}, allow_redirects=False
    )
    assert answer.headers["location"] == "/refseg/login"
    assert "picture 00" not in get(locked, "login").text
    assert get(locked, "style.css").headers["content-type"].startswith("text/css")


def test_the_token_opens_the_pages_and_its_cookie_nothing_else(locked: ServeProcess) -> None:
    answer = locked.request("POST", "/refseg/login", data={"token": TOKEN}, allow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303
    assert TOKEN not in cookie
    for flag in ("HttpOnly", "SameSite=strict", "Path=/refseg/"):
        assert flag.lower() in cookie.lower()
    held = {"Cookie": cookie.partition(";")[0]}
    assert get(locked, "images", headers=held, allow_redirects=False).status_code == 200
    for path in ("/info/", "/datastore/", "/metrics"):
        assert locked.request("GET", path, headers=held).status_code == 401
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert get(locked, "images", headers=bearer, allow_redirects=False).status_code == 200
    wrong = {"Authorization": "Bearer something else altogether"}
    assert get(locked, "images", headers=wrong, allow_redirects=False).status_code == 401


def test_a_wrong_token_or_cookie_opens_nothing(locked: ServeProcess) -> None:
    answer = locked.request("POST", "/refseg/login", data={"token": "wrong"}, allow_redirects=False)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert 'role="alert"' in answer.text
    for cookie in ("refseg_session=", "refseg_session=made up", f"refseg_session={TOKEN}"):
        answer = get(locked, "images", headers={"Cookie": cookie}, allow_redirects=False)
        assert answer.status_code == 303
    other = {"Origin": "https://elsewhere.example"}
    answer = locked.request("POST", "/refseg/login", data={"token": TOKEN}, headers=other)
    assert answer.status_code == 403


def test_who_logs_out_is_out(locked: ServeProcess) -> None:
    session = log_in(locked)
    kept = dict(session.cookies)
    assert "Log out" in session.get(f"{locked.url}/refseg/status", timeout=60).text
    assert session.post(f"{locked.url}/refseg/logout", timeout=60).url.endswith("/login")
    answer = get(locked, "images", cookies=kept, allow_redirects=False)
    assert answer.status_code == 303


# -- parts -----------------------------------------------------------------------------------------


def test_sessions_end_and_are_bounded() -> None:
    now = 0.0
    sessions = Sessions(lambda: now)

    def open_to(secret: str) -> bool:
        headers = [(b"cookie", f"refseg_session={secret}".encode())]
        return sessions.let_in({"type": "http", "path": "/refseg/", "headers": headers})

    first = sessions.open()
    assert open_to(first)
    now = LONGEST_S + 1
    assert not open_to(first)
    second = sessions.open()
    for _ in range(MOST):
        sessions.open()
    assert not open_to(second)


def test_a_shelf_keeps_what_was_used_last() -> None:
    shelf: Shelf[bytes] = Shelf(10, len)
    for name in "abc":
        shelf.put(name, b"123")
    assert shelf.get("a") == b"123"
    shelf.put("d", b"1234")
    assert shelf.get("b") is None
    assert shelf.get("a") == b"123"
    shelf.put("e", b"12345678901")
    assert shelf.get("e") is None
    assert shelf.get("a") == b"123"
    shelf.put("a", b"1")
    shelf.put("f", b"123")
    assert [shelf.get(name) for name in "adf"] == [b"1", b"1234", b"123"]


def test_the_map_of_a_large_pool_is_bounded() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 1, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    pool = PoolView.of({f"{number:05}": one for number, one in enumerate(vectors)})
    atlas = survey(
        pool, pool.ids[:700], "refseg", 5, held=pool.ids[700:701], exclude=pool.ids[900:]
    )
    assert not {p.image_id for p in atlas.order} & {*pool.ids[:701], *pool.ids[900:]}
    drawn = chart(atlas, most=50)
    assert drawn.count("<use") < 250
    assert "labelled: 700, drawn (50)" in drawn
    assert chart(atlas).count("<use") > 2000


@pytest.mark.parametrize(("images", "labelled"), [(1, 0), (1, 1), (3, 3), (3, 0)])
def test_the_map_of_a_small_pool_can_be_drawn(images: int, labelled: int) -> None:
    pool = PoolView.of({str(n): np.eye(4, dtype=np.float32)[n : n + 1] for n in range(images)})
    atlas = survey(pool, pool.ids[:labelled], "refseg", 5, risk={"0": 0.5})
    assert len(atlas.order) == images - labelled
    assert chart(atlas).count("<svg") == 1


# -- in a browser ----------------------------------------------------------------------------------


@needs_browser
def test_a_person_without_a_mouse_logs_in_and_looks_around(
    locked: ServeProcess, tmp_path: Path
) -> None:
    with browser.browsing(tmp_path / "profile") as tab:
        tab.go(f"{locked.url}/refseg/")
        tab.until("document.activeElement.id === 'token'")
        tab.write(TOKEN)
        tab.press("Enter", leaves=True)
        assert tab.ask("location.pathname") == "/refseg/"
        assert tab.ask("document.cookie") == ""  # no script may read it
        held = {one["name"]: one for one in tab.cookies()}["refseg_session"]
        assert held["httpOnly"]
        assert held["sameSite"] == "Strict"
        tab.press("Tab")
        assert tab.ask("document.activeElement.textContent") == "Skip to the content"
        assert tab.ask("document.activeElement.getBoundingClientRect().left") >= 0
        assert tab.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.press("Tab")
        tab.press("Tab")
        assert tab.ask("document.activeElement.textContent") == "Images"
        tab.press("Enter", leaves=True)
        assert tab.ask("document.title") == "Images, page 1 · RefSeg"
        assert tab.problems == []


@needs_browser
def test_a_browser_shows_each_page_whole_and_without_an_error(
    ours: ServeProcess, tmp_path: Path
) -> None:
    ours.request("POST", "/refseg/image", data={"image": "volume 1"})
    with browser.browsing(tmp_path / "profile") as tab:
        for path in (*PAGES, "image?image=volume+1", "images?show=all&find=script"):
            tab.go(f"{ours.url}/refseg/{path}")
            broken = "Array.from(document.images).filter(i => i.complete && !i.naturalWidth).length"
            assert tab.ask(broken) == 0, path
            nameless = (
                "Array.from(document.querySelectorAll('input:not([type=hidden]), select'))"
                ".filter(i => !i.labels.length).length"
            )
            assert tab.ask(nameless) == 0, path
            assert tab.ask("document.querySelectorAll('img:not([alt])').length") == 0, path
            assert tab.ask("document.scripts.length") == 0, path
        # of a link that leads nowhere or twice to the same place a keyboard's user has no use
        assert tab.ask("Array.from(document.links).every(a => a.textContent.trim())")
        tab.picture(tmp_path / "narrow.png", 360, 800)
        assert tab.ask("document.documentElement.scrollWidth") <= 360
        assert tab.problems == []
