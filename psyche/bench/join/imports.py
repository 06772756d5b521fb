"""Import what a node needs to train a Llama, as ``psyche join`` does, and say on stdout when that was done."""

from __future__ import annotations

import time


def main() -> None:
    import psyche.processes.node_process  # noqa: F401
    from psyche.cli.join_commands import join  # noqa: F401
    from psyche.config import Model
    from psyche.telemetry import view  # noqa: F401
    from psyche.training.models import layout

    layout(Model(settings={"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}))
    print(time.time())


if __name__ == "__main__":
    main()
