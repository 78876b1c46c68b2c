"""Hands in plain PyTorch: always there, on every device."""
