"""Objectives and samplers; they know nothing of the networks."""
