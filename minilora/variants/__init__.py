"""Variants of low-rank adaptation, as pure functions of tensors, and forms with a backward of their own.

initial.py        the initialisations of A and B, and the change since
bias.py           a bias of B
choice.py         which form a layer computes in
plain_linear.py   plain LoRA on a linear layer in the weight form
delta_linear.py   the same in the delta form
convolution.py    plain LoRA on a convolution, in both forms
dropout.py        what dropout makes of the input of A
dora.py           DoRA: a magnitude for each output
dora_linear.py    its weight form
"""
