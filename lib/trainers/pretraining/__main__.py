"""`python -m lib.trainers.pretraining pack|train|average|untrained --help`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def pack(
    data: Annotated[Path, typer.Option(help="Folder of data sets with an index.json.")],
    out: Annotated[Path, typer.Option(help="The pack to write.")] = Path("runs/pack.zip"),
    longest: Annotated[int, typer.Option(help="Longest side kept, in pixels.")] = 320,
) -> None:
    """Pack every data set that may be trained on into one file."""
    from lib.trainers.pretraining.pack import pack as pack_sets

    out.parent.mkdir(parents=True, exist_ok=True)
    names = pack_sets(data, out, longest=longest)
    typer.echo(f"{len(names)} sets, {out.stat().st_size / 2**20:.1f} MiB: {', '.join(names)}")


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="The pack.")] = Path("runs/pack.zip"),
    out: Annotated[
        Path, typer.Option(help="Folder of the run; an interrupted run goes on there.")
    ] = Path("runs/pretrain"),
    minutes: Annotated[float, typer.Option(help="Stop after this long.")] = 60,
    total_minutes: Annotated[
        float, typer.Option(help="Length of the whole schedule; 0: as --minutes.")
    ] = 0,
    size: Annotated[int, typer.Option(help="Working size in pixels.")] = 192,
    images: Annotated[int, typer.Option(help="Images an episode, at most.")] = 12,
    episodes: Annotated[int, typer.Option(help="Episodes a step.")] = 2,
    synthetic: Annotated[float, typer.Option(help="Share of synthetic anatomies.")] = 0.35,
    regions: Annotated[float, typer.Option(help="Share of region tasks on real pictures.")] = 0.08,
    one_place: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of tasks that keep the contrast of their modality."),
    ] = 0.0,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    encoder_share: Annotated[
        float, typer.Option(min=0, max=1, help="The encoder's share of it.")
    ] = 0.2,
    encoder: Annotated[
        Path | None, typer.Option(help="ImageNet MobileNetV2 features to start from.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train, or go on training, the bundled network."""
    import torch

    from lib.trainers.pretraining.loop import TrainingPlan
    from lib.trainers.pretraining.loop import train as run
    from lib.trainers.pretraining.pack import Pack

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    plan = TrainingPlan(
        minutes=minutes,
        total_minutes=total_minutes or minutes,
        size=size,
        images=images,
        episodes=episodes,
        rate=rate,
        encoder_rate=rate * encoder_share,
        synthetic=synthetic,
        regions=regions,
        one_place=one_place,
        seed=seed,
        device=device,
    )
    typer.echo(run(Pack(data), out, plan, encoder=encoder, start=start))


@app.command()
def average(
    first: Annotated[Path, typer.Argument(help="Weights.")],
    second: Annotated[Path, typer.Argument(help="Weights of a run that went on from the first.")],
    out: Annotated[Path, typer.Option(help="Weights to write.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of the second.")] = 0.5,
) -> None:
    """Average the weights of two legs of one run (Wortsman et al., arXiv 2203.05482)."""
    from lib.models.matchseg import load_weights, save_weights

    net, other = load_weights(first), load_weights(second).state_dict()
    mean = {name: (1 - share) * t + share * other[name] for name, t in net.state_dict().items()}
    net.load_state_dict(mean)
    typer.echo(f"{out} {save_weights(net, out)}")


@app.command()
def untrained(
    encoder: Annotated[Path, typer.Argument(help="ImageNet MobileNetV2 features.")],
    out: Annotated[Path, typer.Option(help="Weights to write.")] = Path(
        "runs/untrained.safetensors"
    ),
) -> None:
    """Write the network as it is before any training: the vote alone, to compare with."""
    import torch

    from lib.models.matchseg import save_weights
    from lib.models.network import MatchSegNet, NetworkConfig
    from lib.trainers.pretraining.loop import load_imagenet

    torch.manual_seed(0)
    net = MatchSegNet(NetworkConfig())
    load_imagenet(net, encoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    typer.echo(f"{out} {save_weights(net, out)}")


if __name__ == "__main__":
    app()
