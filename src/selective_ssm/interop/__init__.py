"""What other libraries and this one do for each other's models. Their packages are extras."""
