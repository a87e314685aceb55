"""What the memory bank answers: small frozen records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BankVersion:
    """Which references answered.

    Attributes:
        generation: grows with each change of the references.
        fingerprint: of what encoded them.
    """

    generation: int
    fingerprint: str


@dataclass(frozen=True)
class SyncReport:
    """What one `sync` found and did.

    Attributes:
        added: ids of images that are references now and were not.
        removed: ids that are no longer.
        renamed: (old id, new id); their references moved without being encoded again.
        updated: ids whose image, label or label names changed.
        unchanged: ids that are as they were, or that a process at work beside us encoded.
        failed: (id, sentence) of all images in the list that cannot be references now; each is
            tried again once its files change.
        generation: of the bank afterwards.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    updated: tuple[str, ...]
    unchanged: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    generation: int

    @property
    def changed(self) -> bool:
        """Whether any reference came, went or changed."""
        return bool(self.added or self.removed or self.renamed or self.updated)


@dataclass(frozen=True)
class LabelCount:
    """On how many reference slices a label is present, and annotated but absent."""

    present: int
    absent: int


@dataclass(frozen=True)
class BankStatus:
    """The bank in numbers.

    Attributes:
        images: labelled images with references.
        slices: references.
        labels: names seen, sorted.
        bytes: on disk, catalogue and memories together.
        generation: of the references.
        failed: (id, sentence) of images that could not be encoded.
    """

    images: int
    slices: int
    labels: tuple[str, ...]
    bytes: int
    generation: int
    failed: tuple[tuple[str, str], ...]
