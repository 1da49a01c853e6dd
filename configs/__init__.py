"""Experiment records: one YAML per experiment, `tiny/` overlays that let any of them run here."""
