"""Reading data and turning it into what a model takes."""
