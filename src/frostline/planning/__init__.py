"""Trace, importance and budget -> Plan: the subset that is worth most of those that a budget allows."""
