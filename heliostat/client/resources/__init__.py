"""The methods of ``Client`` and ``AsyncClient``, one file per noun, each written once (see
``heliostat.client.effects``)."""
