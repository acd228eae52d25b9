"""Generated kernels for NVIDIA GPUs: the problems of :mod:`gaq_compile.backends.tvm`, one thread at a time."""
