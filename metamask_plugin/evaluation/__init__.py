"""Evaluation of frozen features: nearest neighbours, linear and MLP probes, tables and figures."""
