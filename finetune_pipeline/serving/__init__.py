"""The door for applications: an OpenAI-compatible gateway that logs, learns of feedback, and changes models in service.

app.py          the HTTP routes                        api.py        what requests and responses look like
exchange.py     one question: ask, log, answer         feedback.py   events and statistics over HTTP
models.py       which model answers; hot swap          routing.py    what the field `model` means
access.py       keys, scopes, limits                   metrics.py    what Prometheus reads
"""
