"""Outlines painted on pixels."""

from typing import Any

import numpy as np
import numpy.typing as npt
from skimage import draw

HAIR = 2.0**-10  # px, finer than any outline is drawn


def pixels_within(outline: npt.NDArray[np.float64], shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], ...]:
    """The pixels whose centre lies inside an outline.

    Parameters
    ----------
    outline : (n, 2) float64
        x and y of its corners, px; the pixel in row 0, column 0 reaches from 0 to 1.
    shape : (height, width, ...)
        Of the image; what lies beside it is left out.

    Returns
    -------
    two (N,) int64
        Rows and columns. Of two outlines that share an edge, a centre on it belongs to one: to that on its right, or
        below it.

    Examples
    --------
    >>> square = np.array([[0.5, 0.5], [2.5, 0.5], [2.5, 2.5], [0.5, 2.5]])
    >>> pixels_within(square, (4, 4))[0].size
    4
    """
    # skimage counts what lies on an edge as inside, on either side of it; OpenCV all pixels that an edge touches.
    # Moved by unequal hairs in x and y, edges that ran through centres, upright, level or aslant, pass beside them.
    x, y = np.asarray(outline, np.float64).T - 0.5 - np.array([[HAIR], [HAIR**2]])
    rows_and_columns: tuple[npt.NDArray[Any], ...] = draw.polygon(y, x, shape)
    return rows_and_columns
