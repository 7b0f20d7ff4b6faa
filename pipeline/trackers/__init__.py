"""Send the rows of a run's journals to trackers: TensorBoard, Weights & Biases, MLflow and others.

A process of its own does it (`process.py`), started by the first row of a command (`relay.py`) and
fed by the journals alone (`rows.py`): whatever a tracker does, training neither waits nor ends.
"""
