package ledger

import (
	"fmt"

	"github.com/lmctl/lmctl/migrate"
)

// Copy is what a host has of a guest besides the record.
type Copy int

// The copies.
const (
	NoCopy      Copy = iota // no hypervisor process
	PausedCopy              // stopped vCPUs: suspended, or a shell that never ran
	RunningCopy             // running vCPUs
	UnknownCopy             // there may be a process, and it cannot be asked
)

func (c Copy) String() string { return [...]string{"no copy", "paused", "running", "unknown"}[c] }

// Facts are what Decide needs to know of its own host besides the record.
type Facts struct {
	Host string
	Boot string // of the host, now
	Copy Copy
	// Shell says that the copy was made to receive a guest and has never run.
	Shell bool
	// Foreign says that the hypervisor has other users than this agent: a copy that
	// runs, and was never this host's to run, is one that another hand has brought.
	Foreign bool
	// Busy says that this agent is running a migration of the guest right now,
	// in either direction, whose engine has the say.
	Busy bool
}

// Statement is what one host tells another about a guest when they settle it.
// Of what it says only this can change later: a Busy host can say anything next;
// Moving can become HandedOver or Owned; Prepared can become Accepted or
// Withdrawn. Everything else that Decide relies on stays true once it has been
// said, so that a statement may be acted upon late.
type Statement struct {
	Host     string
	Guest    string
	UUID     string
	State    State
	Epoch    uint64
	Handover *migrate.Handover
	Busy     bool
}

// Say is the statement of a host with record r about a guest.
func Say(r Record, f Facts) Statement {
	return Statement{Host: f.Host, Guest: r.Guest, UUID: r.UUID, State: r.State,
		Epoch: r.Epoch, Handover: r.Handover, Busy: f.Busy}
}

// Action is what a host has to do about a guest.
type Action string

// The actions. All but Rest, Wait, Ask and Doubt change the record or a copy,
// and are followed by another Decide.
const (
	Rest       Action = "rest"        // nothing is open
	Wait       Action = "wait"        // ask the other host again later
	Ask        Action = "ask"         // the other host's statement is needed
	Doubt      Action = "doubt"       // only the operator can say
	Resume     Action = "resume"      // ours: cancel the handover, run the suspended copy on
	Run        Action = "run"         // the word is certain: accept, run, own, announce
	OwnCrashed Action = "own-crashed" // ours, but its process ended: own it, record the crash
	Withdraw   Action = "withdraw"    // note durably that it never ran here, destroy the shell
	Drop       Action = "drop"        // destroy what is left of the shell, if it is one, drop the note
	Release    Action = "release"     // the destination has it: remove the copy, forget it
	Reclaim    Action = "reclaim"     // the destination never ran it: take it back, run it on
	Suspend    Action = "suspend"     // outranked while running here: note so, stop the vCPUs
	Yield      Action = "yield"       // outranked: remove the copy that does not run
)

// Decision is an action and, in a sentence, why.
type Decision struct {
	Action Action
	// Reason is for the operator: what is known, and what to do if it is up to
	// them.
	Reason string
}

func decide(a Action, format string, args ...any) Decision {
	return Decision{a, fmt.Sprintf(format, args...)}
}

// Decide says what a host with record own has to do about a guest, given what
// the other host of the record's handover says, or nil if that is not known. It
// is pure.
func Decide(own Record, f Facts, peer *Statement) Decision {
	if f.Busy {
		return decide(Rest, "a migration of it is under way")
	}
	if f.Copy == UnknownCopy {
		return decide(Wait, "its process here cannot be reached: nobody knows whether it runs")
	}
	if peer != nil && own.State != None && own.State != Damaged && peer.State != None && peer.UUID != own.UUID {
		peer = &Statement{Host: peer.Host} // another guest of the same name
	}
	switch own.State {
	case None, Gone:
		return decideAbsent(own, f)
	case Damaged:
		return decide(Doubt, "this host's record of it cannot be read; `lmctl guest claim %s --force` makes it this host's, if no other host runs it; if nothing of it is here, `lmctl guest destroy %s` forgets the record", own.Guest, own.Guest)
	case Contested:
		if f.Copy == RunningCopy {
			return decide(Suspend, "another host owns it by a higher right")
		}
		return decide(Doubt, "another host owns it by a higher right, and it has run here too: choose the copy to keep; `lmctl guest destroy %s` gives this one up, `lmctl guest claim %s --force` the other", own.Guest, own.Guest)
	case Owned, Moving:
		return decideOwner(own, f, peer)
	case HandedOver:
		return decideSource(own, f, peer)
	case Accepted:
		return decideAccepted(own, f)
	case Prepared:
		return decidePrepared(own, f, peer)
	case Withdrawn:
		return decideWithdrawn(own, f, peer)
	}
	return decide(Doubt, "its record is in a state %q that this version does not know", own.State)
}

func decideAbsent(own Record, f Facts) Decision {
	switch f.Copy {
	case PausedCopy:
		if own.State == Gone || f.Shell {
			return decide(Drop, "what is left of a copy that nobody needs")
		}
		fallthrough
	case RunningCopy:
		return decide(Doubt, "it is here, %s, but this host has no record of owning it; `lmctl guest claim %s --force` if no other host runs it", f.Copy, own.Guest)
	}
	return decide(Rest, "not here")
}

// outranked says whether the peer owns the guest by a higher right than own's. Of
// two claims with one epoch the host whose name sorts first wins.
func outranked(own Record, f Facts, peer Statement) bool {
	epoch := peer.Epoch
	switch peer.State {
	case Owned, Moving, HandedOver, Accepted:
	default:
		return false
	}
	if peer.State == HandedOver && peer.Handover != nil && peer.Handover.Destination == f.Host {
		return false // it says that it is ours
	}
	return epoch > own.Epoch || epoch == own.Epoch && peer.Host < f.Host
}

func decideOwner(own Record, f Facts, peer *Statement) Decision {
	if peer != nil && outranked(own, f, *peer) {
		if f.Copy == RunningCopy {
			return decide(Suspend, "host %s owns it at epoch %d, this host only at %d", peer.Host, peer.Epoch, own.Epoch)
		}
		return decide(Yield, "host %s owns it at epoch %d, this host only at %d", peer.Host, peer.Epoch, own.Epoch)
	}
	if own.State == Moving || f.Copy == PausedCopy {
		return decide(Resume, "it was not handed over: it runs on here")
	}
	return decide(Rest, "owned here")
}

func decideSource(own Record, f Facts, peer *Statement) Decision {
	h := own.Handover
	if f.Copy == RunningCopy {
		return decide(Suspend, "it was handed over to host %s", h.Destination)
	}
	if peer == nil {
		return decide(Ask, "it was handed over to host %s, which has not acknowledged it yet; if that host is lost for good, `lmctl guest claim %s --force` here takes it back", h.Destination, own.Guest)
	}
	if peer.Host != h.Destination {
		return decide(Ask, "it was handed over to host %s, and host %s spoke", h.Destination, peer.Host)
	}
	same := peer.Handover != nil && peer.Handover.ID == h.ID
	switch peer.State {
	case Owned, Moving, HandedOver, Gone, Contested:
		if peer.Epoch >= h.Epoch {
			return decide(Release, "host %s has acknowledged it", h.Destination)
		}
	case Withdrawn:
		if same {
			return decide(Reclaim, "host %s has withdrawn and never ran it", h.Destination)
		}
	case Prepared, Accepted:
		if same {
			return decide(Wait, "host %s has it and is about to run it", h.Destination)
		}
	}
	if peer.Busy {
		return decide(Wait, "host %s is still at it", h.Destination)
	}
	return decide(Doubt, "it was handed over to host %s, which knows nothing of that; make sure that it does not run there, then `lmctl guest claim %s --force` here", h.Destination, own.Guest)
}

func decideAccepted(own Record, f Facts) Decision {
	if own.Boot != f.Boot || f.Copy == NoCopy {
		return decide(OwnCrashed, "it was accepted here and its process has ended since")
	}
	return decide(Run, "it was accepted here")
}

func decidePrepared(own Record, f Facts, peer *Statement) Decision {
	h, rebooted := own.Handover, own.Boot != f.Boot
	if !rebooted && f.Copy == NoCopy {
		return decide(Withdraw, "its shell has ended and never ran")
	}
	if peer == nil || peer.Host != h.Source {
		return decide(Ask, "only host %s knows whether it was handed over; if that host is lost for good, `lmctl guest claim %s --force` here makes it this host's", h.Source, own.Guest)
	}
	same := peer.Handover != nil && peer.Handover.ID == h.ID
	switch {
	case peer.State == HandedOver && same, peer.State == Gone && same:
		if rebooted {
			return decide(OwnCrashed, "it was handed over to this host, which has restarted since")
		}
		return decide(Run, "host %s has handed it over", h.Source)
	case peer.Busy, peer.State == Moving && same:
		return decide(Wait, "host %s has not decided yet", h.Source)
	case peer.State == None, peer.State == Damaged:
		return decide(Doubt, "host %s knows nothing of it; make sure that it does not run there, then `lmctl guest claim %s --force` here, or `lmctl guest destroy %s`", h.Source, own.Guest, own.Guest)
	case rebooted:
		return decide(Drop, "host %s has kept it", h.Source)
	}
	return decide(Withdraw, "host %s has kept it", h.Source)
}

func decideWithdrawn(own Record, f Facts, peer *Statement) Decision {
	h := own.Handover
	if f.Copy == RunningCopy && !f.Foreign {
		return decide(Doubt, "it was withdrawn here and yet runs; make sure that it does not run on host %s, then `lmctl guest claim %s --force` here", h.Source, own.Guest)
	}
	if f.Copy == PausedCopy {
		return decide(Withdraw, "what is left of its shell")
	}
	if peer == nil || peer.Host != h.Source {
		return decide(Ask, "host %s has yet to hear that it was withdrawn", h.Source)
	}
	same := peer.Handover != nil && peer.Handover.ID == h.ID
	if peer.Busy || same && (peer.State == Moving || peer.State == HandedOver) {
		return decide(Wait, "host %s has yet to take it back", h.Source)
	}
	return decide(Drop, "host %s knows that it was withdrawn", h.Source)
}
