"""CUDA C++ text compiled on first use by NVRTC, and launched on torch's stream."""
