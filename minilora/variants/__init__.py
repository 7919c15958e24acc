"""Variants of low-rank adaptation, as pure functions of tensors.

initial.py       the initialisations of A and B, and the change since
dora.py          DoRA: a magnitude for each output
dora_linear.py   its weight form, with a backward of its own
"""
