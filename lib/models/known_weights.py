"""The table of published weights that RefSeg can use: where they lie and what they must be.

Checksums and commits were compared with public records of the Hugging Face hub (LFS pointers, other
projects' pins), not by downloading. A repository whose commit could not be established is pinned by
the checksum of its large file alone (`revision` is "main"). The small `config.json` files without a
checksum here are recorded in `checksums.json` when they are first fetched, and compared from then
on; `weights list` and `weights verify` say which is which.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFile:
    """One file of a repository.

    Attributes:
        name: in the repository and on disk.
        sha256: of its content; None where it could not be established.
        size: in bytes; None where it could not be established.
        instead: other files that may be there in its place.
    """

    name: str
    sha256: str | None = None
    size: int | None = None
    instead: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownWeights:
    """Published weights of one network.

    Attributes:
        name: what the user calls them.
        use: "segmenter" or "embedder".
        repo: on the Hugging Face hub.
        revision: commit, or "main" where only the checksum pins the content.
        files: all that are needed. One file: the path of the weights is that file; several: the
            path is their folder.
        licence: SPDX name.
    """

    name: str
    use: str
    repo: str
    revision: str
    files: tuple[WeightFile, ...]
    licence: str


def _sam2(name: str, revision: str, sha256: str, size: int) -> KnownWeights:
    release, model = name.split("-", 1)
    stem = f"{release}_hiera_{model.replace('-', '_')}"
    file = WeightFile(f"{stem}.pt", sha256, size, instead=(f"{stem}.safetensors",))
    repo = f"facebook/{release}-hiera-{model}"
    return KnownWeights(name, "segmenter", repo, revision, (file,), "Apache-2.0")


def _dinov2(
    name: str, revision: str, sha256: str, size: int | None, config: str | None
) -> KnownWeights:
    files = (
        WeightFile("config.json", config),
        WeightFile("model.safetensors", sha256, size, instead=("pytorch_model.bin",)),
    )
    return KnownWeights(name, "embedder", f"facebook/{name}", revision, files, "Apache-2.0")


_ALL = (
    _sam2(
        "sam2.1-tiny",
        "de431c4043854a71d8101e17995dfe596bf101a5",
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        156_008_466,
    ),
    _sam2(
        "sam2.1-small",
        "main",
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        184_416_285,
    ),
    _sam2(
        "sam2.1-base-plus",
        "main",
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        323_606_802,
    ),
    _sam2(
        "sam2.1-large",
        "665f8e2ad61cf5f53d65644ff27c8ee525124610",
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        898_083_611,
    ),
    _sam2(
        "sam2-tiny",
        "a8e4b467be69abf1c58fb327abc2935aaa890d1e",
        "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
        155_906_050,
    ),
    _sam2(
        "sam2-small",
        "main",
        "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
        184_309_650,
    ),
    _sam2(
        "sam2-base-plus",
        "main",
        "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
        323_493_298,
    ),
    _sam2(
        "sam2-large",
        "main",
        "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b",
        897_952_466,
    ),
    _dinov2(
        "dinov2-small",
        "ed25f3a31f01632728cabb09d1542f84ab7b0056",
        "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
        None,
        "1809f83e3bdb1609a501a610ad4a742f4fd8ae44d72ca4aa0df52d1f2ac8628d",
    ),
    _dinov2(
        "dinov2-base",
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
        None,
        None,
    ),
    _dinov2(
        "dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
        1_217_522_888,
        "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0",
    ),
    KnownWeights(
        "clip",
        "embedder",
        "openai/clip-vit-base-patch32",
        "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        (
            WeightFile("config.json"),
            WeightFile(
                "pytorch_model.bin",
                "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
                instead=("model.safetensors",),
            ),
        ),
        "MIT",
    ),
)
KNOWN: dict[str, KnownWeights] = {weights.name: weights for weights in _ALL}
