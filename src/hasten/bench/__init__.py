"""Workloads, interleaved measurement, reports."""
