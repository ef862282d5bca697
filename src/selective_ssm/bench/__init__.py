"""Timing what the library computes: cases as data, one way to run them, results that say where they come from."""
