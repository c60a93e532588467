"""What finished adapters do together, and the forms they can take."""
