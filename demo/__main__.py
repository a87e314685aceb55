"""`python -m demo`: RefSeg at work on two studies, in a few minutes, with nothing to download."""

import json
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

import numpy as np
from monailabel.client.client import MONAILabelClientException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.annotator import Answer, Round, rounds, steps
from demo.images import brains, nuclei
from demo.picture import Row, draw
from demo.server import REPOSITORY, ServerError, log_tail, running_server
from demo.study import Study

WORK = REPOSITORY / "build" / "demo"


def main() -> int:
    """Make the studies, play each, print and draw what came out."""
    signal.signal(signal.SIGTERM, _end)  # so that the server is stopped, too
    console = Console()
    started = time.monotonic()
    console.print(
        "RefSeg's demo: a played annotator labels a few images, RefSeg segments the others."
    )
    rows: list[Row] = []
    record = {}
    for make in (nuclei, brains):
        study = make(WORK)
        console.rule(study.name)
        console.print(f"{len(study.truth)} images: {study.about}.")
        try:
            played = play(study, console)
        except ServerError as error:
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            console.print("The demo has failed; the server is stopped.", style="red")
            return 1
        console.print(table(study, played))
        rows += chosen(study, played)
        record[study.name] = summary(study, played)
    picture = WORK / "demo.png"
    draw(rows, picture)
    (WORK / "rounds.json").write_text(json.dumps(record, indent=1))
    console.rule()
    console.print("Cells and brains are kinds of pictures that the bundled network was trained on;")
    console.print("docs/results.md has the numbers for kinds that it has never seen.")
    console.print(
        f"Picture: {picture.relative_to(REPOSITORY)} (best, median, worst of the last round)"
    )
    console.print(
        f"Took {time.monotonic() - started:.0f} s. Your own images: make serve STUDIES=DIR"
    )
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def play(study: Study, console: Console) -> list[Round]:
    """Start a server over the study, play all rounds, print each, stop the server."""
    folder = WORK / study.name
    log = folder / "server.log"
    played = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    with bar:
        task = bar.add_task("start the server", total=steps(study))
        with running_server(study.folder, folder / "bank", log) as url:
            begun = -1

            def on_step(what: str) -> None:
                nonlocal begun
                begun += 1
                bar.update(task, completed=begun, description=what)

            try:
                for one in rounds(study, url, folder, on_step):
                    played.append(one)
                    console.print(round_line(one))
            except (MONAILabelClientException, RuntimeError, OSError) as error:
                msg = f"{error}\n{log_tail(log)}"
                raise ServerError(msg) from error
            bar.update(task, completed=steps(study), description="stop the server")
    return played


def round_line(one: Round) -> str:
    """One sentence on a round, over all images that have no label yet."""
    answers = list(one.answers.values())
    mean = np.mean([answer.mean_dice for answer in answers])
    seconds = np.mean([answer.seconds for answer in answers])
    return (
        f"{len(one.labelled)} labelled ({one.labelled[-1]} last): mean Dice {mean:.3f} "
        f"on the {len(answers)} others, {seconds:.1f} s an image"
    )


def held_out(played: Sequence[Round]) -> list[str]:
    """The images that are never labelled: only over these are the rounds comparable."""
    return sorted(played[-1].answers)


def table(study: Study, played: Sequence[Round]) -> Table:
    """Dice round by round and label by label, over the same images in all rounds."""
    images = held_out(played)
    result = Table(title=f"Dice on the {len(images)} images that are never labelled")
    result.add_column("labelled", justify="right")
    for name in study.label_names.values():
        result.add_column(name, justify="right")
    result.add_column("mean", justify="right")
    result.add_column("s an image", justify="right")
    for one in played:
        answers = [one.answers[image_id] for image_id in images]
        by_label = [
            np.mean([answer.dice[name] for answer in answers])
            for name in study.label_names.values()
        ]
        seconds = np.mean([answer.seconds for answer in answers])
        cells = [*by_label, np.mean(by_label)]
        result.add_row(str(len(one.labelled)), *(f"{cell:.3f}" for cell in cells), f"{seconds:.1f}")
    return result


def chosen(study: Study, played: Sequence[Round]) -> list[Row]:
    """Best, median and worst image of the last round."""
    order = sorted(played[-1].answers.values(), key=lambda answer: -answer.mean_dice)
    places = {"best": 0, "median": len(order) // 2, "worst": len(order) - 1}
    return [Row(study, order[place], title) for title, place in places.items()]


def summary(study: Study, played: Sequence[Round]) -> list[dict[str, object]]:
    """The rounds as plain numbers, for `rounds.json`."""
    return [
        {
            "labelled": list(one.labelled),
            "images": {key: _numbers(answer) for key, answer in one.answers.items()},
            "study": study.name,
        }
        for one in played
    ]


def _numbers(answer: Answer) -> dict[str, object]:
    return {"dice": dict(answer.dice), "seconds": round(answer.seconds, 2)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped, and the server too.")
        sys.exit(130)
