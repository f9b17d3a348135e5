"""The referee: plans become cells, cells rows, and rows numbers.

docs/architecture.md says which file does what, and in which order to read them.
"""
