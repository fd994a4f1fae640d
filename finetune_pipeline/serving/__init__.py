"""An OpenAI-compatible gateway that logs requests, accepts feedback and hot-swaps models.

app.py                the HTTP application               http.py          host checks, CORS, bodies, streams
completions.py        routes of (chat) completions       feedback.py      routes for feedback and interactions
completion_format.py  their responses and events         admin.py         health, metrics, reload, rollback
responses_api.py      routes of the Responses API        access.py        API keys, scopes, origins
responses_schema.py   its requests                       interactions.py  one request: generate and record
responses_format.py   its responses and events           streaming.py     the same in parts
api.py                schemas of the other routes        gateway.py       all of it without HTTP
loop_server.py        the models of a loop, hot swap     loaded_model.py  one model in service
routing.py            the field `model` of a request     metrics.py       Prometheus metrics
errors.py             error responses                    connections.py   limits of size, time and number
deployer.py           deployment targets, in the background
"""
