"""A driver with a mailbox on its machine, which says when it hears that the machine goes."""

from __future__ import annotations

import time

import ray

from piflow.runtime.mailbox import StopReason, start_mailbox

if __name__ == "__main__":
    ray.init(log_to_driver=False)
    mailbox = start_mailbox()
    print("leaving:", ray.get(mailbox.is_machine_leaving.remote()), flush=True)
    while not ray.get(mailbox.is_machine_leaving.remote()):
        time.sleep(0.2)
    print("leaving: True", flush=True)
    ray.get(mailbox.ask_to_stop.remote(StopReason.END), timeout=30)
    print("the mailbox still answers", flush=True)
