"""Operations of the forward pass: one folder an operation.

``ref.py`` is the definition in plain torch, ``cpu.py`` calls the C++ kernels of ``csrc/``, and the
folder's ``__init__`` has the public functions, which choose by device. ``impl="ref"`` or
``impl="cpu"`` forces one, ``HASTEN_KERNELS=ref`` forces the reference everywhere. A forced choice
that cannot run raises.

What every kernel promises: a row's bits depend on that row alone, never on the other rows, their
number, the number of threads or the instruction set, which ``HASTEN_ISA`` forces: ``amx``,
``avx512vnni``, ``avx512``, ``avx2`` or ``portable``.
"""
