"""How much of its time a node trains, when exchanging takes long."""
