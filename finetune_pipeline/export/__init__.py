"""From a base model and an adapter to the GGUF that serves.

model.py      export(base, adapter): merge, convert, quantize; export_adapter: the adapter alone, over the base's GGUF
base_gguf.py  the base model's own GGUF, made once
base.py       where a base model lies, and the hash of what it is
merge.py      LoRA into full-precision weights, beside the base's own tokenizer files
reference.py  answers of the base with its adapter, unmerged
gguf.py       llama.cpp's converter and quantizer
tokenizer.py  chat template and model name for the converter
process.py    run one of these steps in a child process, and say why it failed
__main__.py   what such a child does
checks.py     same tokens, same answers: what the asset checks ask
"""
