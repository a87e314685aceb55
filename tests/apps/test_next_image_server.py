"""A real server and two annotators who alternate: what each is given, round after round."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from monailabel.client import MONAILabelClient

from tests.apps.phantoms import write_picture, write_picture_labels
from tests.apps.server_process import Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the client never closes a socket
]

IMAGES = 40
ROUNDS = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies"
    studies.mkdir()
    for seed in range(IMAGES):
        write_picture(studies / f"picture_{seed:02d}.png", seed)
    server = Server(folder, studies, {"examine": "1"})
    server.start()
    yield server
    server.stop()


def labelled(server: Server) -> set[str]:
    objects = server.get("/datastore/", output="all").json()["objects"]
    return {image_id for image_id, entry in objects.items() if "final" in entry["labels"]}


def test_two_clients_that_alternate_are_never_given_the_same(
    server: Server, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    clients = [MONAILabelClient(server.url, str(f), client_id=f.name) for f in folders]
    for client in clients:  # as 3D Slicer shows the options and sends them back
        config = client.info()["strategies"]["refseg"]["config"]
        assert config == {"images": 1, "labels": "", "flagged": False, "lease": 600}
    done: set[str] = set()
    deleted: set[str] = set()
    given: list[str] = []
    screens: set[str] = set()  # given and not submitted
    reasons: list[str] = []
    for number in range(ROUNDS):
        sample: dict[str, Any] = clients[number % 2].next_sample("refseg", dict(config))
        image_id = sample["id"]
        assert image_id not in done
        assert image_id not in given or image_id in deleted
        given.append(image_id)
        screens.add(image_id)
        reasons.append(sample["reason"])
        assert sample["slices"] == [0]
        assert Path(sample["path"]).is_file()
        if number % 3 == 2:
            continue  # not submitted yet: still on a screen
        label = write_picture_labels(tmp_path / "l.png", int(image_id[-2:]))
        info = {"label_info": [{"name": "ball", "idx": 1}]}
        clients[number % 2].save_label(image_id, str(label), "final", info)
        done.add(image_id)
        screens.remove(image_id)
        if number == 12:
            gone = sorted(done)[0]
            query = {"id": gone, "tag": "final"}
            requests.delete(f"{server.url}/datastore/label", params=query, timeout=60)
            done.remove(gone)
            deleted.add(gone)
    assert labelled(server) == done
    assert reasons[0].startswith("the most typical of")
    assert any("no label is as near to" in reason for reason in reasons)
    # until nothing is left: all that is neither labelled nor on a screen comes, the deleted too
    left: set[str] = set()
    third = MONAILabelClient(server.url, str(tmp_path), client_id="three")
    sample = third.next_sample("random", {"images": IMAGES})
    left |= {row["id"] for row in sample.get("work_list", [sample])}
    assert left == {f"picture_{n:02d}" for n in range(IMAGES)} - done - screens
    assert given.count(gone) == 2 or gone in left, "it came back"
    assert "Traceback" not in server.log


def test_a_flagged_image_is_left_out_and_a_wrong_option_told(
    server: Server, tmp_path: Path
) -> None:
    wrong = requests.post(f"{server.url}/activelearning/refseg", json={"images": 0}, timeout=60)
    assert wrong.status_code == 422
    assert "1 to 1000" in wrong.json()["detail"]
    body = {"client_id": "four", "lease": 0, "images": IMAGES}
    first = requests.post(f"{server.url}/activelearning/first", json=body, timeout=60).json()
    if first:
        requests.put(
            f"{server.url}/datastore/image/info",
            params={"image": first["id"]},
            data={"info": '{"flagged": "motion"}'},
            timeout=60,
        ).raise_for_status()
        body = {"client_id": "five", "lease": 0, "images": IMAGES}
        then = requests.post(f"{server.url}/activelearning/first", json=body, timeout=60).json()
        rows = then.get("work_list", [then] if then else [])
        assert first["id"] not in {row["id"] for row in rows}
