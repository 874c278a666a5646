"""Experts: passes that make, merge and route mixtures of experts."""
