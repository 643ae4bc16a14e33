"""The embedded default: emoji prompts, emoji pictures and the small teacher trained on them."""
