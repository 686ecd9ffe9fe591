"""Short convolution, SiLU, heads and unit length in one pass over memory (see ../../fused_streams.py).

    z_t = sum_{i<K} w_i x_{t-i}     s = z sigmoid(z)     y = s / sqrt(|s|^2 + eps), per head

Of one stream, or of the three of a memory, which then lie side by side in x, with its gates behind them. With
the position of each token in its document, none sees an earlier document: x_{t-i} counts where position >= i.

A program has HB heads next to each other, so that the rows of its tile ``[tokens, HB, P]`` are long enough.
"""

from nestor.ops.kernels.streams.calls import convolved_heads, memory_inputs

__all__ = ["convolved_heads", "memory_inputs"]
