"""The embedded default: a small model that adds badly on purpose, its task as data, and the script that makes both."""
