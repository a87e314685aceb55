"""Many clients at once, for minutes: no fault, no lost or mixed-up label, memory that stays flat.

    python benchmarks/load.py --minutes 10 --clients 8            against `main.py serve`
    python benchmarks/load.py --minutes 10 --clients 8 --plain    against MONAI Label's own server
    python benchmarks/load.py table                               both in one table

Each label that is submitted differs from all others. Whatever is read back on the way, what lies
on the disk at the end, its info and its history must be what was acknowledged, and the bank must
hold what a bank made anew holds. Exit code 1 if there is a finding.
"""

import argparse
import collections
import json
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import requests

from benchmarks.bank_check import differences
from benchmarks.fuzz_server import FuzzServer
from benchmarks.load_clients import Client, Sample, Traffic, Watcher, percentile, short
from benchmarks.load_images import make_cases
from lib.durable import digest_of

KINDS = {"serve": "`main.py serve`", "plain": "`monailabel start_server`"}
GROWTH = 0.05  # of the memory in the second half
LONG_ENOUGH_MINUTES = 5.0  # for memory to have settled
QUICK_S = 0.1  # `/info/` while segmentations run
INFO_EVERY_S = 0.25
SHOWN = 40  # findings


def main() -> int:
    """Run, and tell what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--volumes", type=int, default=8, help="how many of the images")
    parser.add_argument("--think", type=float, default=0.2, help="mean pause of a client, s")
    parser.add_argument("--train-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="MONAI Label's own server")
    parser.add_argument("--out", type=Path, default=Path("build/load"))
    arguments = parser.parse_args()
    if arguments.what == "run":
        kind = "plain" if arguments.plain else "serve"
        told = _run(arguments, arguments.out / kind)
        (arguments.out / f"{kind}.json").write_text(json.dumps(told, indent=1))
    results = {kind: arguments.out / f"{kind}.json" for kind in KINDS}
    found = {kind: json.loads(path.read_text()) for kind, path in results.items() if path.exists()}
    print(table(found))
    wanted = [kind] if arguments.what == "run" else list(found)
    for one in wanted:
        for line in found[one]["findings"][:SHOWN]:
            print(f"{one}: {line}")
    return int(any(found[one]["findings"] for one in wanted) or not wanted)


def _run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    studies = folder / "server" / "studies"
    cases = make_cases(studies, arguments.images, arguments.volumes, seed=arguments.seed)
    server = FuzzServer(
        folder / "server", seeds=False, conf={"history": "1000"}, plain=arguments.plain
    )
    with server:
        traffic = Traffic(server.url, {case.name: case for case in cases})
        _begin(traffic)
        memory = _traffic(traffic, server, arguments)
        trainings = _end(traffic)
        died = server.process.poll() is not None
    log = server.log()
    findings = [*traffic.findings, *trainings["failed"]]
    if died:
        findings.append(f"the server died: {log[-1000:]}")
    if "Traceback" in log:
        at = log.index("Traceback")
        findings.append(f"{log.count('Traceback')} tracebacks in the log: {log[at : at + 1500]}")
    kept = _labels(traffic, studies)
    other = differences(studies, folder / "server" / "bank", folder / "bank anew")
    growth = _growth(memory)
    if growth >= GROWTH and arguments.minutes >= LONG_ENOUGH_MINUTES:
        findings.append(f"the memory grew by {growth:.1%} in the second half")
    busy = [one.seconds for one in traffic.samples if one.endpoint == "info" and one.busy]
    if percentile(busy, 0.5) >= QUICK_S:
        text = f"/info/ takes {percentile(busy, 0.5):.2f} s (median) while segmentations run"
        findings.append(text)
    return {
        **{name: getattr(arguments, name) for name in ("minutes", "clients", "images", "volumes")},
        "endpoints": _endpoints(traffic.samples),
        "info_busy": _times(busy),
        "dice": statistics.fmean(traffic.dice) if traffic.dice else None,
        "trainings": trainings["done"],
        "labels": kept["acknowledged"],
        "labels_wrong": len(kept["wrong"]),
        "bank_wrong": len(other),
        "memory": memory,
        "growth": growth,
        "findings": [*findings, *kept["wrong"], *other],
    }


def _begin(traffic: Traffic) -> None:
    """Label every other image, and wait until the server has learned them."""
    with requests.Session() as session:
        for number, image in enumerate(traffic.cases):
            if number % 2 == 0:
                traffic.submit(session, image, 0.0, f"first {number}")
        _ask(session, traffic)
    traffic.samples.clear()


def _ask(session: requests.Session, traffic: Traffic) -> None:
    """A segmentation; the bank follows the labels before it answers."""
    query = {"image": next(iter(traffic.cases)), "output": "json"}
    traffic.send(session, "infer", "POST", "/infer/refseg", params=query)


def _traffic(
    traffic: Traffic, server: FuzzServer, arguments: argparse.Namespace
) -> list[tuple[float, float]]:
    """Let the clients work; memory of the server by time, s and MB."""
    workers: list[threading.Thread] = [
        Client(traffic, number, seed=arguments.seed, think=arguments.think)
        for number in range(arguments.clients)
    ]
    workers.append(Watcher(traffic, pause=INFO_EVERY_S, train_every=arguments.train_every))
    traffic.began = time.monotonic()
    for worker in workers:
        worker.start()
    memory = []
    while (now := time.monotonic() - traffic.began) < 60 * arguments.minutes:
        memory.append((round(now, 1), round(server.rss() / 2**20, 1)))
        time.sleep(1)
    traffic.over.set()
    for worker in workers:
        worker.join()
    return memory


def _end(traffic: Traffic) -> dict[str, Any]:
    """Stop what trains, let the bank follow the last label, count how the trainings went."""
    with requests.Session() as session:
        session.delete(f"{traffic.url}/train/", timeout=60)
        _ask(session, traffic)
        tasks = session.get(f"{traffic.url}/train/", params={"all": "true"}, timeout=60).json()
    tasks = tasks if isinstance(tasks, list) else []
    failed = [task for task in tasks if task["status"] == "ERROR"]
    return {
        "done": dict(collections.Counter(task["status"] for task in tasks)),
        "failed": [f"a training failed: {task.get('details', [])[-3:]}" for task in failed],
    }


def _labels(traffic: Traffic, studies: Path) -> dict[str, Any]:
    """Labels on the disk, in the table and in the history against what was acknowledged."""
    wrong, count, now = [], 0, time.monotonic()
    objects = json.loads((studies / "datastore_v2.json").read_bytes())["objects"]
    for image, case in traffic.cases.items():
        file = studies / "labels/final" / f"{image}{case.ending}"
        digest = digest_of(file) if file.exists() else ""
        allowed = traffic.ledger.possible(image, now, now)
        if digest not in allowed:
            held = digest[:12] or "nothing"
            wrong.append(f"{image}: {held} is on the disk, {short(allowed)} was acknowledged")
        entry = objects.get(image, {"labels": {}})["labels"].get("final")
        told = entry["info"].get("mark", "no mark") if entry else ""
        if told != digest:
            wrong.append(f"{image}: the label {digest[:12]} has the info of {told[:12]!r}")
        history = studies / "labels/.history/final" / image
        older = {digest_of(path) for path in history.glob(f"0*{case.ending}")} | {digest}
        acknowledged = traffic.ledger.acknowledged(image)
        wrong += [f"{image}: the version {one[:12]} is gone" for one in acknowledged - older]
        count += len(acknowledged)
    return {"wrong": wrong, "acknowledged": count}


def _growth(memory: list[tuple[float, float]]) -> float:
    """The last tenth of the time against the tenth at its middle."""
    values, tenth = [value for _, value in memory], max(1, len(memory) // 10)
    middle = values[len(values) // 2 :][:tenth]
    return statistics.median(values[-tenth:]) / max(1.0, statistics.median(middle)) - 1


def _endpoints(samples: list[Sample]) -> dict[str, Any]:
    found = {}
    for endpoint in sorted({one.endpoint for one in samples}):
        mine = [one for one in samples if one.endpoint == endpoint]
        statuses = collections.Counter(
            "503, come again" if one.status == 503 and one.retry else str(one.status)
            for one in mine
        )
        found[endpoint] = {"statuses": dict(statuses), **_times([one.seconds for one in mine])}
    return found


def _times(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    shares = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    told = {name: round(1000 * percentile(seconds, share), 1) for name, share in shares.items()}
    return {"count": len(seconds), **told}


def table(found: dict[str, Any]) -> str:
    """Results as Markdown, one column for each server."""
    kinds = [kind for kind in KINDS if kind in found]
    head = ["", *(KINDS[kind] for kind in kinds)]
    names = sorted({name for kind in kinds for name in found[kind]["endpoints"]})
    rows = [
        [f"{name}: requests, p50 / p95 / max ms", *(_cell(found[k], name) for k in kinds)]
        for name in names
    ]
    rows += [
        ["info while segmentations run", *(_spread(found[k]["info_busy"]) for k in kinds)],
        ["answers", *(_statuses(found[k]) for k in kinds)],
        ["trainings", *(_counts(found[k]["trainings"]) for k in kinds)],
        ["labels acknowledged", *(str(found[k]["labels"]) for k in kinds)],
        ["of them lost, or mixed up", *(str(found[k]["labels_wrong"]) for k in kinds)],
        ["bank other than made anew", *(str(found[k]["bank_wrong"]) for k in kinds)],
        ["Dice of a structure", *(f"{found[k]['dice'] or 0:.3f}" for k in kinds)],
        ["memory, MB: start, end", *(_memory(found[k]["memory"]) for k in kinds)],
        ["its growth in the second half", *(f"{found[k]['growth']:+.1%}" for k in kinds)],
        ["findings", *(str(len(found[k]["findings"])) for k in kinds)],
    ]
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(result: dict[str, Any], endpoint: str) -> str:
    one = result["endpoints"].get(endpoint)
    return _spread(one) if one else "-"


def _spread(times: dict[str, float]) -> str:
    return f"{times['count']}: {times['p50']:.0f} / {times['p95']:.0f} / {times['max']:.0f}"


def _statuses(result: dict[str, Any]) -> str:
    total: collections.Counter[str] = collections.Counter()
    for one in result["endpoints"].values():
        total.update(one["statuses"])
    return _counts(total)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def _memory(memory: list[list[float]]) -> str:
    return f"{memory[0][1]:.0f}, {memory[-1][1]:.0f}"


if __name__ == "__main__":
    sys.exit(main())
