"""Train a LoRA adapter, in a process of its own that knows nothing of Dagster.

launch.py         train(job): start the process, follow its progress, say why it failed
job.py            what goes in (TrainingJob) and what comes out (TrainingResult, Progress)
__main__.py       python -m finetune_pipeline.training job.json
trainer.py        the training itself: TRL and PEFT
team.py           several processes train together: which one is this, and what is its share
accelerated.py    starts them on this machine, one for each GPU
ray_cluster.py    starts them on a Ray cluster, and brings progress and adapter back
base_model.py     is this folder a base model that can be trained, asked without torch
checkpoints.py    which checkpoint is complete, after a kill at any time
process.py        die with the parent, and have the folder alone
progress.py       the JSON lines that everybody follows
backends.py       which ways of training this machine has
"""
