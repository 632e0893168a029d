"""Adapters to trainers: glue only. What they glue together (probe, credit) knows no trainer."""
