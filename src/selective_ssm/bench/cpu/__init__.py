"""What is timed on a CPU: each subject beside what the machine could do at best, the reference, and peers."""
