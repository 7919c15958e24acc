"""Variants of low-rank adaptation, as pure functions of tensors, and weight forms with their own backward.

initial.py        the initialisations of A and B, and the change since
bias.py           a bias of B
plain_linear.py   plain LoRA on a linear layer in the weight form
dora.py           DoRA: a magnitude for each output
dora_linear.py    its weight form
"""
