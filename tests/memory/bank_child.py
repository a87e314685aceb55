"""Processes for the bank's tests: reads commands from stdin, forks a child for each.

`python -m tests.memory.bank_child` imports torch once; each line on stdin is JSON
`{"do": "sync" | "churn", "folder": ..., "seconds": ..., "seed": ...}`. A forked child does it, and
its id is answered. `{"do": "wait", "pid": ...}` answers its exit status.
"""

import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch

from lib.memory.bank import MemoryBank
from tests.memory.phantom_store import CountingEncode, PhantomStore

SETTLED_S = 0.02


def open_bank(folder: Path, seconds: float = 0.0) -> MemoryBank:
    encode = CountingEncode(folder / "calls.txt", seconds=seconds)
    return MemoryBank(folder / "bank", "f", encode, settled_s=SETTLED_S, lock_timeout_s=60)


def churn(folder: Path, seed: int) -> None:
    """Change files and sync until killed."""
    generator = np.random.default_rng(seed)
    store = PhantomStore(folder / "studies")
    store.adopt_what_is_there()
    bank = open_bank(folder)
    while True:
        image_id = f"image{generator.integers(6)}"
        if image_id in store.names and generator.random() < 0.3:
            store.delete(image_id)
        else:
            store.submit(image_id, int(generator.integers(1000)))
        bank.sync(store.listing())


def sync(folder: Path, seconds: float) -> None:
    """Sync once, as a worker does."""
    store = PhantomStore(folder / "studies")
    store.adopt_what_is_there()
    open_bank(folder, seconds).sync(store.listing())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "wait":
            answer = os.waitpid(command["pid"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                folder = Path(command["folder"])
                try:
                    if command["do"] == "churn":
                        churn(folder, command["seed"])
                    else:
                        sync(folder, command["seconds"])
                except Exception:
                    logging.exception("child failed")
                    os._exit(1)
                os._exit(0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
