"""Indexes of vectors: which type serves, how hard it searches, what it was measured to find."""
