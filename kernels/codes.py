"""What the fused backends of the affine-invariant loss keep for the backward pass: one byte per pixel, and four numbers
per sample and region. Written here once, because CPU and Triton must agree on it.

Byte of a pixel: 0 where the pixel is in no region; else

    1 + STATES * (label - 1) + SIGNS * tied + 3 * (sgn e + 1) + (sgn(x - t) + 1)

with label in 1..FUSED_REGIONS, x the prediction, t its median in that region, e the difference of the normalised maps,
and `tied` 1 where |e| equals the trimming threshold. Trimmed pixels have sgn e = 0. All three signs are -1, 0 or 1.

Gradient of a pixel from terms_BG4 = (A, S, T, W) of its sample and region, for an upstream gradient grad_BG:

    grad_BG * (A * (W if tied else 1) * sgn e + S * sgn(x - t) + (T where x == t))

with, for n pixels of which n_lt are below, n_eq equal to and n_gt above the median, s the mean absolute deviation,
p = (x - t) / s, `kept` pixels kept by trimming, w = 1, W or 0 a pixel's weight:

    W  = (kept - number with |e| below the threshold) / number with |e| equal to it     (1 without trimming)
    A  = 1 / (kept * s)
    Gs = -A * sum(w * sgn e * p)         S = Gs / n
    Gt = -A * sum(w * sgn e)             T = (Gt + Gs * (n_lt - n_gt) / n) / n_eq

An empty or degenerate region has terms 0; one that holds NaN or infinities has terms NaN.
"""

from __future__ import annotations

FUSED_REGIONS = 8
SIGNS = 9
STATES = 2 * SIGNS
CODES = 1 + STATES * FUSED_REGIONS  # 145 of 256
