"""How programs start and end, and how a run is built from its config.

Programs call `moco.cli.launch.launch`. The other files hold the checks before a run, the names of
run folders, progress and closing tables.
"""
