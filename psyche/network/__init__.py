"""Bytes, hashes and peers: identities, the libp2p node, discovery, calls and blobs. It knows nothing of rounds."""
