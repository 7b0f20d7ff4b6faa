"""Tests stay quiet and offline: `rlhf`'s environment without a Hub id, before any library is imported."""

from pipeline.launch import set_environment

set_environment({})
