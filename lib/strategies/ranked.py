"""MONAI Label strategies over the rankings of `lib.retrieval`: the next image for a client."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from lib.errors import RefSegError, RequestError
from lib.memory.leases import Leases
from lib.retrieval.ranking import Proposal
from lib.runtime import Runtime
from lib.strategies.board import Board, read_board
from lib.strategies.proposer import Proposals, Proposer, Rest
from lib.strategies.request import NextRequest
from lib.studies.label_store import LabelStore

logger = logging.getLogger(__name__)

Judge = Callable[[Mapping[str, Path]], Mapping[str, float]]

SECONDS_A_CALL = 4.0  # of embedding within a request, which blocks the server's other clients
AT_RISK = ("refseg", "uncertainty")  # look at what is known of the masks
PEERS = ("typiclust", "probcover", "kcenter")  # to compare with
DESCRIPTIONS = {
    "refseg": "The image that stands for most that is not labelled yet, later for most at risk",
    "coverage": "The image that stands for most of what is not labelled yet",
    "uncertainty": "The image of which the references would make the worst mask",
    "random": "Any image",
    "first": "The first by name",
    "typiclust": "The most typical image of the largest group without a label",
    "probcover": "The image with most others close by that no label is close to",
    "kcenter": "The image that is farthest from all labels",
}


class Desk:
    """What the strategies of one process share: proposals, leases, and the look at the disk."""

    def __init__(self, runtime: Runtime) -> None:
        """Nothing is opened yet."""
        self.runtime = runtime
        self.proposer = Proposer(runtime.pool, seed=runtime.settings.seed)
        self._leases: Leases | None = None
        self._looking = Rest()

    @property
    def leases(self) -> Leases:
        """Of this datastore, opened on first use."""
        if self._leases is None:
            self._leases = Leases(self.runtime.folder)
        return self._leases

    def board(self, datastore: Datastore) -> Board:
        """What there is; the disk is looked at if that is quick or was long ago."""
        tags = self.runtime.settings.tags
        if not self._looking.due:
            return read_board(datastore, tags, look_at_disk=False)
        with self._looking:
            return read_board(datastore, tags)

    def just_labelled(self, datastore: Datastore, image_id: str) -> bool:
        """Whether another process labelled an image since the disk was looked at."""
        tags = self.runtime.settings.tags
        return isinstance(datastore, LabelStore) and bool(datastore.label_files(image_id, tags))


class RankedStrategy(Strategy):
    """The best image by a ranking that nobody else is at work on, leased to who asks.

    Labelled images are the ranking's centers, and so are images that a client was given a moment
    ago: they are about to be labelled. To ask again is to skip: a client is given its own again,
    the oldest first, when nothing else is free. Images not embedded yet wait for a later call.

    Args:
        name: of the ranking.
        desk: shared by the process's strategies.
        judge: told the images without a label, it tells 1 - expected Dice of those where it is
            known; at once, since it is asked at each request.
    """

    def __init__(self, name: str, desk: Desk, *, judge: Judge | None = None) -> None:
        super().__init__(DESCRIPTIONS[name])
        self._name = name
        self._desk = desk
        self._judge = judge if name in AT_RISK else None

    def info(self) -> dict[str, Any]:
        """With the options, which 3D Slicer shows and sends along."""
        chosen = self._desk.runtime.settings
        config = {
            "images": 1,
            "labels": ",".join(chosen.labels),
            "flagged": False,
            "lease": chosen.lease,
        }
        return {"description": self.description, "config": config}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose images; None if none is left.

        Raises:
            HTTPException: 422 for a wrong option, 503 where weights or the bank's folder cannot
                be used.
        """
        try:
            wanted = NextRequest.parse(request, self._desk.runtime.settings)
            return self._answer(wanted, self._desk.board(datastore), datastore)
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except RefSegError as error:
            raise HTTPException(503, str(error)) from error

    def _answer(
        self, wanted: NextRequest, board: Board, datastore: Datastore
    ) -> dict[str, Any] | None:
        leases = self._desk.leases
        leases.skip((name for name in wanted.skip if name in board.paths), wanted.client_id)
        given: list[Proposal] = []
        found = Proposals((), 0, len(board.paths))
        denied: set[str] = set()
        while len(given) < wanted.images:
            table = _Table.of(wanted, board, leases, self._annotated(wanted))
            free = table.free - denied
            if not free:
                break
            found = self._propose(wanted, board, table, free, wanted.images - len(given))
            for row in found.rows:
                denied.add(row.image_id)
                if row.image_id not in board.labelled and self._desk.just_labelled(
                    datastore, row.image_id
                ):
                    continue
                if leases.take(row.image_id, wanted.client_id, wanted.lease):
                    given.append(row)
                    if row.image_id in table.partly:
                        leases.offer(row.image_id, table.partly[row.image_id])
        if not given:
            logger.info("no image is left to be labelled")
            return None
        return self._told(given, found)

    def _propose(
        self, wanted: NextRequest, board: Board, table: "_Table", free: set[str], n: int
    ) -> Proposals:
        found = self._desk.proposer.propose(
            self._name,
            board.paths,
            {
                name: labels
                for name, labels in table.done.items()
                if name not in free or labels is not None
            },
            exclude=board.paths.keys() - free,
            n=n,
            labels=wanted.labels,
            risk=self._risk(board),
            seconds=SECONDS_A_CALL,
        )
        if found.rows:
            return found
        # none of the free images could be read yet: still let a person look at one
        row = Proposal(min(free), 0.0, "it is not compared with the others yet", ())
        return Proposals((row,), found.embedded, found.images)

    def _risk(self, board: Board) -> Mapping[str, float] | None:
        if self._judge is None:
            return None
        left = board.paths.keys() - board.labelled - board.flagged
        return self._judge({name: board.paths[name] for name in board.paths if name in left})

    def _annotated(self, wanted: NextRequest) -> Mapping[str, frozenset[str]]:
        return self._desk.runtime.annotated() if wanted.labels else {}

    def _told(self, given: list[Proposal], found: Proposals) -> dict[str, Any]:
        waiting = found.images - found.embedded
        message = f"{waiting} images are not compared yet; they are soon." if waiting else ""
        best = given[0]
        logger.info("next image: %s (%s) %s", best.image_id, best.reason, message)
        answer = {
            **_row(best),
            "ranking": self._name,
            "embedded": found.embedded,
            "images": found.images,
            "message": message,
        }
        if len(given) > 1:
            answer["work_list"] = [_row(row) for row in given]
        return answer


@dataclass(frozen=True, eq=False)
class _Table:
    """Who has what, at the time of one choice.

    Attributes:
        done: labelled or leased images; the labels that they have of those wanted, None: all.
        partly: images that lack labels, and which; each is offered until
            somebody who was given it for them saves it again.
        free: ids that the client may be given.
    """

    done: Mapping[str, frozenset[str] | None]
    partly: Mapping[str, frozenset[str]]
    free: set[str]

    @classmethod
    def of(
        cls,
        wanted: NextRequest,
        board: Board,
        leases: Leases,
        annotated: Mapping[str, frozenset[str]],
    ) -> "_Table":
        active = leases.active()
        looked_for = leases.looked_for() if wanted.labels else {}
        every = frozenset(wanted.labels)
        lacks = {i: every - annotated[i] for i in board.labelled & annotated.keys()}
        partly = {
            image_id: missing
            for image_id, missing in lacks.items()
            if missing and not missing <= looked_for.get(image_id, frozenset())
        }
        finished = board.labelled - partly.keys()
        leases.release(finished & active.keys())
        held = {i: lease for i, lease in active.items() if i not in finished}
        done: dict[str, frozenset[str] | None] = {
            image_id: every - partly[image_id] if image_id in partly else None
            for image_id in board.labelled
        }
        done |= dict.fromkeys(held.keys() & board.paths.keys())
        open_ = board.paths.keys() - finished
        if not wanted.flagged:
            open_ -= board.flagged
        own = {
            i: lease.given_at for i, lease in held.items() if lease.client_id == wanted.client_id
        }
        others = held.keys() - own.keys()
        own |= leases.skipped(wanted.client_id)
        own = {image_id: at for image_id, at in own.items() if image_id in open_ - others}
        free = open_ - others - own.keys()
        if not free and own:
            free = {min(own, key=lambda image_id: (own[image_id], image_id))}
        return cls(done, partly, set(free))


def _row(proposal: Proposal) -> dict[str, Any]:
    return {
        "id": proposal.image_id,
        "score": round(proposal.score, 6),
        "reason": proposal.reason,
        "slices": list(proposal.slices),
    }
