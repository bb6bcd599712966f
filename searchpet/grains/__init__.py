"""Grains: ways to name a delta's coordinates.  Equal names live or die together.

A grain is `grain(site, kind, width) -> width` names.  One per file of this folder.
"""
