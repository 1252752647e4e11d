"""The node agent: registers its machine, starts Ray on it, executes commands, reports, ships logs, and stops the
machine when nobody needs it (docs/agent-protocol.md).

Standard library only, Linux only. Only ``ray_node.node_provider`` and ``ray_node.validate_config`` import ``ray``; they
run in processes of their own. ``gate`` runs in Ray Serve's.
"""
