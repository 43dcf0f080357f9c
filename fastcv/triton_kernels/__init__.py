"""The operators' kernels in Triton, for CUDA devices: compiled when first called, so that users need no compiler.

A file has an operator's stem: kernels, then launchers with the operators' names and parameters, then ``VARIANTS``, what
is compiled ahead of time by the tests and tabulated in the documentation. Launchers avoid what Triton's interpreter
cannot run (libdevice, inline assembly), so that all tests of an operator also run on the CPU under
``TRITON_INTERPRET=1``.

Nothing is imported here: triton takes a second to load, and is not everywhere.
"""
