"""Adapter of torchattacks."""
