"""edgead: compiled anomaly-detection engines whose knowledge stays outside them.

The rooms are `edgead.runtime` (light, runs on the camera), `edgead.exporter` (needs torch) and
`edgead.server_side` (the heavy work). Importing `edgead` imports none of them.
"""

__version__ = "0.1.0"
