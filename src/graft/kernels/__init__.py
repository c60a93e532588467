"""Fused hot paths, each beside its plain reference and tested against it, forward and backward."""
