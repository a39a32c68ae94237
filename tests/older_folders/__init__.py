"""Folders that older transformers wrote, read today: `make older-folders`. For maintainers; no test runs it.

Each older version is installed in a folder of its own, in front of everything else for the process that writes with
it (`write`), and has torch and the rest from the environment at hand. `read` then opens every folder with today's
transformers and with jaxmoe, and `report` keeps what was found.
"""
