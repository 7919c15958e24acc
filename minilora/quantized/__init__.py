"""Quantised linear layers: what stands for their weight, and plain layers in their place.

weights.py    how each library gives a weight back
layers.py     `dequantized`: plain linear layers instead, for a time or for good; and why there are none
"""
