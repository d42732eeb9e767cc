"""Trains the bundled nano model from scratch: its data, its texts, what comes before stage 1, and its measurement."""
