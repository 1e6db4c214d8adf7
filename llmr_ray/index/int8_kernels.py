"""The compiled loops of the 8-bit scan (int8.py), apart from it because Numba takes a second to load.

Shape suffixes: Q queries of a tile, N documents, B documents of a tile, D embedding, C candidates kept.
"""

from typing import Any

import numba
import numpy as np

STEP = 32
"""Documents that are passed over together where none reaches the threshold."""

_compiled: Any = numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "contract", "reassoc"})


@_compiled
def scan(
    product_QB: np.ndarray,
    scale_B: np.ndarray,
    error_B: np.ndarray,
    allowed_B: np.ndarray,
    slope_Q: np.ndarray,
    slack_Q: np.ndarray,
    k: int,
    first: int,
    tile: int,
    rows_QC: np.ndarray,
    upper_QC: np.ndarray,
    lower_QC: np.ndarray,
    counts_Q: np.ndarray,
    limits_Q: np.ndarray,
    thresholds_Q: np.ndarray,
) -> None:
    """Keeps the documents of a tile, at most `tile` of them, whose upper bound reaches the threshold of a query."""
    num_documents, room = product_QB.shape[1], rows_QC.shape[1]
    masked = len(allowed_B) > 0
    for query in range(product_QB.shape[0]):
        count = counts_Q[query]
        if count < 0:
            continue
        threshold, slope = thresholds_Q[query], slope_Q[query]
        for start in range(0, num_documents, STEP):
            stop = min(start + STEP, num_documents)
            if stop - start == STEP:
                # A count over slices of fixed length is what LLVM makes vector instructions of; a maximum is not.
                products, scales = product_QB[query, start:stop], scale_B[start:stop]
                errors, above = error_B[start:stop], np.int32(0)
                for place in range(STEP):
                    if np.float32(products[place]) * scales[place] + slope * errors[place] >= threshold:
                        above += np.int32(1)
                if above == 0:
                    continue
            for document in range(start, stop):
                score = np.float32(product_QB[query, document]) * scale_B[document]
                error = slope * error_B[document]
                if score + error >= threshold and (not masked or allowed_B[document]):
                    rows_QC[query, count] = first + document
                    upper_QC[query, count] = score + error
                    lower_QC[query, count] = score - error
                    count += 1
        counts_Q[query] = count
        if count > limits_Q[query]:
            _raise_threshold(query, k, slack_Q, rows_QC, upper_QC, lower_QC, counts_Q, thresholds_Q)
            count = counts_Q[query]
            if count > room - tile:
                counts_Q[query] = -1
            limits_Q[query] = min(room - tile, count + max(k, tile))


@_compiled
def _raise_threshold(
    query: int,
    k: int,
    slack_Q: np.ndarray,
    rows_QC: np.ndarray,
    upper_QC: np.ndarray,
    lower_QC: np.ndarray,
    counts_Q: np.ndarray,
    thresholds_Q: np.ndarray,
) -> None:
    """Raises a query's threshold to what its k-th best candidate has for certain, and drops what is below."""
    count = counts_Q[query]
    if count < k:
        return
    certain = np.partition(lower_QC[query, :count], count - k)[count - k] - 2 * slack_Q[query]
    threshold = max(thresholds_Q[query], certain)
    kept = 0
    for place in range(count):
        if upper_QC[query, place] >= threshold:
            rows_QC[query, kept] = rows_QC[query, place]
            upper_QC[query, kept] = upper_QC[query, place]
            lower_QC[query, kept] = lower_QC[query, place]
            kept += 1
    counts_Q[query], thresholds_Q[query] = kept, threshold


@_compiled
def narrow(
    vector_ND: np.ndarray,
    query_QD: np.ndarray,
    slack_Q: np.ndarray,
    error_Q: np.ndarray,
    k: int,
    rows_QC: np.ndarray,
    upper_QC: np.ndarray,
    lower_QC: np.ndarray,
    counts_Q: np.ndarray,
    thresholds_Q: np.ndarray,
) -> None:
    """Keeps the candidates that float32 scores put among the k best, or too near to tell."""
    for query in range(len(query_QD)):
        if counts_Q[query] < k:
            continue
        _raise_threshold(query, k, slack_Q, rows_QC, upper_QC, lower_QC, counts_Q, thresholds_Q)
        count = counts_Q[query]
        for place in range(count):
            score = np.float32(0)
            row = rows_QC[query, place]
            for column in range(query_QD.shape[1]):
                score += vector_ND[row, column] * query_QD[query, column]
            upper_QC[query, place] = score
        least = np.partition(upper_QC[query, :count], count - k)[count - k] - 2 * error_Q[query]
        kept = 0
        for place in range(count):
            if upper_QC[query, place] >= least:
                rows_QC[query, kept] = rows_QC[query, place]
                kept += 1
        counts_Q[query] = kept
