"""Triton kernels. Import them as ``sparsekd.kernels``; the top-level name ``kernels`` is never installed.

conv2d            the forward pass and both gradients; a linear layer is a 1x1 convolution of one pixel
gather_gemm       the kernel under every forward pass and every gradient of an input
block_products    the kernel under every gradient of the kept values
launch            a launch whose code was found at the first call
attention         statistics of feature maps and their gradients
attention_match   distances of the maps of teacher and student
attention_kd      distillation of logits
embedding         lookup and bags of packed tables, and what absent entries would have learnt
embedding_grad    the gradients of packed tables
embedding_top_k   the best rows of a packed table for each query
index             which blocks a tile walks: tables built on the device, once per mask
tiles             the tile shapes to choose from

``index`` and ``tiles`` need torch alone. The others need Triton and a CUDA device; with TRITON_INTERPRET=1, set before
the first import, they run on the CPU. Which kernel and tile run is chosen in ``sparsekd.backends.cuda``.
"""
