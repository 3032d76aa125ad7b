"""Fused operations on tensors. Knows torch, knows nothing of SDXL."""
