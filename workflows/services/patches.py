"""Ids of the patches in ServiceWorkflow. A workflow that began under older code goes on without them, so no id may
change while such a workflow may still run."""

from __future__ import annotations

NOTICES = "notices"
"""A service acts on what the cloud announces for its heads' machines."""

GATES = "its proxies go by the tokens of now"
"""A cluster gets traffic only when its proxies use the current tokens: they may change while it is probed."""

UNSURE = "unsure"
"""A load balancer whose update failed is updated again, also with the backends that it had before."""

RELEASING = "what comes back in place has let go"
"""A version that returns in place waits until its old clusters are released. They would take the new ones with them."""

PENDING_BACK = "a rollback gives up what is pending"
"""A rollback cancels a pending deploy. Before, it went on to the version before the current one."""

REVIVED = "a termination retires what a rollout revives"
"""A rollout that waits for a version's release may revive the version when the service terminates already. Before, that
held up the termination for ever."""
