"""The driver's part of a prediction: made beside the workers' first steps, kept beside what they
measure, never in their way.

    mailbox --Workers--> driver --> thread: predict --> plan/plan.json, plan/plan.md --> MLflow
            --Measured-> driver ---------------------->   metrics plan/*, description
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from piflow.runs import predicted
from piflow.runs.origin import NOTE
from piflow.runs.predicted import Measured, Prediction, Workers
from piflow.runs.tracking import Tracker
from piflow.training.prediction import predict

_PATIENCE = 60.0  # seconds, for a prediction that is longer under way than the run that ends well
_HURRY = 1.0  # the same for a run that was stopped or failed
_log = logging.getLogger(__name__)
_counting = threading.Lock()  # counting replaces PyTorch's attention for a while


@contextmanager
def predicting(
    run_dir: str, tracker: Tracker, note: Callable[[str], str]
) -> Iterator[Callable[[Workers | Measured], None]]:
    """A function that takes what rank 0 tells; it neither waits nor fails.

    Args:
        note: a table of what was predicted and measured -> the run's description.
    """
    predictions = _Predictions(run_dir, tracker, note)
    patience = _HURRY
    try:
        yield predictions.take
        patience = _PATIENCE
    finally:
        predictions.close(patience)


class _Predictions:
    """The driver's thread hands in what it is told, and another one works it off, in order."""

    def __init__(self, run_dir: str, tracker: Tracker, note: Callable[[str], str]) -> None:
        self._run_dir = run_dir
        self._tracker = tracker
        self._note = note
        self._told: queue.Queue[Workers | Measured | None] = queue.Queue()  # None: the end
        self._newest: Workers | None = None  # of the driver's thread; the other one reads it
        self._thread = threading.Thread(target=self._work, name="predict", daemon=True)
        self._thread.start()

    def take(self, told: Workers | Measured) -> None:
        if isinstance(told, Workers):
            self._newest = told
        self._told.put(told)

    def close(self, seconds: float) -> None:
        """Wait until all of it is worked off, so long."""
        self._told.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        prediction: Prediction | None = None  # of the workers that were told of last
        while (told := self._told.get()) is not None:
            try:
                if isinstance(told, Workers):
                    prediction = None
                    prediction = self._predicted(told)
                if prediction is not None:
                    self._publish(prediction, told if isinstance(told, Measured) else None)
            except Exception as error:  # whatever it is, the run goes on
                text = f"no plan is kept beside this run: {type(error).__name__}: {error}"
                # a model that can't be counted says why; anything else is a fault worth a traceback
                _log.warning(text, exc_info=None if isinstance(error, ValueError) else error)
                self._tracker.event("plan", text)

    def _predicted(self, workers: Workers) -> Prediction | None:
        """None: other workers have started meanwhile."""
        with _counting:
            if workers is not self._newest:
                return None
            found = predict(workers)
        self._tracker.log_metrics(found.metrics(), step=workers.start)
        return found

    def _publish(self, prediction: Prediction, measured: Measured | None) -> None:
        for name, content in predicted.write(self._run_dir, prediction, measured).items():
            self._tracker.log_text(name, content)
        table = predicted.table(prediction, measured)
        self._tracker.set_tags({NOTE: self._note(table)})
