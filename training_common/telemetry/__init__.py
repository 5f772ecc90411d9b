"""What a service tells monitoring systems of itself: metrics for Prometheus, traces and metrics over OTLP."""
