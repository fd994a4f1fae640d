"""Registry: model versions, the champion that serves, and how it became champion.

model_versions.py      versions: names, numbers, files
champion.py            the champion pointer: promote, switch, roll back
deployment_history.py  one row for each change of the champion, and for each decision about a model
approvals.py           challengers that wait for a person
comparisons.py         one row for each evaluation report
check_outcomes.py      outcomes of blocking checks
trainings.py           one row for each finished training
training_jobs.py       training jobs: status, runs, events
garbage_collection.py  deletion of unused model files
model_card.py          the model card

A model is named `loop@v1.2.0`; `loop@champion`, `loop@previous` and `loop@base` are names of the current ones. A model
that was never promoted is named by the first digits of its SHA-256.
"""
