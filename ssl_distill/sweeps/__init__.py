"""Searches for hyper-parameters from wandb's sweep files, without a server."""
