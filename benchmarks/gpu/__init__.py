"""`python -m benchmarks.gpu`, and what the GPU compilers, samplers and peers say."""
