"""What outside trainers and optimizers need of an injected model.

groups.py        an optimizer's groups: LoRA+, and no decay of vectors
checkpoints.py   transformers' Trainer: checkpoints that hold what trains, and not the model
weights.py       reinforcement learning: the weights to send to a server that knows the bare model alone
"""
