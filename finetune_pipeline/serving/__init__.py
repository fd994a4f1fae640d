"""An OpenAI-compatible gateway that logs requests, accepts feedback and hot-swaps models.

app.py           the HTTP application                    http.py          limits, host checks, bodies, streams
completions.py   routes that generate                    feedback.py      routes for feedback and interactions
admin.py         health, metrics, reload, rollback       access.py        API keys and their scopes
api.py           request and response schemas            responses.py     completions in OpenAI's format
interactions.py  one request: generate and record        gateway.py       all of it without HTTP
loop_server.py   the models of a loop, hot swap          loaded_model.py  one model in service
routing.py       the field `model` of a request          metrics.py       Prometheus metrics
errors.py        error responses
"""
