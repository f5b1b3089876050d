"""A run as files of other programs, compared with it, and its card."""
