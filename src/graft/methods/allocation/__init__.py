"""Which layers, which ranks, when."""
