"""`models`: the models that this site trained; which one answers, and back to the one before."""

from pathlib import Path
from typing import Annotated, Any

import typer

from apps.refseg.cli import (
    APP_FOLDER,
    AsJson,
    BankRoot,
    Conf,
    Studies,
    _labelled,
    _runtime,
    _settings,
    _tell,
    app,
    out,
    reported,
)

models_app = typer.Typer(no_args_is_help=True, help="The models that this site trained.")
app.add_typer(models_app, name="models")

ModelsRoot = Annotated[
    Path | None,
    typer.Option("--site-models", help="Folder of the models; else where the server keeps them."),
]


@models_app.command("list")
@reported
def models_list(
    studies: Studies,
    site_models: ModelsRoot = None,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Show the models of a studies folder, and which one is in use."""
    from lib.site.store import state_of

    store = _site(studies, conf, site_models=site_models).store
    history = store.history()
    rows: list[dict[str, Any]] = [
        {
            "model": card.version,
            "state": state_of(card.version, history),
            "date": card.date,
            "dice": card.dice,
            "dice_before": card.dice_before,
            "trained on": len(card.learned),
            "measured on": len(card.validation),
            "start": card.start,
            "labels": ", ".join(card.labels),
        }
        for card in store.versions()
    ]
    _tell(rows, rows, as_json, nothing="no model of this site yet")


@models_app.command("rollback")
@reported
def models_rollback(
    studies: Studies,
    bank: BankRoot = None,
    site_models: ModelsRoot = None,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the model before; a running server takes it at its next request."""
    site = _site(studies, conf, bank=bank, site_models=site_models)
    left = site.store.current()
    card = site.rollback()
    row = {"left": left.version if left else None, "model": card.version if card else None}
    _tell(row, [{key: value or "none" for key, value in row.items()}], as_json)


@models_app.command("use")
@reported
def models_use(
    model: Annotated[int, typer.Argument(help="Number of `models list`.")],
    studies: Studies,
    bank: BankRoot = None,
    site_models: ModelsRoot = None,
    conf: Conf = None,
) -> None:
    """Make a model the current one; its memories are made first."""
    site = _site(studies, conf, bank=bank, site_models=site_models)
    site.publish(site.store.card(model))
    out.print(f"model {model} is in use")


@models_app.command("train")
@reported
def models_train(
    studies: Studies,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Of the trainer, as NAME=VALUE; such as minutes=30."),
    ] = None,
    bank: BankRoot = None,
    site_models: ModelsRoot = None,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Train without a server; published if better. Ctrl-C stops it, the same command goes on."""
    from lib.studies.datastore import StudiesDatastore
    from lib.trainers.matchseg import run_request

    site = _site(studies, conf, bank=bank, site_models=site_models)
    settings = _settings(conf, bank=bank, site_models=site_models)
    runtime = _runtime(settings, studies)
    store = StudiesDatastore(str(studies.resolve()), copies=runtime.folder / "copies", watch=False)
    request = dict(text.partition("=")[::2] for text in option or ())
    answer = run_request(request, site, settings, store)
    _tell(answer, [{"what": key, "value": str(value)} for key, value in answer.items()], as_json)


def _site(studies: Path, conf: list[str] | None, **more: Any) -> Any:
    from lib.site.serving import SiteModel
    from lib.site.store import ModelStore

    settings = _settings(conf, **more)
    runtime = _runtime(settings, studies)  # says so where the folder is not there
    root, name = APP_FOLDER / "model", str(studies.resolve())
    return SiteModel(
        ModelStore.of(settings, root / "site", name),
        settings,
        bank_root=root / "bank",
        studies=name,
        list_labels=lambda: _labelled(runtime, studies),
    )
