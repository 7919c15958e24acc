"""Adapter files: `save` and `load`, and the room they work in.

saving.py, loading.py   from model to file and back
contents.py             what a file holds, whatever its format
formats/                one file for each format
fingerprint.py          by what a base is known again
tensors.py, atomic.py   safetensors read with suspicion, files written whole or not at all
"""
