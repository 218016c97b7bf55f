"""Tests of the commands: options, results and errors, with the sampling itself left out."""
