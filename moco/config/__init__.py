"""The settings of all programs as dataclasses, and the parser that checks them.

Programs call `moco.config.parsing.parse`. Nothing below the programs imports this package.
"""
