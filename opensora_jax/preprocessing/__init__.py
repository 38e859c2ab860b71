"""Engines that encode videos and captions into a dataset: on this machine, or on a Ray cluster."""
