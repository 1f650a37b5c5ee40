package migrate

// State names a step of a migration at one end. The names are stable: the API,
// the logs and the crash tests use them.
type State string

// The source's states, in the order of a migration that succeeds.
const (
	SourcePreparing  State = "preparing"   // the destination builds the shell VM
	SourceTracking   State = "tracking"    // the tracker is being attached
	SourceCopying    State = "copying"     // the live passes
	SourceSuspending State = "suspending"  // the hypervisor stops the guest
	SourceFinalCopy  State = "final-copy"  // last bitmap, last pages, device state
	SourceReadyWait  State = "ready-wait"  // the destination loads
	SourceCommitting State = "committing"  // the durable record is being written
	SourceCommitted  State = "committed"   // the record stands, the word is not yet out
	SourceHandedOver State = "handed-over" // the word is out, no acknowledgement yet
	SourceReleasing  State = "releasing"   // the destination owns the guest; the copy is removed
	SourceDone       State = "done"
	SourceAborting   State = "aborting" // undoing everything; the guest goes on here
	SourceAborted    State = "aborted"
	SourceInDoubt    State = "in-doubt"
)

// The destination's states.
const (
	DestPreparing State = "preparing" // checks, shell VM
	DestReceiving State = "receiving" // live passes
	DestFinal     State = "final"     // the guest is stopped, the last pages arrive
	DestLoading   State = "loading"   // device state
	DestReady     State = "ready"     // all is in place, waiting for the word
	DestAccepted  State = "accepted"  // the word has come and is noted
	DestRunning   State = "running"   // vCPUs run, not yet durable
	DestOwned     State = "owned"     // durable, acknowledged
	DestWithdrawn State = "withdrawn" // the shell is gone and never ran
	DestUndecided State = "undecided" // contact lost while ready: the source's record decides
)
