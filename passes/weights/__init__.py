"""Weights: passes that store matrices in another form and leave what they stand for in place."""
