"""`simulate` as it is typed: killed and gone on with, its files, its page in a real browser."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from apps.refseg.cli import app
from lib.campaign.atlas import project, survey
from lib.retrieval.ranking import PoolView

from .studies import make_studies

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
PATIENCE = 300  # seconds, on a machine that is busy with other things
OPTIONS = [
    "--strategy", "random,refseg", "--budget", "1,2,50", "--seeds", "1", "--limit-targets", "3",
    "--conf", "annotation=complete", "--conf", "k=2",
]  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "apps" / "refseg" / "main.py"), "simulate", *words]


ENVIRONMENT = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Played:
    """A campaign that was killed after its first line, and played to its end by a second run."""

    out: Path
    first_lines: bytes
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("simulate")
    studies, out = make_studies(folder / "studies", 5, size=64), folder / "out"
    words = command("--studies", str(studies), "--out", str(out), *OPTIONS)
    journal = out / "campaign.jsonl"
    log = folder / "first.log"
    with log.open("wb") as file:
        first = subprocess.Popen(words, env=ENVIRONMENT, stdout=file, stderr=file)
    deadline = time.monotonic() + PATIENCE
    while not (journal.exists() and journal.read_bytes().endswith(b"\n")):
        assert first.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    lines = journal.read_bytes()
    again = subprocess.run(
        words, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False
    )
    assert again.returncode == 0, again.stderr
    return Played(out, lines, again.stdout, again.stderr)


def test_what_was_measured_before_the_kill_is_kept(played: Played) -> None:
    lines = (played.out / "campaign.jsonl").read_bytes()
    whole = played.first_lines[: played.first_lines.rindex(b"\n") + 1]
    assert 1 <= whole.count(b"\n") < 4
    assert lines.startswith(whole)
    assert lines.count(b"\n") == 4  # two strategies at two budgets


def test_the_table_and_what_was_left_out_are_told(played: Played) -> None:
    assert "refseg" in played.stdout
    assert "random" in played.stdout
    assert "budgets are 1, 2" in played.stderr
    assert "report.html" in played.stderr


def test_the_data_agree_with_each_other(played: Played) -> None:
    report = json.loads((played.out / "campaign.json").read_text(encoding="utf-8"))
    with (played.out / "campaign.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert report["plan"]["budgets"] == [1, 2]
    assert len(report["plan"]["targets"]) == 3
    assert {row["image"] for row in rows} <= set(report["plan"]["targets"])
    for one in report["strategies"]:
        for level in one["levels"]:
            cases: dict[str, list[float]] = {}
            for row in rows:
                place = (row["strategy"], int(row["budget"]))
                if place == (one["strategy"], level["budget"]) and row["dice"]:
                    cases.setdefault(row["image"], []).append(float(row["dice"]))
            mean = sum(sum(d) / len(d) for d in cases.values()) / len(cases)
            assert level["dice"]["mean"] == pytest.approx(mean, abs=1e-4)
            assert not set(one["picked"][: level["budget"]]) & cases.keys()
        heights = [level["dice"]["mean"] for level in one["levels"]]
        assert one["area"]["mean"] == pytest.approx(sum(heights) / 2, abs=1e-4)


def test_the_page_needs_nothing_from_outside(played: Played) -> None:
    page = (played.out / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "<script" not in page
    assert page.count("<svg") >= 2
    assert page.count("data:image/jpeg") >= 2 * 2 + 2 * 3 * 3  # picks, and three results each


def test_a_second_simulation_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        words = ["simulate", "--studies", str(tmp_path), "--out", str(tmp_path)]
        refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1
    assert "at work" in refused.stderr


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    studies = make_studies(folder / "studies", 6, size=64)
    shutil.rmtree(studies / "labels")
    words = command("--studies", str(studies), "--out", str(folder / "out"), "--dry")
    words += ["--strategy", "coverage", "--budget", "3", "--conf", f"bank={folder / 'bank'}"]
    done = subprocess.run(
        words, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_a_dry_run_needs_no_labels_and_tells_the_order(surveyed: Path) -> None:
    report = json.loads((surveyed / "pool.json").read_text(encoding="utf-8"))
    order = [one["image_id"] for one in report["order"]]
    assert len(order) == len(set(order)) == 3
    following = {row["image"]: row["next"] for row in report["images"] if row["next"]}
    assert following == {image: place for place, image in enumerate(order, start=1)}
    assert len(report["images"]) == 6
    assert any(row["far"] for row in report["images"])
    page = (surveyed / "pool.html").read_text(encoding="utf-8")
    assert all(image in page for image in order)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to open the page in")
@pytest.mark.parametrize("page", ["report", "pool"])
def test_a_browser_shows_the_page_without_an_error(
    played: Played, surveyed: Path, tmp_path: Path, page: str
) -> None:
    from PIL import Image

    path = played.out / "report.html" if page == "report" else surveyed / "pool.html"
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,2400"]
    flags += ["--hide-scrollbars", f"--screenshot={picture}"]
    shown = subprocess.run(
        [str(BROWSER), *flags, path.as_uri()],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=100,
        check=False,
    )
    assert picture.is_file(), shown.stderr
    assert "CONSOLE" not in shown.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 500  # pictures and curves, not an error page


def test_the_map_shows_the_main_axes() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(40, 6)) * [5, 3, 1, 0.1, 0.1, 0.1]).astype(np.float32)
    places, share = project(vectors)
    centered = vectors - vectors.mean(0)
    _, singular, axes = np.linalg.svd(centered.astype(float))
    for axis in range(2):
        along = centered @ axes[axis]
        assert abs(np.corrcoef(places[:, axis], along)[0, 1]) == pytest.approx(1, abs=1e-4)
    assert share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), rel=1e-4)
    np.testing.assert_array_equal(project(vectors)[0], places)


def test_what_is_far_from_everything_is_found() -> None:
    angles = {f"near{n}": 0.02 * n for n in range(19)} | {"far": math.pi / 2}
    pool = PoolView.of(
        {name: np.array([[math.cos(a), math.sin(a)]], np.float32) for name, a in angles.items()}
    )
    atlas = survey(pool, ["near3"], "first", 1)
    assert atlas.far == ("far",) or atlas.order[0].image_id == "far"
    atlas = survey(pool, [f"near{n}" for n in range(18)], "first", 0)
    assert atlas.far == ("far",)
    assert atlas.labelled[0] == "near0"
