//go:build race

package ledger

// maxFaults is smaller under the race detector, which has nothing to find in a
// model and makes it ten times slower.
const maxFaults = 1
