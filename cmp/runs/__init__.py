"""A run as a fact: its identity, its checkpoints, its log, and where it is stored."""
