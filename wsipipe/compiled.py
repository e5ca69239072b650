"""Machine code from loops: how every numba kernel of this package is made."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(kernel: Kernel) -> Kernel:
    """The same function as machine code, kept on disk for the next process; it runs without the interpreter's lock.

    Where no folder can be written, as in a sealed container, it is compiled anew in each process.
    Arithmetic is not reordered (no fastmath): the same pixels give the same bits in every array.
    """
    try:
        return cast(Kernel, numba.njit(cache=True, nogil=True)(kernel))
    except RuntimeError:  # numba found no folder for its cache
        return cast(Kernel, numba.njit(nogil=True)(kernel))
