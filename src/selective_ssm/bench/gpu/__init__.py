"""What is timed on a GPU: by its own clock, beside floors and peers."""
