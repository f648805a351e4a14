"""Tests of what a user makes. A package, so that file names may recur in other folders."""
