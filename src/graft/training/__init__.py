"""Fine-tuning, evaluating and generating, on transformers."""
