"""The hooks of the adapter."""
