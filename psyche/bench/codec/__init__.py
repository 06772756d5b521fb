"""``psyche bench codec``: speed and error of the codecs, beside other people's."""
