"""Latents to video: the decoders, one file a model."""
