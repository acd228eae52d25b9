"""Generated kernels for NVIDIA GPUs: the problems of the CPU kernels, from a thread's point of view."""
