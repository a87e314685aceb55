"""Numbers of labels: the same for all workers and after a restart, and never another label's."""

import subprocess
import sys
from pathlib import Path

from lib.infers.numbers import LabelNumbers

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = """
import sys
from pathlib import Path
from lib.infers.numbers import LabelNumbers
numbers = LabelNumbers(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[2:]:
    numbers.of([name])
print(sorted(numbers.of(sys.argv[2:]).items()))
"""


def test_a_number_stays_when_other_labels_come_and_go(tmp_path: Path) -> None:
    numbers = LabelNumbers(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    assert numbers.of([]) == {}
    assert numbers.of(["spleen", "liver"]) == {"spleen": 1, "liver": 2}
    assert numbers.of(["kidney"]) == {"kidney": 3}
    restarted = LabelNumbers(tmp_path / "bank")
    assert list(restarted.of(["bladder", "liver", "spleen"]).items()) == [
        ("spleen", 1), ("liver", 2), ("bladder", 4)
    ]  # fmt: skip
    assert numbers.of(["bladder"]) == {"bladder": 4}  # as the other worker gave it


def test_workers_that_see_labels_in_different_orders_agree(tmp_path: Path) -> None:
    names = [f"label {number}" for number in range(60)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "bank"), *order],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for order in (names, names[::-1], names[30:] + names[:30])
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    told = [worker.communicate(timeout=60)[0] for worker in workers]
    assert told[0] == told[1] == told[2] != ""
    assert sorted(LabelNumbers(tmp_path / "bank").of(names).values()) == list(range(1, 61))


def test_a_damaged_table_is_put_aside(tmp_path: Path) -> None:
    for content in ("{", "[1]", '{"liver": 1, "spleen": 1}', '{"liver": null}'):
        (tmp_path / "label_numbers.json").write_text(content)
        assert LabelNumbers(tmp_path).of(["kidney"]) == {"kidney": 1}
        assert (tmp_path / "label_numbers.damaged").read_text() == content


def test_a_folder_that_cannot_be_written_gives_numbers_for_this_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    numbers = LabelNumbers(tmp_path / "file")
    assert numbers.of(["liver"]) == {"liver": 1}
    assert numbers.of(["spleen", "liver"]) == {"liver": 1, "spleen": 2}
