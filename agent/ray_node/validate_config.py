"""``python -m agent.ray_node.validate_config <file> [<provider folder>]``: reads an autoscaling config like Ray's
monitor. An invalid one would end the monitor, and with it the whole head, a few seconds after it looked ready. Exit
code 0, or 1 with the reason as the last line of stderr. A process of its own, because it imports ray."""

from __future__ import annotations

import sys


def main(path: str, provider_folder: str | None = None) -> int:
    try:
        if provider_folder:
            sys.path.insert(0, provider_folder)
        from ray.autoscaler._private.providers import _get_node_provider_cls
        from ray.autoscaler.v2.instance_manager.config import FileConfigReader

        config = FileConfigReader(path, skip_content_hash=True).get_cached_autoscaling_config()
        config.get_node_type_configs()
        config.get_head_node_type()
        if config.get_idle_timeout_s() is None or not config.get_max_num_worker_nodes():
            raise ValueError("idle timeout and max_workers must be set")
        if provider_folder:
            _get_node_provider_cls(config.get_provider_config())
    except Exception as error:  # noqa: BLE001 - the reason is the answer
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
