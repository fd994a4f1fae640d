"""Imports the libraries of training and export, for the processes that are forked from the one that imports this."""

import os

from finetune_pipeline.training.job import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # read by some libraries when they are imported

import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
from trl import DPOTrainer, KTOTrainer, SFTTrainer  # noqa: F401

from finetune_pipeline.training import trainer  # noqa: F401
