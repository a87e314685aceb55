"""The commands `embed` and `review` as processes, over pictures whose truth is known."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.apps.phantoms import write_picture, write_picture_labels

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600


def command(*words: object, python: str = sys.executable) -> list[str]:
    return [python, str(ROOT / "apps" / "refseg" / "main.py"), *map(str, words)]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE_S
    )


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for seed in range(8):
        write_picture(folder / f"picture_{seed}.png", seed)
    return folder


def test_embed_goes_on_where_it_was_and_names_what_cannot_be_read(
    studies: Path, tmp_path: Path
) -> None:
    bank = ("--studies", studies, "--bank", tmp_path / "bank", "--json")
    (studies / "broken.png").write_bytes(b"no picture")
    first = run("embed", *bank)
    assert first.returncode == 1
    assert "broken" in first.stderr
    assert json.loads(first.stdout)["embedded now"] == 8
    (studies / "broken.png").unlink()
    write_picture(studies / "new.png", 9)
    again = json.loads(run("embed", *bank).stdout)
    assert (again["embedded before"], again["embedded now"], again["failed"]) == (8, 1, {})


def test_a_worker_that_is_killed_is_replaced(studies: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    for seed in range(8, 60):
        write_picture(studies / f"picture_{seed}.png", seed)
    words = ("embed", "--studies", studies, "--bank", tmp_path / "bank", "--workers", 2, "--json")
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, text=True)
    pool = None
    deadline = time.monotonic() + PATIENCE_S
    killed = False
    while process.poll() is None and not killed and time.monotonic() < deadline:
        pool = pool or next((tmp_path / "bank").rglob("regions.sqlite"), None)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if any("spawn_main" in word for word in child.cmdline())
        ]
        if pool is not None and len(workers) >= 2 and rows_in(pool) >= 2:
            workers[0].send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert killed
    assert process.returncode == 0
    assert json.loads(output)["embedded now"] == 60


def rows_in(pool: Path) -> int:
    import sqlite3

    connection = sqlite3.connect(f"file:{pool}?mode=ro", uri=True, timeout=30)
    try:
        return int(connection.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def test_dask_workers_share_the_work_and_one_may_die(studies: Path, tmp_path: Path) -> None:
    for seed in range(8, 60):
        write_picture(studies / f"picture_{seed}.png", seed)
    address_file = tmp_path / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # no dashboard, no nanny: a worker that dies is gone
    scheduler = ["scheduler", "--port", "0", "--scheduler-file", str(address_file)]
    worker = ["worker", "--scheduler-file", str(address_file), "--nthreads", "1", "--no-nanny"]
    folders = [("--local-directory", str(tmp_path / f"worker {n}")) for n in range(2)]
    parts = [[*scheduler, "--no-dashboard"]]
    parts += [[*worker, "--no-dashboard", *folder] for folder in folders]
    running = [
        subprocess.Popen([sys.executable, "-m", "dask", *part], env=environment, cwd=ROOT)
        for part in parts
    ]
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not address_file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        address = json.loads(address_file.read_text())["address"]
        words = ("embed", "--studies", studies, "--bank", tmp_path / "bank", "--address", address)
        process = subprocess.Popen(command(*words, "--json"), stdout=subprocess.PIPE, text=True)
        pool = None
        while process.poll() is None and time.monotonic() < deadline:
            pool = pool or next((tmp_path / "bank").rglob("regions.sqlite"), None)
            if pool is not None and rows_in(pool) >= 2:
                running[1].kill()
                break
            time.sleep(0.02)
        assert process.poll() is None  # it was not done yet
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0
        assert json.loads(output)["embedded now"] == 60
    finally:
        for one in running:
            one.kill()
            one.wait()


def test_review_lists_the_mask_that_cannot_be_right_first(studies: Path, tmp_path: Path) -> None:
    final = studies / "labels" / "final"
    for seed in range(4):
        write_picture_labels(final / f"picture_{seed}.png", seed)
    noise = np.random.default_rng(0).integers(0, 255, (56, 64), dtype=np.uint8)
    Image.fromarray(noise).save(studies / "a [odd] <one>.png")
    page = tmp_path / "review.html"
    words = ("--studies", studies, "--bank", tmp_path / "bank")
    found = run("review", *words, "--html", page, "--json")
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout)
    assert len(rows) == 5
    assert rows[0]["image"] == "a [odd] <one>"
    trust = [row["confidence"][row["worst"]] for row in rows]
    assert trust == sorted(trust)
    good = rows[-1]
    assert {"similarity", "presence", "quality", "sharpness", "agreement", "reverse"} == set(
        good["signs"]["label_1"]
    )
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 5
    assert "a [odd] &lt;one&gt;" in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)  # one file, nothing from elsewhere
    table = run("review", *words, "--limit", 1)
    assert "expected Dice" in table.stdout
