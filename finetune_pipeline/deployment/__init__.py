"""Deployment: bring a model to the servers that people already run; `pipeline.deploy` decides when."""
