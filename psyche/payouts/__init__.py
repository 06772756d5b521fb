"""Files with which a third party can pay final credits: a Merkle tree for Ethereum, a weight vector for Bittensor."""
