"""The sm_90 machine code of the kernels, executed and counted on a CPU.

``sass`` reads what nvdisasm says of a cubin, ``machine`` with ``arithmetic`` and ``memory`` executes it, ``launches``
takes the launches from the project's own launchers, ``counting`` and ``timing`` turn what was executed into
instructions per element and into a modelled time on an H200. ``python -m machine_code`` (in ``tests/``) prints the
table of ``counts.json``.

Measured: instructions, registers, shared memory, results. Modelled: every time.
"""
