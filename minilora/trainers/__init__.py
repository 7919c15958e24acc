"""What outside trainers need of an injected model.

checkpoints.py   transformers' Trainer: checkpoints that hold what trains, and not the model
weights.py       reinforcement learning: the weights to send to a server that knows the bare model alone
"""
