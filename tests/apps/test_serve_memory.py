"""What was freed goes back to the system, from whatever thread it was taken."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, threading, time
import psutil
from apps.refseg.server.memory import give_back_freed_memory

def rss():
    return psutil.Process().memory_info().rss >> 20

def fill_and_free():
    blocks = [ctypes.create_string_buffer(60_000) for _ in range(5_000)]  # 300 MB, in the heap
    for block in blocks:
        block[0] = 1
    kept.append(blocks[-1])  # at the top of the heap: what lies below cannot shrink away
    del blocks

kept = []
before = rss()
threads = [threading.Thread(target=fill_and_free) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
held = rss()
started = give_back_freed_memory(0.1)
end = time.monotonic() + 20
while rss() > before + 30 and time.monotonic() < end:
    time.sleep(0.1)
print(started, held - before, rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is of Linux's C library")
def test_freed_memory_goes_back_to_the_system() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True
    )
    started, held, left = done.stdout.split()
    assert started == "True"
    assert int(left) < 60, f"{held} MB were held after all had been freed"
