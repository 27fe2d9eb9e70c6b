"""A stream without an end: what keeps a model current, month by month, and says what it lost."""
