"""What shows the metrics of cluster/telemetry.py: panels, dashboards, alerts, Prometheus, a page."""
