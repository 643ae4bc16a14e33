"""The embedded default: emoji prompts, emoji pictures and the small teacher trained on them.

`emoji.py` draws what prompts stand for, `retrieval.py` finds the emoji nearest to a picture,
`teacher/` is the trained model with its card.

May import the storage.
"""
