"""Where networks run, and what to do when a graphics card runs out of memory."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from lib.errors import RefSegError, RequestError

logger = logging.getLogger(__name__)
T = TypeVar("T")


def has_gpu() -> bool:
    """Whether CUDA or Apple's MPS can be used here."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def choose_device(device: str | None = None) -> torch.device:
    """The device to run on: the one named, or the first of CUDA, MPS and CPU that works.

    Args:
        device: "cpu", "cuda", "cuda:N" or "mps"; None, "" and "auto" leave the choice to us.

    Raises:
        RequestError: the name is no device, or the device is not there.
    """
    if device in (None, "", "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        msg = f"Device {device!r} is unknown; use cpu, cuda, cuda:N or mps."
        raise RequestError(msg) from error
    missing = None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        missing = f"{torch.cuda.device_count()} CUDA device(s) are visible"
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        missing = "MPS is not available"
    elif chosen.type not in ("cpu", "cuda", "mps"):
        missing = "only cpu, cuda and mps are supported"
    if missing:
        msg = f"Device {device!r} cannot be used: {missing}. Use device=cpu or leave it out."
        raise RequestError(msg)
    return chosen


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator ran out of memory (MPS has no exception of its own)."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def in_batches(
    run: Callable[[slice], T], count: int, *, batch: int, hint: str
) -> tuple[list[T], int]:
    """Call `run` on consecutive slices of `range(count)`, smaller ones when memory runs out.

    Args:
        run: works on one slice of the items.
        count: number of items.
        batch: how many to try at once.
        hint: what the user can do if even one at a time does not fit.

    Returns:
        the results in order, and the batch size that fitted, to start with next time.

    Raises:
        RefSegError: one item alone does not fit.
    """
    results: list[T] = []
    start = 0
    while start < count:
        try:
            results.append(run(slice(start, min(start + batch, count))))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                msg = f"The GPU ran out of memory with one item at a time. {hint}"
                raise RefSegError(msg) from error
            batch //= 2
            logger.warning("GPU out of memory; going on with batches of %d", batch)
        else:
            start += batch
            continue
        # outside the except block: the traceback holds the tensors that did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results, batch
