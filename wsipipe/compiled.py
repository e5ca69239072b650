"""Machine code from loops: how every numba kernel of this package is made."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

# Division by zero gives what it gives in numpy, without a test before each; nothing here divides by zero.
_SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(kernel: Kernel) -> Kernel:
    """The same function as machine code, kept on disk for the next process; it runs without the interpreter's lock.

    Where no folder can be written, as in a sealed container, it is compiled anew in each process.
    Arithmetic is not reordered (no fastmath): the same pixels give the same bits in every array.
    """
    try:
        return cast(Kernel, numba.njit(cache=True, **_SETTINGS)(kernel))
    except RuntimeError:  # numba found no folder for its cache
        return cast(Kernel, numba.njit(**_SETTINGS)(kernel))
