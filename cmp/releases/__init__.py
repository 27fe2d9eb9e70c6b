"""Endless streams: update a model month by month, compare, and release; report what it lost."""
