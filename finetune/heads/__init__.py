"""Heads on features: the linear and the kernel head, their solvers and cross-validation."""
