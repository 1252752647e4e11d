"""What moto's CloudFormation lacks: ``AWS::NoValue`` in a list is no item of it. Patches moto when it is imported.

It also reads ``!Condition`` and nested short forms wrong: give it templates in their long form, as JSON.
"""

from __future__ import annotations

from typing import Any

from moto.cloudformation import parsing

_clean = parsing.clean_json


def _cleaned(value: Any, resources: Any) -> Any:
    if not isinstance(value, list):
        return _clean(value, resources)
    items = [(item, _cleaned(item, resources)) for item in value]
    return [cleaned for item, cleaned in items if cleaned is not None or "NoValue" not in str(item)]


parsing.clean_json = _cleaned
