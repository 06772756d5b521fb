"""psyche: LLM pretraining over permissionless, low-bandwidth nodes."""

__version__ = "0.1.0"
