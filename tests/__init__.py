"""Tests of the wings."""
