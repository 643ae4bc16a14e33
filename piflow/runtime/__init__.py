"""Ray: the driver, the train loop of a worker, and what they say to each other."""
