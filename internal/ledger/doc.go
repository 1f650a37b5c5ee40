// Package ledger is who owns which guest, as one host knows it, without a
// cluster: one small durable record for each guest on each host. It implements
// the engine's migrate.SourceLedger and migrate.DestinationLedger, and holds
// the rules by which two hosts that have lost contact in the middle of a
// handover settle it when they meet again.
//
// A [Ledger] is opened once by the agent of the host. What may follow what is a
// pure function ([Step]), and so is what two hosts conclude from each other's
// records ([Decide]): both are tested by tables of all cases, and together by
// an exhaustive search over every order of crashes, reboots and lost messages.
//
// # On disk
//
// A record is a file of two slots of 4 KiB, written in full when it is made, so
// that a later write allocates nothing and needs no journal. A write goes to
// the slot that does not hold the last durable record, and is durable after
// one fdatasync. A slot has a sequence number and a checksum: the valid slot
// with the higher number is the record, and a torn write leaves the one
// before. Begin and Accept, which stand in a guest's downtime and need to
// survive only the agent, are written without waiting for the disk; the id of
// the host's boot in the record tells afterwards that the host did not survive
// either.
package ledger
