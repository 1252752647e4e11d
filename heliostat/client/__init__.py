"""The client of the API, in Python: ``Client`` and ``AsyncClient`` (``heliostat.client.client``)."""
