"""The formats that adapters come in, each in a place of its own, all read into `contents.Announced`.

native.py       minilora's own
peft/           PEFT's LoRA folders, read and written
loralib.py      loralib's state dicts
adapters.py     folders of the adapters library
recognise.py    what a file is that none of them reads
"""
