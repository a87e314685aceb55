"""What there is to be labelled, as the datastore has it, read in one pass."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore

from lib.studies.datastore import FINAL, StudiesDatastore


@dataclass(frozen=True, eq=False)
class Board:
    """Images and what is known of them.

    Attributes:
        paths: every image that is there, file or DICOM folder by id, sorted.
        labelled: ids with a label of a tag that counts.
        flagged: ids that somebody set aside: `PUT /datastore/image/info` with {"flagged": true},
            or with a reason in place of true.
    """

    paths: Mapping[str, Path]
    labelled: frozenset[str]
    flagged: frozenset[str]


def read_board(
    datastore: Datastore, tags: Sequence[str] = (FINAL,), *, look_at_disk: bool = True
) -> Board:
    """Read it.

    Args:
        datastore: any.
        tags: of labels that count; the first that a remote store has is "final".
        look_at_disk: a local store reads its folder again; else it tells what it knows.
    """
    if isinstance(datastore, LocalDatastore) and look_at_disk:
        datastore.refresh()
    if isinstance(datastore, StudiesDatastore):
        if look_at_disk:
            datastore.wait_for_choice()
        return _in_one_pass(datastore, tags)
    ids = sorted(datastore.list_images())
    labelled = frozenset(ids) - frozenset(datastore.get_unlabeled_images())
    infos = {image_id: datastore.get_image_info(image_id) for image_id in ids}
    flagged = frozenset(image_id for image_id, info in infos.items() if info.get("flagged"))
    paths = {image_id: Path(datastore.get_image_uri(image_id)) for image_id in ids}
    return Board({i: path for i, path in paths.items() if path.exists()}, labelled, flagged)


def _in_one_pass(store: StudiesDatastore, tags: Sequence[str]) -> Board:
    """The platform's own calls look each image up and copy its record: seconds for 100,000."""
    with store.lock:
        table = store._datastore
        folder = os.path.realpath(table.image_path())
        objects = table.objects
        paths = {i: Path(folder, f"{i}{objects[i].image.ext}") for i in sorted(objects)}
        paths = {i: path for i, path in paths.items() if store.at_hand(i)}
        labelled = frozenset(i for i, o in objects.items() if any(o.labels.get(t) for t in tags))
        flagged = frozenset(i for i, o in objects.items() if o.image.info.get("flagged"))
    return Board(paths, labelled, flagged)
