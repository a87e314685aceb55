"""Which references to take: random, nearest, nearest with diversity, by each encoder at hand.

The bundled network (or `--weights`) segments the index's target cases by k references out of the
set's labelled cases; only the choice of the k differs. Prints a Markdown table, Dice in %.
"""

import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from matchseg import draw, read_set, some, test

from lib.errors import WeightsError
from lib.imaging.io import read_image
from lib.imaging.slices import cut_labels, through_plane_axis
from lib.memory.bank import MemoryBank
from lib.models.build import build_embedder
from lib.models.matchseg import MatchSegSegmenter
from lib.models.protocol import Embedder
from lib.segmenter import Options, ReferenceEngine
from lib.trainers.site.packing import thumbnail
from lib.types import Features, FloatArray, IntArray, LabelledImage, Match

POOL = 4  # times k candidates, of which the diverse ones are taken
WEIGHT = 0.7  # of nearness against likeness to those taken already


class ThumbnailEmbedder:
    """A small grey picture: what no network at all would choose by."""

    name = "thumbnail"
    fingerprint = "thumbnail"

    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.embed`."""
        del features
        wide = [image if image.ndim == 3 else image[..., None] for image in images]
        return np.stack([thumbnail((255 * image).astype(np.uint8)) for image in wide])

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.regions`."""
        return self.embed(images, features)[:, None]


class ChoosingBank(MemoryBank):
    """A bank that chooses references in another way than the product does."""

    way = "nearest"
    seed = 0

    def nearest(
        self,
        embeddings: FloatArray,
        k: int,
        *,
        labels: Sequence[str],
        exclude_image: str | None = None,
        cap_per_case: int | None = None,
    ) -> list[list[Match]]:
        """See `MemoryBank.nearest`; every reference must know every label."""
        if self.way == "nearest":
            return super().nearest(
                embeddings, k, labels=labels, exclude_image=exclude_image, cap_per_case=cap_per_case
            )
        keys, vectors = self.embeddings()
        found = []
        for query, similarity in zip(embeddings, embeddings @ vectors.T, strict=True):
            if self.way == "random":  # others for each slice, the same when asked again
                rng = np.random.default_rng((self.seed, zlib.crc32(query.tobytes())))
                picks = rng.choice(len(keys), size=min(k, len(keys)), replace=False).tolist()
            else:
                picks = diverse(similarity, vectors, k)
            found.append([Match(keys[i], float(similarity[i])) for i in picks])
        return found


def diverse(similarity: FloatArray, vectors: FloatArray, k: int) -> list[int]:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) among the nearest."""
    pool = np.argsort(-similarity, kind="stable")[: POOL * k].tolist()
    picks = [pool.pop(0)]
    while pool and len(picks) < k:
        like = (vectors[pool] @ vectors[picks].T).max(1)
        best = int(np.argmax(WEIGHT * similarity[pool] - (1 - WEIGHT) * like))
        picks.append(pool.pop(best))
    return picks


def embedder_named(name: str, segmenter: MatchSegSegmenter, device: str) -> Embedder | None:
    """The embedder, or None where its weights are not on this machine."""
    if name == "thumbnail":
        return ThumbnailEmbedder()
    try:
        return build_embedder(name, segmenter, device=device)
    except WeightsError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return None


def main(
    data: Annotated[Path, typer.Option(help="Folder with index.json.")],
    sets: Annotated[str, typer.Option(help="Names with commas.")] = "busi,glas,kvasir_seg,acdc",
    embedders: Annotated[
        str, typer.Option(help="Names with commas; those without weights are left out.")
    ] = "thumbnail,bundled,dinov2-small,clip",
    k: Annotated[int, typer.Option(help="References for each slice.")] = 8,
    labels: Annotated[str, typer.Option(help="Labelled cases; 'all'.")] = "all",
    targets: Annotated[int, typer.Option(help="At most so many test cases; 0: all.")] = 0,
    seeds: Annotated[int, typer.Option(help="Draws of the random choice.")] = 3,
    weights: Annotated[Path | None, typer.Option(help="Default: the bundled.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all.")] = 0,
) -> None:
    """Measure; prints a row for each set and encoder."""
    if threads:
        torch.set_num_threads(threads)
    segmenter = (
        MatchSegSegmenter.load(weights, device=device)
        if weights
        else MatchSegSegmenter.load_bundled(device=device)
    )
    print(f"| set | random, {seeds} draws | encoder | nearest | diverse |")
    print("|---|---|---|---|---|")
    for name in sets.split(","):
        source = read_set(data, name)
        cases = some(source.targets, targets)
        random = ""  # the same for each encoder
        for encoder in embedders.split(","):
            embedder = embedder_named(encoder, segmenter, device)
            if embedder is None:
                continue
            engine = ReferenceEngine(segmenter, embedder, annotation="complete")
            with tempfile.TemporaryDirectory() as room:
                bank = ChoosingBank(Path(room), encoder, engine.references_of)
                bank.sync(draw(source, labels, 0))

                def predictor(
                    case: LabelledImage,
                    engine: ReferenceEngine = engine,
                    bank: ChoosingBank = bank,
                    names: tuple[str, ...] = source.names,
                ) -> IntArray:
                    image = read_image(case.image_path)
                    found = engine.segment(image, bank, labels=names, options=Options(k=k))
                    places = np.array([0, *(names.index(n) + 1 for n in found.labels)], np.int32)
                    return places[cut_labels(found.label_map, through_plane_axis(image))]

                if not random:
                    bank.way = "random"
                    figures = []
                    for seed in range(seeds):
                        bank.seed = seed
                        figures.append(100 * test(predictor, cases, source)["dice"])
                    spread = f" ± {np.std(figures, ddof=1):.1f}" if len(figures) > 1 else ""
                    random = f"{np.mean(figures):.1f}{spread}"
                cells = []
                for way in ("nearest", "diverse"):
                    bank.way = way
                    cells.append(f"{100 * test(predictor, cases, source)['dice']:.1f}")
            print(f"| {name} | {random} | {encoder} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
