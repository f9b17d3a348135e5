"""Segmentation and detection: data, networks, and what makes targets of other people's networks.

A built-in plugin: the host finds `robplug.vision.plugin` as it finds any other, and imports nothing else of this.
"""
