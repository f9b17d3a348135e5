"""Tensors in, tensors out; usable without the host.

``reference.py`` is the definition and what runs on the CPU, ``triton_impl.py`` the same for CUDA, ``ops.py`` the
registered operators with their checks and derivatives.
"""
