"""Adapters to ART, Foolbox and torchattacks; nothing of the host imports them."""
