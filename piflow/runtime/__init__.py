"""Ray: the driver, the workers, and what they say to one another.

`attempts.py` starts workers again and again until their work is done: for training `driver.py`
says what that is, and `worker.py` and `loop.py` are a worker; for an evaluation's pictures
`evaluating.py` is both. `mailbox.py` stands between driver and workers. `signals.py`, `stopping.py`
and `watchdog.py` bring workers to an end, `session.py` opens Ray, and `ray_private.py` is all that
uses Ray Train's insides.
`predicting.py` has the driver plan beside the run what it measures.
`environment.py` brings keys to workers, `worker_log.py` their last lines to the driver.
`job_server.py` is a cluster's job server, for whoever submits a driver.

May import everything but the jobs and the commands.
"""
