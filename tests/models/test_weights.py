"""Weights are found where a user keeps them, fetched only when told to, and checked."""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lib.errors import WeightsError
from lib.models.known_weights import KNOWN
from lib.models.weights import find, list_known, require, verify

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40
CONTENT = os.urandom(25_000_000)  # the hub client writes 10 MB at a time


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    """No test may see the Hugging Face cache of the machine it runs on."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_entry_of_the_table_is_complete():
    for name, weights in KNOWN.items():
        assert re.fullmatch(r"[0-9a-f]{40}|main", weights.revision)
        large = [file for file in weights.files if file.name != "config.json"]
        assert len(large) == 1
        assert re.fullmatch(r"[0-9a-f]{64}", large[0].sha256), "a moving revision needs a checksum"
        assert weights.use == ("segmenter" if name.startswith("sam2") else "embedder")
    assert len({file.sha256 for w in KNOWN.values() for file in w.files if file.sha256}) == 14


@pytest.mark.parametrize(
    "place",
    [
        "sam2.1-base-plus/sam2.1_hiera_base_plus.pt",
        "sam2.1-hiera-base-plus/sam2.1_hiera_base_plus.pt",
        "sam2.1_hiera_base_plus.pt",
        "sam2.1_hiera_base_plus.safetensors",
    ],
)
def test_sam2_is_found_in_the_folder_in_every_usual_layout(tmp_path, place):
    assert find("sam2.1-base-plus", tmp_path) is None
    path = put(tmp_path / place)
    assert find("sam2.1-base-plus", tmp_path) == path
    assert find("sam2-base-plus", tmp_path) is None


def test_an_embedder_is_a_folder_and_half_of_it_is_nothing(tmp_path):
    put(tmp_path / "dinov2-small" / "config.json")
    assert find("dinov2-small", tmp_path) is None
    put(tmp_path / "dinov2-small" / "model.safetensors")
    assert find("dinov2-small", tmp_path) == tmp_path / "dinov2-small"
    put(tmp_path / "clip-vit-base-patch32" / "config.json")
    put(tmp_path / "clip-vit-base-patch32" / "model.safetensors")
    assert find("clip", tmp_path) == tmp_path / "clip-vit-base-patch32"


@pytest.mark.parametrize("revision", [KNOWN["dinov2-base"].revision, "b" * 40])
def test_the_cache_of_hugging_face_is_used_at_the_pinned_commit_or_at_main(tmp_path, revision):
    repo = tmp_path / "hub" / "models--facebook--dinov2-base"
    for file in ("config.json", "model.safetensors"):
        put(repo / "snapshots" / revision / file)
    assert (find("dinov2-base") is not None) == (revision == KNOWN["dinov2-base"].revision)
    put(repo / "refs" / "main", revision.encode())
    assert find("dinov2-base") == repo / "snapshots" / revision


def test_absent_weights_are_one_message_with_the_command(tmp_path):
    with pytest.raises(WeightsError) as caught:
        require("sam2.1-tiny", tmp_path / "weights")
    message = str(caught.value)
    assert "python apps/refseg/main.py weights fetch sam2.1-tiny" in message
    assert str(tmp_path / "weights") in message
    assert str(tmp_path / "hub") in message
    with pytest.raises(WeightsError, match="known are sam2.1-tiny"):
        find("sam2.2-tiny")


def test_damaged_weights_are_told_from_unverified_ones(tmp_path):
    put(tmp_path / "dinov2-base" / "config.json")
    put(tmp_path / "dinov2-base" / "model.safetensors")
    config, model = verify("dinov2-base", tmp_path)
    assert (config.state, config.source) == ("unverified", "none")
    assert (model.state, model.source) == ("damaged", "table")
    put(tmp_path / "checksums.json", b"{broken")
    with pytest.raises(WeightsError, match=r"checksums\.json cannot be read"):
        verify("dinov2-base", tmp_path)


def test_the_list_says_what_is_here(tmp_path):
    put(tmp_path / "sam2_hiera_tiny.pt")
    rows = {row.name: row for row in list_known(tmp_path)}
    assert rows["sam2-tiny"].path == tmp_path / "sam2_hiera_tiny.pt"
    assert rows["sam2-tiny"].size == 155_906_050
    assert rows["sam2-large"].path is None
    assert [name for name, row in rows.items() if not row.pinned] == ["dinov2-base", "clip"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `fetch` needs; the first download of the large file breaks off."""

    requests: list[str]
    broken: bool
    dead = False  # every connection breaks before the first byte

    def _headers(self, content: bytes, start: int) -> None:
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()

    def _content(self) -> bytes:
        return CONTENT if self.path.endswith("model.safetensors") else b'{"a": 1}'

    def do_HEAD(self) -> None:
        self._headers(self._content(), 0)

    def do_GET(self) -> None:
        content = self._content()
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked.group(1)) if asked else 0
        type(self).requests.append(f"{self.path} from {start}")
        if type(self).dead:
            self.connection.close()
            return
        self._headers(content, start)
        if content is CONTENT and not type(self).broken:
            type(self).broken = True
            self.wfile.write(content[:15_000_000])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[start:])

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    Hub.requests, Hub.broken = [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def fetch_in_a_child(folder: Path, sha256: str | None, **environment: str):
    script = f"""
        import sys
        from pathlib import Path
        from lib.errors import WeightsError
        from lib.models.known_weights import KNOWN, KnownWeights, WeightFile
        from lib.models.weights import fetch, verify
        files = (WeightFile("config.json"), WeightFile("model.safetensors", {sha256!r}))
        KNOWN["toy"] = KnownWeights("toy", "embedder", "someone/toy", {COMMIT!r}, files, "MIT")
        seen = []
        try:
            path = fetch("toy", Path({str(folder)!r}), on_progress=lambda *a: seen.append(a))
        except WeightsError as error:
            sys.exit(f"refused: {{error}}")
        large = [(done, all) for name, done, all in seen if name == "model.safetensors"]
        assert large == sorted(large) and large[-1] == ({len(CONTENT)},) * 2, large
        print(path, [check.state for check in verify("toy", Path({str(folder)!r}))])
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_fetch_goes_on_after_a_broken_connection_and_records_what_it_got(tmp_path):
    folder = tmp_path / "weights"
    with hub() as endpoint:
        done = fetch_in_a_child(folder, None, HF_ENDPOINT=endpoint)
    assert done.stdout.strip() == f"{folder / 'toy'} ['ok', 'ok']", done.stderr
    assert (folder / "toy" / "model.safetensors").read_bytes() == CONTENT
    starts = [int(line.rsplit(" ", 1)[1]) for line in Hub.requests if "safetensors" in line]
    assert starts[0] == 0
    assert starts[-1] > 1_000_000, "it began again instead of going on"
    recorded = json.loads((folder / "checksums.json").read_text())
    assert recorded["toy/model.safetensors"] == hashlib.sha256(CONTENT).hexdigest()


def test_fetched_weights_with_a_wrong_checksum_are_removed(tmp_path):
    folder = tmp_path / "weights"
    with hub() as endpoint:
        done = fetch_in_a_child(folder, "0" * 64, HF_ENDPOINT=endpoint)
    assert done.returncode == 1
    assert "it was removed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "toy" / "model.safetensors").exists()


def test_a_connection_that_stays_lost_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "dead", True)
    with hub() as endpoint:
        done = fetch_in_a_child(tmp_path, None, HF_ENDPOINT=endpoint)
    assert done.returncode == 1
    assert "goes on where it stopped" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_mode_is_respected_and_explained(tmp_path):
    with hub() as endpoint:
        done = fetch_in_a_child(tmp_path, None, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert Hub.requests == []


def test_looking_for_weights_never_asks_the_hub(tmp_path):
    script = """
        from lib.models.weights import find, list_known
        list_known()
        assert find("clip") is None
    """
    with hub() as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert Hub.requests == []
