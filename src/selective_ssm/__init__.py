"""Selective state space models (Mamba) for PyTorch."""
