"""The kernel of the entity workflows: one workflow per cluster, job or service, for its whole life.

Small objects that a workflow is composed of. None of them knows its owner; each holds one thing:
``recorder`` (events, the write of the projection), ``steps`` (background tasks), ``alarm`` (the main loop's
wake-up and its one timer), ``life`` (cancel shield, continue-as-new), ``commands`` (to a cluster's head),
``leases`` (giving a cluster back), ``seen`` (messages that come twice).
"""
