"""What processes share among them, FSDP2's DTensors above all: read whole, and written by one.

gathering.py    a stand-in for a sharded model, whose values are whole where they are looked at
writing.py      one process writes; the others wait for it, and hear of what went wrong
"""
