"""Adapter of art."""
