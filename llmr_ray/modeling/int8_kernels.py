"""The compiled loop of 8-bit layers (int8.py), apart from it because Numba takes a second to load."""

from typing import Any

import numba
import numpy as np

_compiled: Any = numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "ninf"})

_MAGNITUDE = np.int32(0x7FFFFFFF)
"""Clears the sign of a float32. Magnitudes compare as the integers that their bits are, which compiles to vectors."""


@_compiled
def round_rows(values_TI: np.ndarray, inverse_I: np.ndarray, rounded_TI: np.ndarray, scale_T: np.ndarray) -> None:
    """Rounds each row of float32 values times `inverse_I` to -127 .. 127; its scale is what one step stands for."""
    num_inputs = values_TI.shape[1]
    row_I = np.empty(num_inputs, np.float32)
    bits_I = row_I.view(np.int32)
    largest_1 = np.empty(1, np.int32)
    for row in range(values_TI.shape[0]):
        for place in range(num_inputs):
            row_I[place] = values_TI[row, place] * inverse_I[place]
        largest = np.int32(0)
        for place in range(num_inputs):
            largest = max(largest, bits_I[place] & _MAGNITUDE)
        largest_1[0] = largest
        scale = max(largest_1.view(np.float32)[0], np.float32(1e-12)) / np.float32(127)
        scale_T[row] = scale
        per_step = np.float32(1) / scale
        for place in range(num_inputs):
            rounded_TI[row, place] = np.int8(np.int32(np.rint(row_I[place] * per_step)))
