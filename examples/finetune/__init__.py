"""What surrounds the two fine-tunes; their story, training loop included, is told by the scripts themselves.

arguments    the command line that both have in common
sources      models and data: local folders, the hub, or what stands in for it
batches      from texts to the batches of the training, held-out and reported splits
evaluation   loss and accuracy; the saved adapter against the trained one
runs         one run from start to end: its folder, its records, what is left after Ctrl-C
checkpoints  the state of an unfinished run, from which `--resume` continues
progress     a bar in a terminal, a quiet line now and then in a log
reports      what is said before, during and after a run
curves       loss and accuracy in a PNG file
interrupts   Ctrl-C at the two moments when a KeyboardInterrupt would do harm
errors       the error that ends a run with a message
"""
