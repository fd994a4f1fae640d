"""The door for applications: an OpenAI-compatible gateway that logs, learns of feedback, and changes models in service.

app.py          the HTTP application                   http.py       limits, hosts, bodies, streams, the clock
completions.py  the routes that answer                 feedback.py   the routes that learn
admin.py        health, metrics, reload, rollback      access.py     keys and scopes
api.py          what requests look like                answers.py    what answers look like
exchange.py     one question: ask, record, answer      gateway.py    all of it without HTTP
models.py       which model answers; hot swap          backends.py   what runs a model
routing.py      what the field `model` means           metrics.py    what Prometheus reads
errors.py       what is refused, and how
"""
