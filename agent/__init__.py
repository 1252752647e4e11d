"""The node agent: registers its machine, starts Ray on it, is the only one that speaks to Ray, carries out
commands, reports, ships logs, and stops the machine when nobody needs it (docs/agent-protocol.md).

Standard library only, Linux only. ``ray`` is imported by ``node_provider`` and ``validate_config`` alone, which
run as processes of their own.
"""
