"""Checkpoints: files opened as lazy tensors, and lazy tensors turned into parameters."""
