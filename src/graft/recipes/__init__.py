"""Applications as runnable files."""
