//go:build !race

package ledger

// maxFaults is how many things go wrong in one run of the model.
const maxFaults = 3
