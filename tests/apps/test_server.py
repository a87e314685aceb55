"""A real server over real sockets: masks, references that follow the labels, and bad requests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
import SimpleITK
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException
from PIL import Image

from tests.apps.phantoms import (
    SHAPE,
    ball,
    box,
    dice,
    write_labels,
    write_picture,
    write_picture_labels,
    write_volume,
)
from tests.apps.server_process import Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the client never closes a socket
]

QUICK = {"k": 2}  # references enough for a ball


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies of two words"
    studies.mkdir()
    for seed in range(3):
        write_volume(studies / f"volume {seed}.nii.gz", seed)
    write_volume(studies / "turned.nii.gz", 3, flips=(1, -1, -1))
    write_picture(studies / "picture_0.png", 0)
    write_picture(studies / "picture_1.png", 1, color=True)
    write_picture(studies / "picture_2.jpeg", 2)
    server = Server(folder, studies)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client_folder(tmp_path: Path) -> Path:
    """Not the server's own: it deletes its temporary files, by names that the client copies."""
    folder = tmp_path / "client"
    folder.mkdir()
    return folder


@pytest.fixture
def client(server: Server, client_folder: Path) -> MONAILabelClient:
    return MONAILabelClient(server.url, str(client_folder), client_id="annotator")


@pytest.fixture
def taught(server: Server, client: MONAILabelClient, tmp_path: Path) -> Iterator[None]:
    """`volume 0` is labelled with a ball and a box, and is the only label."""
    values = np.where(ball(0), 1, 0) + 2 * (box() & ~ball(0))
    label = write_labels(tmp_path / "l.nii.gz", values, server.studies / "volume 0.nii.gz")
    submit(client, "volume 0", label, ["ball", "box"])
    yield
    for image_id in list_labelled(server):
        remove_label(server, image_id)


def submit(
    client: MONAILabelClient, image_id: str, label: Path, names: list[str]
) -> dict[str, Any]:
    listed = [{"name": name, "idx": idx} for idx, name in enumerate(names, start=1)]
    return client.save_label(image_id, str(label), "final", {"label_info": listed})


def list_labelled(server: Server) -> list[str]:
    objects = server.get("/datastore/", output="all").json()["objects"]
    return [image_id for image_id, entry in objects.items() if "final" in entry["labels"]]


def remove_label(server: Server, image_id: str) -> None:
    query = {"id": image_id, "tag": "final"}
    requests.delete(f"{server.url}/datastore/label", params=query, timeout=60).raise_for_status()


def references(answer: dict[str, Any]) -> set[str]:
    return {row["image"] for rows in answer["references"].values() for row in rows}


def infer_json(server: Server, image_id: str, **params: object) -> dict[str, Any]:
    response = server.post_infer(image_id, {**QUICK, **params}, output="json")
    assert response.status_code == 200, response.text
    return response.json()


def test_info_names_the_task_the_networks_and_the_strategies(client: MONAILabelClient) -> None:
    info = client.info()
    task = info["models"]["refseg"]
    assert task["dimension"] == 3
    assert task["segmenter"] == "matchseg"
    assert {"refseg", "random", "first"} <= info["strategies"].keys()


@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd", ".mha"])
def test_a_mask_has_the_grid_of_its_image(
    extension: str, server: Server, client: MONAILabelClient, taught: None
) -> None:
    file, answer = client.infer("refseg", "turned", {**QUICK, "result_extension": extension})
    image = SimpleITK.ReadImage(str(server.studies / "turned.nii.gz"))
    mask = SimpleITK.ReadImage(file)
    assert file.endswith(extension)
    assert mask.GetSize() == image.GetSize()
    assert mask.GetOrigin() == pytest.approx(image.GetOrigin(), abs=1e-4)
    assert mask.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6)
    assert mask.GetSpacing() == pytest.approx(image.GetSpacing())
    values = SimpleITK.GetArrayFromImage(mask).T
    names = answer["label_names"]
    assert dice(values == names["ball"], ball(3)) > 0.6
    assert answer["references"]["ball"][0]["image"] == "volume 0"
    assert 0 < answer["confidence"]["ball"] <= 1
    assert {"encode", "retrieve", "segment", "total"} <= answer["latencies"].keys()
    assert answer["bank"]["generation"] > 0


def test_pictures_are_segmented_in_their_own_size(
    server: Server, client: MONAILabelClient, tmp_path: Path
) -> None:
    label = write_picture_labels(tmp_path / "l.png", 0)
    submit(client, "picture_0", label, ["ball"])
    for image_id, truth, asked, ending in (
        ("picture_1", 1, {}, ".png"),
        ("picture_2", 2, {}, ".png"),
        ("picture_2", 2, {"result_extension": ".nrrd"}, ".nrrd"),
    ):
        file, _ = client.infer("refseg", image_id, {**QUICK, **asked})
        assert file.endswith(ending)
        if ending == ".png":
            values = np.asarray(Image.open(file)).T
        else:
            values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file)).T.squeeze()
        assert values.shape == SHAPE[:2]
        assert dice(values > 0, ball(truth)[:, :, 0]) > 0.5
    remove_label(server, "picture_0")


def test_each_output_has_its_shape(server: Server, taught: None) -> None:
    as_json = server.post_infer("volume 1", QUICK, output="json")
    assert as_json.json()["label_names"] == {"ball": 1, "box": 2}
    as_image = server.post_infer(
        "volume 1", {**QUICK, "result_extension": ".nrrd", "result_compress": False}, output="image"
    )
    head, _, voxels = as_image.content.partition(b"\n\n")
    assert b"encoding: raw" in head  # OHIF reads no other
    assert b"unsigned char" in head or b"uint8" in head
    assert len(voxels) == np.prod(SHAPE)
    both = server.post_infer("volume 1", QUICK)
    assert both.headers["content-type"].startswith("multipart/form-data")


def test_a_saved_label_is_a_reference_of_the_very_next_request(
    server: Server, client: MONAILabelClient, taught: None, tmp_path: Path
) -> None:
    before = infer_json(server, "volume 2", k=6)
    assert references(before) == {"volume 0"}
    image = server.studies / "volume 1.nii.gz"
    submit(client, "volume 1", write_labels(tmp_path / "l1.nii.gz", ball(1), image), ["ball"])
    after = infer_json(server, "volume 2", k=6)
    assert references(after) == {"volume 0", "volume 1"}
    assert after["bank"]["generation"] > before["bank"]["generation"]

    # overwritten: other names, other voxels, the same id and file
    submit(client, "volume 1", write_labels(tmp_path / "l1.nii.gz", box(), image), ["case"])
    assert infer_json(server, "volume 2", k=6)["label_names"].keys() == {"ball", "box", "case"}

    # overwritten on the disk, of which no client tells and no watcher knows
    file = server.studies / "labels" / "final" / "volume 1.nii.gz"
    write_labels(file, np.zeros(SHAPE, np.uint8), image)
    changed = infer_json(server, "volume 2", k=6, label_prompt=["case"])
    assert changed["confidence"]["case"] > 0.5  # "case" is nowhere now, and known to be

    remove_label(server, "volume 1")
    gone = infer_json(server, "volume 2", k=6)
    assert references(gone) == {"volume 0"}
    assert gone["label_names"].keys() == {"ball", "box"}
    assert gone["message"] == ""

    # dropped into the folder by hand, without any name
    write_labels(file, ball(1), image)
    dropped = infer_json(server, "volume 2", k=6)
    assert references(dropped) == {"volume 0", "volume 1"}
    assert "label_1" in dropped["label_names"]
    file.unlink()
    assert references(infer_json(server, "volume 2", k=6)) == {"volume 0"}


def test_a_volume_drawn_in_two_slices_is_finished_from_them(
    server: Server, client: MONAILabelClient, tmp_path: Path
) -> None:
    drawn = np.zeros(SHAPE, np.uint8)
    for index in (0, 2):
        drawn[:, :, index] = ball(2)[:, :, index]
    drawn[30:33, 30:33, 2] = 0  # a whim of the annotator, to be left as it is
    image = server.studies / "volume 2.nii.gz"
    submit(client, "volume 2", write_labels(tmp_path / "l2.nii.gz", drawn, image), ["ball"])
    file, answer = client.infer("refseg", "volume 2", QUICK)
    result = nib.load(file).get_fdata()
    np.testing.assert_array_equal(result[:, :, [0, 2]], drawn[:, :, [0, 2]])
    assert dice(result[:, :, 1] > 0, ball(2)[:, :, 1]) > 0.8
    assert answer["own_slices"] == 2
    assert {row["slice"] for row in answer["references"]["ball"]} == {0, 2}

    without = infer_json(server, "volume 2", own_labels=False)
    assert without["references"] == {"ball": []}  # there is no other image to refer to
    assert without["own_slices"] == 0
    remove_label(server, "volume 2")


def test_a_prompt_chooses_labels_by_name_or_by_number(server: Server, taught: None) -> None:
    assert infer_json(server, "volume 1", label_prompt=["box"])["label_names"] == {"box": 1}
    numbers = server.get("/info/").json()["models"]["refseg"]["labels"]
    as_ohif = {"label_prompt": [numbers["box"]], "restore_label_idx": False}
    assert infer_json(server, "volume 1", **as_ohif)["label_names"] == {"box": numbers["box"]}
    wrong = server.post_infer("volume 1", {"label_prompt": ["liver"]})
    assert wrong.status_code == 422
    assert "box" in wrong.json()["detail"]


def test_the_most_of_one_case_can_be_limited(
    server: Server, client: MONAILabelClient, taught: None, tmp_path: Path
) -> None:
    image = server.studies / "volume 1.nii.gz"
    values = np.where(ball(1), 1, 0) + 2 * (box() & ~ball(1))
    submit(client, "volume 1", write_labels(tmp_path / "l.nii.gz", values, image), ["ball", "box"])
    answer = infer_json(server, "turned", k=2, cap_per_case=1)
    assert references(answer) == {"volume 0", "volume 1"}


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"k": 0}, "1 to 64"),
        ({"k": "many"}, "whole number"),
        ({"k": 2.5}, "whole number"),
        ({"own_labels": "perhaps"}, "true or false"),
        ({"axis": "diagonal"}, "sagittal"),
        ({"window": "bright"}, "two numbers"),
        ({"result_extension": ".jpg"}, ".nii.gz"),
        ({"result_extension": ".png"}, ".nii.gz"),
        ({"result_dtype": "float32"}, "uint8"),
        ({"label_prompt": [[1]]}, "label_prompt"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(
    params: dict[str, object], sentence: str, server: Server
) -> None:
    response = server.post_infer("volume 1", params)
    assert response.status_code == 422
    assert sentence in response.json()["detail"]


def test_bad_files_are_told_in_a_sentence_and_the_server_stays(
    server: Server, client: MONAILabelClient, taught: None
) -> None:
    good = (server.studies / "volume 1.nii.gz").read_bytes()
    (server.studies / "cut_off.nii.gz").write_bytes(good[: len(good) // 2])
    (server.studies / "empty.png").write_bytes(b"")
    (server.studies / "text.nrrd").write_text("not an image")
    (server.studies / "misnamed.png").write_bytes(good)
    four = nib.Nifti1Image(np.zeros((8, 8, 4, 2), np.int16), np.eye(4))
    nib.save(four, server.studies / "four.nii.gz")
    nothing = nib.Nifti1Image(np.full((8, 8, 4), np.nan, np.float32), np.eye(4))
    nib.save(nothing, server.studies / "nan.nii.gz")
    server.post_infer("volume 1", QUICK, output="json")  # looks at the disk again
    bad = ("cut_off", "empty", "text", "misnamed", "four", "nan")
    for image_id in bad:
        response = server.post_infer(image_id)
        assert response.status_code == 422, (image_id, response.text)
        assert len(response.json()["detail"]) > 20
    with pytest.raises(MONAILabelClientException):
        client.infer("refseg", "nobody", {})
    assert server.post_infer("nobody").status_code == 404
    assert client.info()["datastore"]["total"] >= 7
    assert client.next_sample("refseg", {})["id"]  # they do not stop the strategy either
    for image_id in bad:
        for file in server.studies.glob(f"{image_id}.*"):
            file.unlink()
    server.post_infer("volume 1", QUICK, output="json")


def test_a_label_that_does_not_fit_is_named_and_the_others_serve(
    server: Server, client: MONAILabelClient, taught: None, tmp_path: Path
) -> None:
    Image.fromarray(np.ones((3, 3), np.uint8)).save(tmp_path / "small.png")
    submit(client, "picture_1", tmp_path / "small.png", ["ball"])
    answer = infer_json(server, "volume 1")
    assert any("picture_1" in warning for warning in answer["warnings"])
    assert references(answer) == {"volume 0"}
    assert references(infer_json(server, "picture_1")) == {"volume 0"}


def test_the_next_image_is_neither_labelled_nor_another_clients(
    server: Server, taught: None, tmp_path: Path
) -> None:
    first = MONAILabelClient(server.url, str(tmp_path), client_id="first")
    sample = first.next_sample("refseg", {})
    given = {sample["id"]}
    while sample["message"]:  # until all are compared, a better one may still turn up
        sample = first.next_sample("refseg", {})
        given.add(sample["id"])
    skipped = sample["id"]
    sample = first.next_sample("random", {})  # asked again: another
    assert sample["id"] != skipped
    given.add(sample["id"])
    for number in range(server.get("/info/").json()["datastore"]["total"]):
        other = MONAILabelClient(server.url, str(tmp_path), client_id=f"other {number}")
        sample = other.next_sample("refseg", {})
        if not sample:
            break
        assert sample["id"] not in given
        assert Path(sample["path"]).is_file()
        given.add(sample["id"])
    assert sample == {}  # as when all is labelled: Slicer says that there is none
    assert len(given) >= 5  # of six; another test's client may hold one
    assert "volume 0" not in given


def test_batch_results_are_no_references(server: Server, taught: None) -> None:
    body = {"multi_gpu": True, "max_workers": 1, "images": ["volume 1", "picture_1"], **QUICK}
    response = requests.post(
        f"{server.url}/batch/infer/refseg", params={"run_sync": "true"}, json=body, timeout=300
    )
    assert response.status_code == 200, response.text
    objects = server.get("/datastore/", output="all").json()["objects"]
    assert "original" in objects["volume 1"]["labels"]
    assert references(infer_json(server, "volume 2")) == {"volume 0"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers over `tmp_path / "studies"`, and stops them whatever happens."""
    studies = tmp_path / "studies"
    studies.mkdir()
    for seed in range(3):
        write_volume(studies / f"v{seed}.nii.gz", seed)
    servers: list[Server] = []

    def start_one(conf: dict[str, str] | None = None, *, workers: int = 1) -> Server:
        servers.append(Server(tmp_path, studies, conf, workers=workers))
        return servers[-1].start()

    yield start_one
    for server in servers:
        server.stop()


def test_labels_that_came_while_the_server_was_down_are_seen(
    start: Callable[..., Server], tmp_path: Path, client_folder: Path
) -> None:
    server = start()
    studies = server.studies
    client = MONAILabelClient(server.url, str(client_folder))
    label = write_labels(tmp_path / "l.nii.gz", ball(0), studies / "v0.nii.gz")
    submit(client, "v0", label, ["ball"])
    assert references(infer_json(server, "v2", k=6)) == {"v0"}
    server.stop()
    final = studies / "labels" / "final"
    write_labels(final / "v1.nii.gz", ball(1), studies / "v1.nii.gz")
    (studies / "v0.nii.gz").rename(studies / "renamed.nii.gz")
    (final / "v0.nii.gz").rename(final / "renamed.nii.gz")
    server.start()
    again = infer_json(server, "v2", k=6)
    assert references(again) == {"renamed", "v1"}
    assert list(again["label_names"]) == ["label_1"]  # the platform knows no names of such files
    told = server.get("/info/").json()["models"]["refseg"]["labels"]
    assert told == {"label_1": 2}  # 1 was given to the ball before, and is not given again
    assert "Traceback" not in server.log


def test_an_unknown_option_stops_the_start_with_the_list_of_known_ones(
    start: Callable[..., Server],
) -> None:
    with pytest.raises(AssertionError, match="own_labels"):
        start({"colour": "blue"})


def test_two_workers_share_one_bank(
    start: Callable[..., Server], tmp_path: Path, client_folder: Path
) -> None:
    server = start({"warm_up": "false"}, workers=2)
    client = MONAILabelClient(server.url, str(client_folder))
    image = server.studies / "v0.nii.gz"
    submit(client, "v0", write_labels(tmp_path / "l.nii.gz", ball(0), image), ["ball"])
    for _ in range(6):  # connections fall to either worker; neither lags behind
        assert references(infer_json(server, "v1")) == {"v0"}
    remove_label(server, "v0")
    for _ in range(4):
        assert references(infer_json(server, "v1")) == set()
