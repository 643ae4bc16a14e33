"""A run as it lies on disk and in MLflow.

`folder.py`: whose the run's folder is by recipe and store, and its checkpoints. `lease.py`: one
driver at a time writes it. `tracking.py` says what MLflow is told, `outbox.py` keeps it while the
server is away, `mlflow.py` and `logged.py` deliver it once. `origin.py`: who started a run, and
what it is about. `predicted.py`: what was planned of it, and measured. `registry.py`: adapters as
registered models.

May import the configuration and the storage.
"""
