"""The codecs this version speaks. No imports: configuration is checked without loading torch."""

CODECS = ("fp32", "int8")
