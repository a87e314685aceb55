"""What a campaign leaves behind: campaign.json, campaign.csv and report.html."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.campaign.forecast import fit
from lib.campaign.journal import Outcome, Place
from lib.campaign.plan import Plan
from lib.campaign.replay import Replay
from lib.campaign.scoring import CaseScore
from lib.campaign.summary import Spread, Summary
from lib.durable import write_text
from lib.evaluation.charts import Line, curves
from lib.evaluation.pictures import COLORS, Panel, data_address
from lib.imaging.slices import cut, cut_labels
from lib.types import FloatArray, IntArray

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 84  # pixels high
PICTURE = 220
COLUMNS = (
    "strategy", "seed", "budget", "image", "label", "dice", "hd95_mm", "nsd", "false_alarm",
    "confidence",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a reader has to know of how the figures came about.

    Attributes:
        studies: name of the folder.
        images: fully labelled images.
        command: as it was typed.
        networks: segmenter and embedder.
        options: name and value of the settings that matter.
        seconds: of this run; an interrupted campaign had others before it.
        peak_gib: memory of this process.
        date: of the report.
        failed: image and reason of labels that taught nothing.
    """

    studies: str
    images: int
    command: str
    networks: str
    options: tuple[tuple[str, str], ...]
    seconds: float
    peak_gib: float
    date: str
    failed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Thumbnail:
    """One image in the order in which it was labelled."""

    image_id: str
    reason: str
    address: str


@dataclass(frozen=True)
class Shown:
    """A result as pictures: image, what was found, truth."""

    rank: str
    case: CaseScore
    addresses: tuple[str, ...]


def write_json(
    path: Path, plan: Plan, facts: Facts, summaries: Sequence[Summary], outcomes: Iterable[Outcome]
) -> None:
    """Everything as data; what is no number (NaN) is null, as JSON wants it."""
    data = {
        "plan": asdict(plan) | {"protocol": plan.protocol},
        "facts": asdict(facts),
        "strategies": [asdict(one) for one in summaries],
        "campaigns": [
            {"strategy": o.strategy, "seed": o.seed, "budget": o.budget, "picked": o.picked}
            for o in outcomes
            if o.budget == plan.budgets[-1]
        ],
    }
    write(path, json.dumps(plain(data), indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, outcomes: Iterable[Outcome]) -> None:
    """One row per strategy, seed, budget, image and label; empty where nothing was measured."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one in sorted(outcomes, key=lambda o: o.place):
        for case in one.cases:
            for label, score in case.labels.items():
                alarm = "" if score.false_alarm is None else int(score.false_alarm)
                figures = (score.dice, score.hd95_mm, score.nsd)
                cells = (*map(_cell, figures), alarm, _cell(score.confidence))
                rows.writerow((*one.place, case.image_id, label, *cells))
    write(path, text.getvalue())


def write_html(
    path: Path,
    plan: Plan,
    facts: Facts,
    summaries: Sequence[Summary],
    outcomes: Mapping[Place, Outcome],
    replay: Replay,
) -> None:
    """One page that holds everything; it opens without a net."""
    first = summaries[0]
    page = render(
        "campaign.html",
        plan=plan,
        facts=facts,
        summaries=summaries,
        first=first,
        colors={s.strategy: COLORS[n % len(COLORS)] for n, s in enumerate(summaries)},
        label_colors=[(n, COLORS[i % len(COLORS)]) for i, n in enumerate(plan.labels)],
        main_chart=_chart(summaries, "dice", "Dice of what is not labelled yet"),
        finished_chart=_chart(summaries, "finished", "Dice of the whole, labelled images as 1"),
        label_chart=_label_chart(first, plan.labels) if len(plan.labels) > 1 else "",
        picks=[(s.strategy, _thumbnails(s, replay)) for s in summaries],
        results=[
            (s.strategy, _results(outcomes[s.strategy, 0, plan.budgets[-1]], replay))
            for s in summaries
            if (s.strategy, 0, plan.budgets[-1]) in outcomes
        ],
        in_mm=any(not math.isnan(level.nsd.mean) for s in summaries for level in s.levels),
    )
    write(path, page)


def render(template: str, **content: object) -> str:
    """Fill a template of this room; what is text is escaped, what is a chart is not."""
    return templates(TEMPLATES).get_template(template).render(**content)


def templates(folder: Path) -> "Environment":
    """The templates of a folder: all text that they are given is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = number
    return found


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _chart(summaries: Sequence[Summary], figure: str, title: str) -> str:
    lines = []
    for one in summaries:
        spreads: list[Spread] = [getattr(level, figure) for level in one.levels]
        lines.append(_line(one.strategy, [level.budget for level in one.levels], spreads))
    if figure == "dice":
        lines += _fitted(summaries[0])
    return curves(
        lines, x_label="labelled images", y_label="Dice (mean; band: one SD)", title=title
    )


def _label_chart(summary: Summary, labels: Sequence[str]) -> str:
    budgets = [level.budget for level in summary.levels]
    lines = [_line(n, budgets, [level.labels[n] for level in summary.levels]) for n in labels]
    return curves(
        lines,
        x_label="labelled images",
        y_label="Dice (mean; band: one SD)",
        title=f"{summary.strategy}, label by label",
    )


def _line(name: str, budgets: Sequence[int], spreads: Sequence[Spread]) -> Line:
    return Line(
        name,
        tuple(float(budget) for budget in budgets),
        tuple(s.mean for s in spreads),
        tuple(s.mean - s.deviation for s in spreads),
        tuple(s.mean + s.deviation for s in spreads),
    )


def _fitted(summary: Summary) -> list[Line]:
    """The power law through the first strategy's curve, drawn a little beyond it."""
    budgets = [level.budget for level in summary.levels]
    law = fit(budgets, [level.dice.mean for level in summary.levels])
    if law is None:
        return []
    x = np.geomspace(budgets[0], 2 * budgets[-1], 40)
    y = tuple(float(v) for v in law.at(x.tolist()))
    return [Line(f"{summary.strategy}, fitted", tuple(x.tolist()), y, y, y, dashed=True)]


def _thumbnails(summary: Summary, replay: Replay) -> list[Thumbnail]:
    found = []
    for image_id, reason in zip(summary.picked, summary.reasons, strict=True):
        picture, truth, _ = _richest(replay, image_id)
        address = data_address(Panel("", picture, truth), THUMBNAIL)
        found.append(Thumbnail(image_id, reason, address))
    return found


def _results(outcome: Outcome, replay: Replay) -> list[Shown]:
    """Best, median and worst case, segmented once more: masks are not kept."""
    cases = sorted(
        (case for case in outcome.cases if not np.isnan(case.dice)), key=lambda c: -c.dice
    )
    if not cases:
        return []
    replay.learn(outcome.picked)
    chosen = {"best": cases[0], "median": cases[len(cases) // 2], "worst": cases[-1]}
    shown = []
    for rank, case in chosen.items():
        found, _ = replay.segment(case.image_id)
        picture, truth, index = _richest(replay, case.image_id)
        mask = cut_labels(found, replay.case(case.image_id).axis)[index]
        panels = [Panel("", picture), Panel("", picture, mask), Panel("", picture, truth)]
        shown.append(Shown(rank, case, tuple(data_address(p, PICTURE) for p in panels)))
    return shown


def _richest(replay: Replay, image_id: str) -> tuple[FloatArray, IntArray, int]:
    """The slice with most of the truth: picture, truth and its number."""
    case = replay.case(image_id)
    maps = cut_labels(case.truth.label_map, case.axis)
    index = int((maps > 0).sum((1, 2)).argmax())
    pictures = cut(case.image, case.axis, replay.runtime.settings.window)
    return pictures[index], maps[index], index


def plain(value: Any) -> Any:
    """As JSON has it: null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def write(path: Path, text: str) -> None:
    """Beside its place first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
