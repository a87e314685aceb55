"""Requests made by schemathesis from the server's own OpenAPI description: no 5xx, no hang.

    python3 -m venv build/schemathesis
    build/schemathesis/bin/pip install -r requirements-schema.txt
    python benchmarks/schema.py --seconds 600 --out build/schema

The description says only that an id is text, so that hardly any guess would name an image: here
every other one is told to be of the studies. Exit code 1 if schemathesis found something, if the
server died, or if its log has a traceback.
"""

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import requests

from benchmarks.fuzz_server import FuzzServer

HERE = Path(__file__).resolve().parents[1] / "build" / "schemathesis" / "bin" / "schemathesis"
HANG_S = 60.0
KNOWN = {
    "image": ["seed0", "seed1", "volume0"],
    "id": ["seed0", "seed1", "volume0"],
    "label": ["seed0", "seed1"],
    "tag": ["final", "original"],
    "model": ["refseg", "matchseg"],
    "strategy": ["refseg", "random"],
    "method": ["matchseg"],
}
CHECKS = "not_a_server_error"


def main() -> int:
    """Run, and tell what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=0, help="0: each operation in turn, once")
    parser.add_argument("--examples", type=int, default=50, help="requests for each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--path", default="", help="only operations whose path matches this")
    parser.add_argument("--out", type=Path, default=Path("build/schema"))
    parser.add_argument("--schemathesis", type=Path, default=HERE)
    arguments = parser.parse_args()
    if not arguments.schemathesis.exists():
        print(f"{arguments.schemathesis} is not there; it is made so:{(__doc__ or '')[85:290]}")
        return 2
    shutil.rmtree(arguments.out, ignore_errors=True)
    with FuzzServer(arguments.out / "server") as server:
        first = server.rss()
        told = requests.get(f"{server.url}/openapi.json", timeout=60).json()
        (arguments.out / "openapi.json").write_text(json.dumps(_with_ids(told), indent=1))
        code = _schemathesis(arguments, server.url)
        died = server.process.poll() is not None
        statuses = {} if died else _statuses(server.url)
        peak = server.rss()
    traces = server.log().count("Traceback")
    print(f"{sum(statuses.values())} requests to {len(told['paths'])} paths: {dict(statuses)}")
    print(f"memory: {first / 2**20:.0f} MB at the start, {peak / 2**20:.0f} MB at the end")
    print(f"tracebacks in the log: {traces}; the server {'died' if died else 'lives'}")
    return int(bool(code or died or traces))


def _schemathesis(arguments: argparse.Namespace, url: str) -> int:
    command = [str(arguments.schemathesis.absolute()), "run", "openapi.json", "--url", url]
    command += ["--checks", CHECKS, "--max-examples", str(arguments.examples)]
    command += ["--request-timeout", str(HANG_S), "--max-response-time", str(HANG_S)]
    command += ["--seed", str(arguments.seed), "--continue-on-failure", "--no-color"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--no-shrink"]
    if arguments.seconds:
        command += ["--max-time", str(arguments.seconds)]
    if arguments.path:
        command += ["--include-path-regex", arguments.path]
    return subprocess.run(command, cwd=arguments.out, check=False).returncode


def _with_ids(schema: dict[str, Any]) -> dict[str, Any]:
    """The description with ids of the studies as every other value of what takes ids."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                known = KNOWN.get(parameter["name"])
                if known:
                    parameter["schema"] = {"anyOf": [{"enum": known}, parameter["schema"]]}
    return schema


def _statuses(url: str) -> collections.Counter[str]:
    """Answers by status, as the server itself has counted them."""
    text = requests.get(f"{url}/metrics", timeout=60).text
    found: collections.Counter[str] = collections.Counter()
    for labels, value in re.findall(r"^refseg_requests_total\{(.*)\} (\S+)$", text, re.M):
        status = re.search(r'status="(\d+)"', labels)
        found[status.group(1) if status else "?"] += int(float(value))
    return found


if __name__ == "__main__":
    sys.exit(main())
