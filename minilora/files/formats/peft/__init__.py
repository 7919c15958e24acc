"""PEFT's LoRA folders, read and written without PEFT.

    adapter_config.json         settings, and patterns that say which modules they concern
    adapter_model.safetensors   base_model.model.<site>.lora_A.weight   (r, in)
                                base_model.model.<site>.lora_B.weight   (out, r)
                                base_model.model.<module>.weight, ...   of modules trained in full
    README.md                   the model card that the hub shows

PEFT applies the patterns and takes what tensors it finds; here the tensors say what the sites are, and the
patterns must say the same. Nothing of minilora's own goes into the config, where PEFT warns of what it does
not know. The base's fingerprint, a checksum, and a digest of what the config means go into the tensors'
header, which PEFT and vLLM do not read.

reader.py     from the two files to what they announce
writer.py     from an adapter to the files
portable.py   an adapter of the fewest words, for servers
config.py     what the config says, and which of its fields can be honoured
fields.py     a JSON object's fields, each checked as it is taken
tokens.py     rows of embeddings, trained beside LoRA
matching.py   PEFT's rules for names, followed to the letter
task.py       what the config tells of the model
card.py       README.md
"""

from .card import Figures, require_figures
from .config import CONFIG_FILE
from .keys import PREFIX
from .reader import TENSOR_FILE, reading, tensor_file
from .writer import composed, write

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "TENSOR_FILE",
    "Figures",
    "composed",
    "reading",
    "require_figures",
    "tensor_file",
    "write",
]
