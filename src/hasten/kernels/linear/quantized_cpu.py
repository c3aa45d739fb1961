"""Linear layers on 8-bit and 4-bit weights through ``csrc/ops/linear_int8.cpp`` and ``_int4.cpp``.

The kernels are still to come; until then these are the definitions.
"""

from hasten.kernels.linear.quantized_ref import embed, linear, put, unpack, unpack_codes

__all__ = ["embed", "linear", "put", "unpack", "unpack_codes"]
