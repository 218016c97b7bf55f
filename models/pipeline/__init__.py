"""Prompt embeddings to latents: families, guidance, the sampler of a checkpoint."""
