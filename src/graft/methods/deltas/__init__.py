"""What is learned at one linear map."""
