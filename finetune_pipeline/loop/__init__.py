"""The door for Dagster: the component, one file for each asset, automation."""
