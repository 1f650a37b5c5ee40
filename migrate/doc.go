// Package migrate moves a running guest from one host to another.
//
// The source's side is [Sender.Migrate], the destination's [Receiver.Serve].
// They speak the protocol of PROTOCOL.md over connections that the caller has
// authenticated, and know the guest only as a [Guest], a [Host] and a [Shell],
// which a hypervisor's driver implements. Who owns the guest stands in a
// [SourceLedger] and a [DestinationLedger].
//
// Where to look: the pass loop is precopy in passes.go, the decision after each
// pass [Policy.Next], the time in which the guest stands still switchover.go,
// the destination's steps session.go. The states that both go through are in
// state.go, and what becomes of the guest when something dies in between is at
// the end of PROTOCOL.md.
package migrate
