"""Train a LoRA adapter, in a process of its own that knows nothing of Dagster.

launch.py         train(job): start the process, follow its progress, say why it failed
job.py            what goes in (JobConfig) and what comes out (TrainingResult, Progress)
__main__.py       python -m finetune_pipeline.training job.json
methods.py        by which method to train, from what the dataset holds
trainer.py        the training itself: TRL and PEFT; the files that load torch are this one and those it imports
preference.py     DPO and KTO: their data, their trainers, their figure
sampling.py       which examples a pass sees when rewards weigh them
team.py           several processes train together: which one is this, and what is its share
accelerated.py    starts them on this machine, one for each GPU
ray_cluster.py    starts them on a Ray cluster, and brings progress and adapter back
base_model.py     is this folder a base model that can be trained, asked without torch
checkpoints.py    which checkpoint is complete, after a kill at any time
architecture.py   what a base model is made of, without loading it
estimate.py       memory and time of a training, part by part
presets.py        what fits: settings for a memory size and a model
memory.py         asked for before a training; when it runs out, half the micro-batch
process.py        die with the parent, and have the folder alone
progress.py       the JSON lines that everybody follows
backends/         what trains (peft, unsloth, axolotl), whether it can here, and which one is chosen
"""
