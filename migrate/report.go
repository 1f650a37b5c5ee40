package migrate

import "time"

// Result says how a migration ended.
type Result string

// The results of a migration.
const (
	Completed Result = "completed" // the guest runs at the destination
	Refused   Result = "refused"   // refused before anything was copied; the guest runs on the source
	Failed    Result = "failed"    // the guest runs on the source
	Cancelled Result = "cancelled" // asked for; the guest runs on the source
	InDoubt   Result = "in-doubt"  // the guest is stopped until both hosts have settled who owns it
)

// SwitchoverReason says why the passes ended.
type SwitchoverReason string

// The reasons to end pre-copy.
const (
	Converged    SwitchoverReason = "converged"     // what is left fits into the downtime target
	NotShrinking SwitchoverReason = "not-shrinking" // another pass would not make it less
	MaxPasses    SwitchoverReason = "max-passes"
)

// Report is the stable account of a migration: lmctl prints it with --json.
// Every figure in it was measured. Times are nanoseconds in JSON.
type Report struct {
	ID               string           `json:"id"`
	Guest            string           `json:"guest"`
	Source           string           `json:"source"`
	Destination      string           `json:"destination"`
	Mode             Mode             `json:"mode"`
	Result           Result           `json:"result"`
	Error            string           `json:"error"` // why it did not complete, or what is to be known of one that did; else empty
	SwitchoverReason SwitchoverReason `json:"switchover_reason"`
	Passes           []Pass           `json:"passes"`
	// Downtime runs from the hypervisor's word that the guest has stopped to the
	// destination's that it runs, both as they reach the source, by one clock.
	// Zero if the guest never stopped, or nobody saw it start.
	Downtime      time.Duration `json:"downtime_ns"`
	DowntimeParts DowntimeParts `json:"downtime_parts"`
	Total         time.Duration `json:"total_ns"`
	RAMBytes      int64         `json:"ram_bytes"`
	BytesSent     int64         `json:"bytes_sent"` // payload and framing, before TLS
	VerifiedPages int64         `json:"verified_pages"`
	Announced     int           `json:"announced"` // addresses announced at the destination
}

// Pass is one round of pre-copy. The last entry of a completed migration's
// passes is still a live one: what was copied while the guest stood still is
// in DowntimeParts.
type Pass struct {
	N         int           `json:"n"`     // from 1
	Pages     int64         `json:"pages"` // pages sent, zero pages among them
	ZeroPages int64         `json:"zero_pages"`
	Bytes     int64         `json:"bytes"` // on the wire, before TLS
	Duration  time.Duration `json:"duration_ns"`
	// DirtyAfter is how many pages had been written again when the pass ended.
	DirtyAfter int64 `json:"dirty_after"`
}

// DowntimeParts divides the downtime. The parts overlap where the work does:
// the final pages travel while the device state is saved.
type DowntimeParts struct {
	Stop       time.Duration `json:"stop"`        // vCPUs stopped, block I/O landed
	FinalScan  time.Duration `json:"final_scan"`  // the last bitmap
	FinalCopy  time.Duration `json:"final_copy"`  // the last pages, until the destination has them
	FinalPages int64         `json:"final_pages"` // how many those were; in direct mode
	StateSave  time.Duration `json:"state_save"`
	// StateBytes is, in relay mode, all that came after the last live pass, pages
	// too: nothing in the stream tells where the stop lies.
	StateBytes int64         `json:"state_bytes"`
	StateLoad  time.Duration `json:"state_load"` // at the destination, from the last page in place to loaded
	Verify     time.Duration `json:"verify"`     // zero without --verify
	Commit     time.Duration `json:"commit"`     // the source's durable record
	Resume     time.Duration `json:"resume"`     // at the destination, from the word to running vCPUs
}
