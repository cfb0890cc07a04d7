"""Attention over contiguous ranges of keys, with backends for CPU, TPU and NVIDIA GPU.

`range_attention` is a pure function of arrays: each query attends to one or two contiguous ranges of keys. IMPLEMENTATIONS lists the names
of its backends. All of them except "reference" skip the blocks of keys outside the ranges, and their memory is linear in the length.

This package needs only JAX and imports nothing else from iam_jax, so it can be copied into another project. `import iam_jax` does not
import it.
"""

from iam_jax.kernels.range_attention import IMPLEMENTATIONS, range_attention

__all__ = ["IMPLEMENTATIONS", "range_attention"]
