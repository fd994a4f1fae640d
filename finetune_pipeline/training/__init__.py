"""Trains a LoRA adapter in a separate process that does not need Dagster.

child_process.py    train(job): starts the process, follows its progress, says why it failed
job.py              the input (JobConfig) and the output (TrainingResult, Progress)
__main__.py         python -m finetune_pipeline.training job.json
method_choice.py    chooses SFT, DPO or KTO by the contents of the dataset
trainer.py          trains, by TRL and PEFT; loads torch, as do the modules that it imports
padding_free.py     SFT on packed sequences
preference.py       DPO and KTO
model.py            the base model's weights and the adapter over them
callbacks.py        progress, validation, checkpoints
conversations.py    dataset rows as tokenized conversations
tokenized_data.py   the examples of a job as memory-mapped tokens
reward_sampling.py  sampling of examples by their rewards
warm_start.py       incremental training from the champion's adapter
distributed.py      ranks of a run in several processes
elastic_launch.py   starts them on this machine, one per GPU
ray_cluster.py      starts them on a Ray cluster
base_model.py       checks of the base model's folder, without torch
checkpoints.py      complete checkpoints, after a kill at any time
architecture.py     dimensions of a base model, without loading it
estimate.py         memory and time of a training run, part by part
presets.py          settings that fit a memory size
hardware.py         memory, cores and speed of this machine
memory.py           the memory check, and what to do when memory runs out
progress.py         progress as JSON lines
trackers.py         TensorBoard, Weights & Biases, MLflow
loss_curve.py       the loss curve as a picture
backends/           peft, unsloth, axolotl: whether they can run here, and which one is chosen
"""
