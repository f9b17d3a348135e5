"""Adapter of foolbox."""
