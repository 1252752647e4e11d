"""What moto's IAM lacks: SimulatePrincipalPolicy, of a role's inline and managed policies.

Evaluates Effect, Action, Resource with wildcards, and StringEquals and StringLike conditions, as
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html says for one account: no
NotAction, no boundaries, no organization's policies. Patches moto when it is imported.
"""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any

from moto.core.responses import ActionResult
from moto.iam.models import Role, iam_backends
from moto.iam.responses import IamResponse

__all__ = ["iam_backends"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _like(pattern: str, value: str, *, fold: bool = False) -> bool:
    if fold:
        pattern, value = pattern.lower(), value.lower()
    return re.fullmatch(fnmatch.translate(pattern.replace("[", "[[]")), value) is not None


def holds(condition: dict[str, Any], context: dict[str, str]) -> bool:
    """A statement's condition, in a request with these keys."""
    for operator, tests in condition.items():
        for key, wanted in tests.items():
            given = context.get(key)
            if operator not in ("StringEquals", "StringLike"):
                raise NotImplementedError(operator)
            fits = _like if operator == "StringLike" else str.__eq__
            if given is None or not any(fits(one, given) for one in _listed(wanted)):
                return False
    return True


def decision(statements: list[dict[str, Any]], action: str, resource: str, context: dict[str, str]) -> str:
    """``allowed``, ``explicitDeny`` or ``implicitDeny``."""
    found = {
        s["Effect"]
        for s in statements
        if any(_like(a, action, fold=True) for a in _listed(s["Action"]))
        and any(_like(r, resource) for r in _listed(s["Resource"]))
        and holds(s.get("Condition", {}), context)
    }
    return "explicitDeny" if "Deny" in found else "allowed" if "Allow" in found else "implicitDeny"


def statements_of(role: Role) -> list[dict[str, Any]]:
    documents = [*role.policies.values(), *(p.document for p in role.managed_policies.values())]
    return [s for d in documents for s in _listed((json.loads(d) if isinstance(d, str) else d)["Statement"])]


def _simulate(self: IamResponse) -> ActionResult:
    statements = statements_of(self.backend.get_role_by_arn(self._get_param("PolicySourceArn")))
    entries = self._get_param("ContextEntries") or []
    context = {e["ContextKeyName"]: e["ContextKeyValues"][0] for e in entries}
    resources = self._get_param("ResourceArns") or ["*"]
    results = []
    for action in self._get_param("ActionNames"):
        each = {r: decision(statements, action, r, context) for r in resources}
        refused = [d for d in each.values() if d != "allowed"]
        specific = [{"EvalResourceName": r, "EvalResourceDecision": d} for r, d in each.items()]
        results.append(
            {
                "EvalActionName": action,
                "EvalResourceName": resources[0],
                "EvalDecision": refused[0] if refused else "allowed",
                "ResourceSpecificResults": specific if len(resources) > 1 else [],
            }
        )
    return ActionResult({"EvaluationResults": results, "IsTruncated": False})


IamResponse.simulate_principal_policy = _simulate  # type: ignore[attr-defined]
