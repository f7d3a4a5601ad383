"""Names of PyTorch operations that make the host wait for the GPU.

The check of a GPU and two tests share this list, so the file imports nothing.
"""

WAITING_OPERATIONS = frozenset(
    {
        "_local_scalar_dense",  # Tensor.item() and everything that reads a number
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    }
)
"""The result is a number on the host, or has a shape that depends on numbers on the GPU."""
