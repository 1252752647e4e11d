"""``heliostat service``: its commands, and how they show a service."""
