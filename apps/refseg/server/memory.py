"""Memory that is free goes back to the system.

The C library keeps what threads have freed for their next requests. Tensors of all sizes leave
holes there, and the process seems to grow for hours although nothing is held.
"""

import ctypes
import logging
import threading

logger = logging.getLogger(__name__)

EVERY_S = 30.0


def give_back_freed_memory(every_s: float = EVERY_S) -> bool:
    """Start a thread that does so every half minute; False where the C library offers no way."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # not glibc
        logger.debug("freed memory is left to the C library")
        return False

    def work() -> None:
        rest = threading.Event()
        while not rest.wait(every_s):
            trim(0)

    threading.Thread(target=work, name="refseg-memory", daemon=True).start()
    return True
