"""Ray: the driver, the workers, and what they say to one another.

`driver.py` starts workers again and again until the last step is done, `worker.py` and `loop.py`
are a worker, `mailbox.py` stands between them. `signals.py`, `stopping.py` and `watchdog.py`
bring workers to an end, `session.py` opens Ray, and `ray_private.py` is all that uses Ray Train's
insides.

May import everything but evaluation and the commands.
"""
