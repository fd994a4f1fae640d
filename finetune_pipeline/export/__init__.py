"""Export: turn a base model and an adapter into the GGUF that serves.

model.py           export: merge, convert, quantize; export_adapter: the adapter alone, applied to the base's GGUF
base_gguf.py       the base model's own GGUF, made once
base.py            the folder of a base model, and its hash
base_check.py      check a base model's tokenizer and chat template before training
merge.py           merge LoRA into full-precision weights, with the base's own tokenizer files
reference.py       answers of the base with its unmerged adapter
gguf.py            llama.cpp's converter and quantizer
tokenizer.py       chat template and model name for the converter
special_tokens.py  the tokens that a GGUF declares: beginning, ends of an answer, others of the chat template
process.py         run a step in a child process
__main__.py        the steps that run in a child process
parity.py          same tokens and same answers as in training
"""
