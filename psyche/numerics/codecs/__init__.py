"""Codecs: pure pairs of functions between flat fp32 ranges and payload bytes."""
