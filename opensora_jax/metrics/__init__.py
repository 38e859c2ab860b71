"""Measures of videos and of fidelity to captions."""
