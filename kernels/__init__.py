"""Triton kernels. Import them as ``sparsekd.kernels``; the top-level name ``kernels`` is never installed.

conv2d, linear    one file per op: launchers for the forward pass and both gradients
_gather_gemm      the kernel under every forward pass and every gradient of an input
_block_products   the kernel under every gradient of the kept values
_index            which blocks a tile walks: tables built on the device, once per mask
_tiles            the tile shapes to choose from

They need Triton and a CUDA device; with TRITON_INTERPRET=1, set before the first import, they run on the CPU.
"""
