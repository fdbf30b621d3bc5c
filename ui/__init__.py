"""The UI's room, installed as `localrl_ui`. Empty yet: see README.md."""
