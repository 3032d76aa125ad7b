"""Latents and checkpoints under the lamp."""
